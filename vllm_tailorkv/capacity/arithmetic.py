"""What fits, and what a decode step reads. Arithmetic alone: nothing is printed or measured.

Everything is of one worker: a GPU, or a process of a CPU server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch

from vllm_tailorkv.attention.rows import tail_starts
from vllm_tailorkv.attention.staged import STAGING_BYTES
from vllm_tailorkv.cache.sizing import CacheSizing, size_cache
from vllm_tailorkv.kernels.composed import SCORES_BYTES
from vllm_tailorkv.kernels.types import SPREAD_GROUPS
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout
from vllm_tailorkv.plan import Plan, hot_sets

SECTOR_BYTES = {"cuda": 32, "cpu": 64}
"""The least that a read of a few bytes costs: a sector of a GPU, a cache line of a CPU."""


@dataclass(frozen=True)
class Worker:
    """What a worker serves, and from which memory.

    Args:
        num_layers: decoder layers.
        num_heads, num_kv_heads: query and KV heads on this worker.
        head_size: channels of a head.
        itemsize: bytes of an element of K or V.
        longest: tokens of the model's longest context.
        context: tokens of a request.
        weights: bytes of its weights.
        step_weights: bytes of those that a decode step reads.
        memory: bytes of the device's memory; on a CPU server, of the worker's share of the host's.
        utilization: share of it that vLLM may use.
        overhead: bytes allowed for activations, graphs and libraries.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    itemsize: int
    longest: int
    context: int
    weights: int
    step_weights: int
    memory: int
    utilization: float
    overhead: int

    @property
    def usable(self) -> int:
        """Bytes that vLLM may use, as it rounds them."""
        return ceil(self.memory * self.utilization)


@dataclass(frozen=True)
class Read:
    """What a decode step reads for one request, in layers that are alike.

    Args:
        what: in words.
        from_host: whether it lies in the host tier.
        layers: how many.
        count: pieces that each layer reads.
        unit: what a piece is: "tokens" or "groups".
        unit_bytes: bytes of a piece, all KV heads.
    """

    what: str
    from_host: bool
    layers: int
    count: int
    unit: str
    unit_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return self.layers * self.count * self.unit_bytes


@dataclass(frozen=True)
class Fit:
    """What fits with one kind of cache, and what a decode step reads.

    Args:
        name: of the kind.
        worker: whose memory it is.
        staging: bytes of the buffer that prompts with a prefix on the host are attended from.
        scores: bytes of the scores of an index.
        hot: bytes of rows that lie on a GPU too.
        block_size: tokens of a block.
        pool_block: bytes of a block in vLLM's pool, all layers.
        host_block: bytes of a block in a pool of our own, all layers; 0 without one.
        host_pool: bytes of that pool; None without one, or if it has a share of vLLM's memory.
        blocks: that fit, vLLM's null block included.
        reads: of a decode step, for one request.
        sizing: of our own cache.
    """

    name: str
    worker: Worker
    staging: int
    scores: int
    hot: int
    block_size: int
    pool_block: int
    host_block: int
    host_pool: int | None
    blocks: int
    reads: tuple[Read, ...]
    sizing: CacheSizing | None = None

    @property
    def cache(self) -> int:
        """Bytes that vLLM finds for its cache; negative: so many are missing."""
        worker = self.worker
        scratch = self.staging + self.scores + self.hot
        return worker.usable - worker.weights - worker.overhead - scratch

    @property
    def blocks_by_memory(self) -> int:
        """Blocks that vLLM's memory holds."""
        shared = self.host_block if self.host_pool is None else 0
        return max(0, self.cache) // (self.pool_block + shared)

    @property
    def blocks_by_host_pool(self) -> int | None:
        """Blocks that the pool of our own holds, if it has a size of its own."""
        return None if self.host_pool is None else self.host_pool // self.host_block

    @property
    def bound_by_host_pool(self) -> bool:
        """Whether that pool is what holds fewer blocks."""
        by_host = self.blocks_by_host_pool
        return by_host is not None and by_host < self.blocks_by_memory

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds: vLLM's null block has none."""
        return max(0, self.blocks - 1) * self.block_size

    @property
    def longest_context(self) -> int:
        """Tokens of the longest request that fits."""
        return min(self.tokens, self.worker.longest)

    @property
    def blocks_of_request(self) -> int:
        """Blocks of a request of `worker.context` tokens."""
        return ceil(self.worker.context / self.block_size)

    @property
    def requests(self) -> int:
        """Requests of `worker.context` tokens that fit at the same time."""
        return max(0, self.blocks - 1) // self.blocks_of_request

    @cached_property
    def pool_bytes_read(self) -> int:
        """Bytes of the device's memory that a decode step reads for one request."""
        return sum(read.num_bytes for read in self.reads if not read.from_host)

    @cached_property
    def host_bytes_read(self) -> int:
        """Bytes of the host tier that a decode step reads for one request."""
        return sum(read.num_bytes for read in self.reads if read.from_host)

    def step_bytes(self, requests: int) -> tuple[int, int]:
        """What a decode step reads from the device's memory, weights included, and the host's."""
        device = self.worker.step_weights + requests * self.pool_bytes_read
        return device, requests * self.host_bytes_read


