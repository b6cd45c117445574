"""Pages, requests and calls of one Llama-3.1-8B attention layer on a GPU.

Host pages lie in pinned memory, derived pages on the device. Requests draw their blocks at
random from a pool far larger than the caches of the chip.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from vllm_tailorkv.cache.device_view import device_view
from vllm_tailorkv.cache.views import HostPages, derived_pages, host_pages
from vllm_tailorkv.kernels import cpu, dispatch, triton
from vllm_tailorkv.kernels.types import DerivedPages
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
BLOCK_SIZE = 128
GROUP_SIZES = {DerivedKind.ONEBIT: 128, DerivedKind.CHANNELS: 64, DerivedKind.DENSE: 64}
SINKS, RECENT, SELECTED, RESIDUAL, CHANNELS = 8, 56, 448, 128, 8
CANDIDATES = int(2.25 * SELECTED)
DTYPE = torch.bfloat16
SCALE = HEAD_SIZE**-0.5
ROW_BYTES = HEAD_SIZE * DTYPE.itemsize
FULL_BYTES = 2 * KV_HEADS * ROW_BYTES
"""K and V of a token in full precision."""


@dataclass(frozen=True)
class Op:
    """One op, and the name of what runs it."""

    name: str
    function: Callable[..., None]


def find_op(op: str, device: torch.device) -> Op:
    """What runs `op`: as dispatched on a GPU; the interpreter or C++ in a rehearsal."""
    if device.type == "cuda":
        choice = dispatch.choose(op, "cuda")
        if choice.name != "reference":
            return Op(choice.name, choice.function)
        # The reference asks the device for values, which no graph can capture.
        assert op == "select_topk"
        return Op("torch.topk", topk_by_torch)
    module: ModuleType = triton if hasattr(triton, op) else cpu
    if reason := module.unavailable():
        raise SystemExit(f"{op}: {reason}")
    return Op(module.__name__.rpartition(".")[2], getattr(module, op))


def topk_by_torch(
    indices: torch.Tensor, scores: torch.Tensor, tail_start: torch.Tensor, sink_tokens: int
) -> None:
    """`select_topk` where the CUDA op was not built: right but for ties, and slow."""
    at = torch.arange(scores.shape[2], device=scores.device)
    outside = (at < sink_tokens) | (at >= tail_start[:, None, None])
    best = scores.masked_fill(outside, -float("inf")).topk(indices.shape[2]).indices
    indices.copy_(best.sort().values)


@dataclass(frozen=True)
class Pool:
    """Pages that requests draw from."""

    host: HostPages
    host_on_cpu: HostPages
    derived: DerivedPages
    layout: PageLayout

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.host.key.shape[0]


@dataclass(frozen=True)
class HostBytes:
    """Host regions of a pool: the same bytes for host and device."""

    on_cpu: torch.Tensor
    on_device: torch.Tensor


def make_host_bytes(num_blocks: int, device: torch.device) -> HostBytes:
    """Normal K and V, with a mean for each channel as trained models have."""
    layout = make_layout(DerivedKind.ONEBIT, 1, KeyLayout.TOKEN_MAJOR)
    cuda = device.type == "cuda"
    shape = (num_blocks, layout.host_bytes)
    on_cpu = torch.empty(shape, dtype=torch.uint8, pin_memory=cuda)
    on_device = device_view(on_cpu) if cuda else on_cpu
    mean = 2 * torch.randn(KV_HEADS, 1, 1, HEAD_SIZE, device=device)
    for rows in on_cpu.split(1024):
        size = (len(rows), KV_HEADS, 2, BLOCK_SIZE, HEAD_SIZE)
        rows.view(DTYPE).copy_((torch.randn(size, device=device) + mean).to(DTYPE).flatten(1))
    return HostBytes(on_cpu, on_device)


def make_layout(kind: DerivedKind, bits: int, key_layout: KeyLayout) -> PageLayout:
    """The layout of a layer's pages."""
    return PageLayout(
        kind, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, GROUP_SIZES[kind], bits, DTYPE.itemsize, key_layout
    )


def make_pool(
    host: HostBytes,
    kind: DerivedKind,
    bits: int = 1,
    key_layout: KeyLayout = KeyLayout.TOKEN_MAJOR,
) -> Pool:
    """Derive the pages of a whole pool with `quantize_groups`."""
    layout = make_layout(kind, bits, key_layout)
    device = host.on_device.device
    num_blocks = len(host.on_device)
    raw = torch.full((num_blocks, layout.derived_bytes), 0xFF, dtype=torch.uint8, device=device)
    derived = derived_pages(raw, layout, DTYPE)
    pages = host_pages(host.on_device, layout, DTYPE)
    groups = torch.arange(num_blocks * layout.groups_per_block, device=device)
    quantize = find_op("quantize_groups", device).function
    for part in groups.split(16384):
        quantize(part, pages.key, pages.value, derived)
    return Pool(pages, host_pages(host.on_cpu, layout, DTYPE), derived, layout)