def fit_vllm(name: str, worker: Worker, *, itemsize: int, block_size: int) -> Fit:
    """What fits with vLLM's own cache.

    Args:
        itemsize: bytes of an element of K or V.
        block_size: tokens of a block.
    """
    token = 2 * worker.num_kv_heads * worker.head_size * itemsize
    every = Read("K and V", False, worker.num_layers, worker.context, "tokens", token)
    block = worker.num_layers * token * block_size
    cache = worker.usable - worker.weights - worker.overhead
    blocks = max(0, cache) // block
    return Fit(name, worker, 0, 0, 0, block_size, block, 0, None, blocks, (every,))


def layouts_of(worker: Worker, plan: Plan, block_size: int) -> dict[int, PageLayout]:
    """The pages of every layer, by index."""
    return {
        layer: plan.layout(
            layer,
            num_kv_heads=worker.num_kv_heads,
            head_size=worker.head_size,
            block_size=block_size,
            kv_itemsize=worker.itemsize,
        )
        for layer in range(worker.num_layers)
    }


def fit_tailorkv(name: str, worker: Worker, plan: Plan, *, block_size: int) -> Fit:
    """What fits with both tiers."""
    layouts = layouts_of(worker, plan, block_size)
    sizing = size_cache(layouts, 0, split=plan.split)
    staging, scores = scratch_bytes(worker, plan)
    hot = hot_bytes(worker, plan)
    cache = worker.usable - worker.weights - worker.overhead - staging - scores - hot
    memory = sizing.memory_for_vllm(max(0, cache), plan.host_pool)
    return Fit(
        name,
        worker,
        staging,
        scores,
        hot,
        block_size,
        sizing.pool_bytes,
        sizing.host_bytes if sizing.split else 0,
        plan.host_pool if sizing.split else None,
        memory // sizing.pool_bytes,
        tuple(reads_of_request(worker, plan, layouts)),
        sizing,
    )


def scratch_bytes(worker: Worker, plan: Plan) -> tuple[int, int]:
    """On a GPU, bytes of the buffer that prompts are staged in, and of an index's scores.

    Steps outside of graphs use the same memory for both; a graph keeps its scores.
    """
    if not plan.on_gpu:
        return 0, 0
    token = 2 * worker.num_kv_heads * worker.head_size * worker.itemsize
    row = 4 * worker.num_kv_heads * worker.longest
    scores = max(SCORES_BYTES, row) if plan.layers.sparse else 0
    return min(STAGING_BYTES, worker.longest * token), scores


def hot_bytes(worker: Worker, plan: Plan) -> int:
    """On a GPU, bytes of rows that lie there too, and of what says whose they are."""
    if not plan.config.hot_tokens:
        return 0
    row = 2 * worker.head_size * worker.itemsize + 4
    layers = sum(not plan.layers.is_dense(layer) for layer in range(worker.num_layers))
    return layers * worker.num_kv_heads * hot_sets(plan.config.hot_tokens) * row


def reads_of_request(worker: Worker, plan: Plan, layouts: Mapping[int, PageLayout]) -> list[Read]:
    """What a decode step reads for one request, as the ops do; nothing is found in a cache."""
    if worker.context <= plan.config.exact_below:
        token = next(iter(layouts.values())).full_bytes // next(iter(layouts.values())).block_size
        return [Read("K and V", True, worker.num_layers, worker.context, "tokens", token)]
    reads = []
    for kind in DerivedKind:
        alike = [layout for layout in layouts.values() if layout.kind is kind]
        if alike:
            of_kind = _dense_reads if kind is DerivedKind.DENSE else _sparse_reads
            reads += of_kind(worker, plan, alike[0], len(alike))
    return reads