@dataclass
class Request:
    """A batch of rows with one query token each."""

    query: torch.Tensor
    output: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    tail_start: torch.Tensor
    coded: torch.Tensor
    mass: torch.Tensor
    scores: torch.Tensor
    candidates: torch.Tensor
    indices: torch.Tensor

    def arguments(self, pool: Pool) -> tuple[object, ...]:
        """The first ones of both decode attentions."""
        return (self.output, self.query, pool.host.key, pool.host.value)


def make_request(pool: Pool, context: int, batch: int) -> Request:
    """Random queries over random blocks; the output starts as NaN."""
    device = pool.host.key.device
    length = context - 17
    blocks = -(-length // BLOCK_SIZE)
    table = torch.stack(
        [
            torch.randperm(max(blocks, pool.num_blocks), device=device)[:blocks] % pool.num_blocks
            for _ in range(batch)
        ]
    ).int()
    query = torch.randn(batch, HEADS, HEAD_SIZE, device=device).to(DTYPE)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    size = pool.layout.group_size
    # As `attention.rows.tail_starts`, whose requirements a bare GPU machine lacks.
    tail = torch.minimum(lengths - RECENT, lengths // size * size)
    coded = (lengths - RESIDUAL).clamp(min=0) // size * size
    return Request(
        query,
        torch.full_like(query, float("nan")),
        table,
        lengths,
        tail,
        coded.int(),
        torch.full((batch, HEADS), float("nan"), device=device),
        torch.full((batch, KV_HEADS, context), float("nan"), device=device),
        torch.full((batch, KV_HEADS, CANDIDATES), -1, dtype=torch.int32, device=device),
        torch.full((batch, KV_HEADS, SELECTED), -1, dtype=torch.int32, device=device),
    )


def weigh(pool: Pool, request: Request) -> None:
    """`log_mass`."""
    find_op("log_mass", request.query.device).function(
        request.mass,
        request.query,
        pool.host.key,
        request.block_table,
        request.seq_lens,
        request.tail_start,
        SINKS,
        SCALE,
        0.0,
    )


def score(pool: Pool, request: Request) -> None:
    """`score_tokens` by every head, measured against what it pays to sinks and tail."""
    queries = request.query.float().unflatten(1, (KV_HEADS, -1)) * SCALE
    find_op("score_tokens", request.query.device).function(
        request.scores,
        queries,
        pool.derived,
        pool.host.key,
        request.block_table,
        request.tail_start,
        -request.mass.view(queries.shape[:3]),
        SINKS,
        CHANNELS,
    )


def select(request: Request) -> None:
    """`select_topk`."""
    function = find_op("select_topk", request.query.device).function
    function(request.candidates, request.scores, request.tail_start, SINKS)


def ranked_channels(pool: Pool) -> int:
    """Channels that `rerank` reads: as the backend does, fewer where each is a cache line."""
    return HEAD_SIZE if pool.layout.key_layout is KeyLayout.TOKEN_MAJOR else HEAD_SIZE * 3 // 8


def rerank(pool: Pool, request: Request) -> None:
    """`rerank_topk`."""
    find_op("rerank_topk", request.query.device).function(
        request.indices,
        request.candidates,
        request.query,
        pool.host.key,
        request.block_table,
        request.mass,
        ranked_channels(pool),
        SCALE,
        0.0,
    )


def attend_sparse(pool: Pool, request: Request) -> None:
    """`sparse_decode_attention`."""
    find_op("sparse_decode_attention", request.query.device).function(
        *request.arguments(pool),
        request.indices,
        request.block_table,
        request.seq_lens,
        request.tail_start,
        SINKS,
        SCALE,
        0.0,
    )


def run_sparse_layer(pool: Pool, request: Request) -> None:
    """All of a decode step's attention in a sparse layer."""
    weigh(pool, request)
    score(pool, request)
    select(request)
    rerank(pool, request)
    attend_sparse(pool, request)


def run_dense_layer(pool: Pool, request: Request) -> None:
    """All of a decode step's attention in a dense layer."""
    find_op("quantized_decode_attention", request.query.device).function(
        *request.arguments(pool),
        pool.derived,
        request.block_table,
        request.seq_lens,
        request.coded,
        SCALE,
        0.0,
    )