def _tail_start(worker: Worker, plan: Plan, layout: PageLayout) -> int:
    lengths = torch.tensor([worker.context], dtype=torch.int32)
    start = int(tail_starts(lengths, layout.kind, layout.group_size, plan.config))
    return max(0, start)


def _dense_reads(worker: Worker, plan: Plan, layout: PageLayout, layers: int) -> list[Read]:
    start = _tail_start(worker, plan, layout)
    group = layout.num_kv_heads * layout.record_bytes
    token = layout.full_bytes // layout.block_size
    groups = start // layout.group_size
    return [
        Read("dense, codes", False, layers, groups, "groups", group),
        Read("dense, newest K and V", True, layers, worker.context - start, "tokens", token),
    ]


def _sparse_reads(worker: Worker, plan: Plan, layout: PageLayout, layers: int) -> list[Read]:
    config, start = plan.config, _tail_start(worker, plan, layout)
    middle = max(0, start - config.sink_tokens)
    value = layout.num_kv_heads * layout.head_size * layout.kv_itemsize
    scattered = key_bytes(plan, layout, layout.head_size)
    edges = min(config.sink_tokens, start) + worker.context - start
    is_reranked = config.candidate_tokens > config.topk_tokens
    reads = _index_reads(plan, layout, layers, start, middle)
    if is_reranked:
        # K by channels costs a cache line each: three eighths of them are ranked.
        rows = layout.key_layout is KeyLayout.TOKEN_MAJOR or layout.key_rows
        channels = layout.head_size if rows else max(1, layout.head_size * 3 // 8)
        count, ranked = min(config.candidate_tokens, middle), key_bytes(plan, layout, channels)
        reads.append(Read("sparse, K of candidates", True, layers, count, "tokens", ranked))
    count = min(config.topk_tokens, middle)
    selected = scattered + value
    reads.append(Read("sparse, K and V of selected", True, layers, count, "tokens", selected))
    edge = "sparse, K and V at both ends"
    reads.append(Read(edge, True, layers, edges, "tokens", 2 * value))
    by_head = config.query_reduce == "max"
    if middle and worker.num_heads > worker.num_kv_heads and (by_head or is_reranked):
        # What each head pays to sinks and newest tokens is found before others are.
        mass = "sparse, K there, for mass"
        reads.append(Read(mass, True, layers, edges, "tokens", value))
    return reads


def _index_reads(
    plan: Plan, layout: PageLayout, layers: int, start: int, middle: int
) -> list[Read]:
    groups, group = ceil(start / layout.group_size), layout.num_kv_heads * layout.record_bytes
    if layout.kind is DerivedKind.ONEBIT:
        return [Read("sparse, index", False, layers, groups, "groups", group)]
    sampled = ceil(groups / max(1, ceil(groups / SPREAD_GROUPS)))
    channels = plan.config.critical_channels
    if layout.key_layout is KeyLayout.CHANNEL_MAJOR:
        # Tokens of a channel lie side by side.
        token = layout.num_kv_heads * channels * layout.kv_itemsize
    else:
        token = key_bytes(plan, layout, channels, together=False)
    return [
        Read("sparse, extremes of channels", False, layers, sampled, "groups", group),
        Read("sparse, critical channels of K", True, layers, middle, "tokens", token),
    ]


def key_bytes(plan: Plan, layout: PageLayout, channels: int, *, together: bool = True) -> int:
    """Bytes that reading some channels of K of a single token costs, all KV heads.

    Args:
        together: whether the channels are consecutive ones.
    """
    row, sector = layout.head_size * layout.kv_itemsize, SECTOR_BYTES[plan.device]
    by_tokens = layout.key_layout is KeyLayout.TOKEN_MAJOR or layout.key_rows
    if not by_tokens:
        return layout.num_kv_heads * channels * sector
    used = channels * (layout.kv_itemsize if together else sector)
    return layout.num_kv_heads * min(row, used)
