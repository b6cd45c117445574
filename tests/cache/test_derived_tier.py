"""The derived tier is a pure function of the host tier, whatever vLLM does with whole blocks.

A small model of vLLM's scheduler and block pool serves random requests: chunked prompts,
decode steps with drafts of which some are rejected, shared prefixes, preemption, blocks in any
order, memory full of garbage. The K and V of a token follow from the tokens up to it. The metadata
builder and `TailorKVImpl.forward` do each step, as in the engine. After it, the records of every
complete group of every live request must be those of the reference, made from scratch, and
placements must have given the same attention.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_tailorkv.attention.builder import TailorKVMetadataBuilder
from vllm_tailorkv.attention.impl import TailorKVImpl
from vllm_tailorkv.attention.metadata import TailorKVMetadata
from vllm_tailorkv.attention.spec import TailorKVSpec, layer_spec
from vllm_tailorkv.cache.views import HostPages, derived_pages, host_pages
from vllm_tailorkv.kernels import cpu, dispatch, reference
from vllm_tailorkv.kernels.types import DerivedPages
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout
from vllm_tailorkv.plan import make_plan
from vllm_tailorkv.profile import ModelShape

DTYPE = torch.bfloat16
HEADS, QUERY_HEADS = 2, 4
LAYER = "model.layers.0.self_attn.attn"


@pytest.fixture(scope="module", autouse=True)
def some_implementation() -> Iterator[None]:
    """The C++ ops, or the reference where there is no extension; tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if cpu.unavailable() and "VLLM_TAILORKV_KERNELS" not in os.environ:
            monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "reference")
        dispatch.forget()
        yield
    dispatch.forget()
    torch.set_num_threads(threads)


# ---- The model: K and V of a token depend on all tokens before it. ----


def hashes_after(previous: int, tokens: Sequence[int]) -> list[int]:
    """A hash for each token, of all tokens up to it."""
    hashes = []
    for token in tokens:
        previous = (previous * 1_000_003 + token + 1) % (2**61 - 1)
        hashes.append(previous)
    return hashes


def keys_and_values(hashes: Sequence[int], head_size: int) -> torch.Tensor:
    """K and V [n, 2, Hk, d] of tokens with these hashes; never zero, channels differ in range."""
    width = 2 * HEADS * head_size
    seeds = torch.tensor(hashes, dtype=torch.int64).remainder(2**31 - 1)
    channel = torch.arange(width)
    mixed = (seeds[:, None] * (2 * channel + 7) + channel * 40_503).remainder(65_521)
    x = (mixed.float() + 0.5) / 32_760 - 1
    x *= 0.25 + channel.remainder(5)
    return x.to(DTYPE).view(-1, 2, HEADS, head_size)


# ---- A model of vLLM's block pool and scheduler. ----


class Request:
    """Tokens (known by the hashes of all tokens up to them), and where their pages are."""

    def __init__(self, tokens: Sequence[int], generated: int, head_size: int) -> None:
        self.prompt_length = len(tokens)
        self.final_length = len(tokens) + generated
        self.hashes = [0]  # and one for each token
        self.kv = torch.empty(0, 2, HEADS, head_size, dtype=DTYPE)
        self.blocks: list[int] = []
        self.computed = 0
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.kv)

    def extend(self, tokens: Sequence[int]) -> None:
        hashes = hashes_after(self.hashes[-1], tokens)
        self.hashes += hashes
        self.kv = torch.cat([self.kv, keys_and_values(hashes, self.kv.shape[3])])

    def slots(self, start: int, end: int, block_size: int) -> list[int]:
        """Where the tokens of these positions lie."""
        return [
            self.blocks[position // block_size] * block_size + position % block_size
            for position in range(start, end)
        ]


@dataclass
class Work:
    """What a step does for one request: known tokens, then drafts that may prove wrong."""

    request: Request
    new: int
    drafts: list[int]

    @property
    def start(self) -> int:
        return self.request.computed

    @property
    def end(self) -> int:
        return self.start + self.new + len(self.drafts)

    def kv(self) -> torch.Tensor:
        known = self.request.kv[self.start : self.start + self.new]
        hashes = hashes_after(self.request.hashes[-1], self.drafts)
        return torch.cat([known, keys_and_values(hashes, known.shape[3])])


class BlockPool:
    """Blocks with reference counts; a freed block can be hit until it is given out again."""

    def __init__(self, num_blocks: int, rng: random.Random, *, caching: bool) -> None:
        self.rng, self.caching = rng, caching
        self.free = list(range(1, num_blocks))  # block 0 is the null block
        rng.shuffle(self.free)
        self.users = [0] * num_blocks
        self.by_hash: dict[int, int] = {}
        self.hash_of: dict[int, int] = {}

    def hit(self, block_hash: int) -> int | None:
        block = self.by_hash.get(block_hash)
        if block is None:
            return None
        if not self.users[block]:
            self.free.remove(block)
        self.users[block] += 1
        return block

    def allocate(self) -> int:
        block = self.free.pop(self.rng.randrange(len(self.free)))
        stale = self.hash_of.pop(block, None)
        if stale is not None and self.by_hash.get(stale) == block:
            del self.by_hash[stale]
        self.users[block] = 1
        return block

    def release(self, block: int) -> None:
        self.users[block] -= 1
        if not self.users[block]:
            self.free.append(block)

    def remember(self, block: int, block_hash: int) -> None:
        if self.caching and block not in self.hash_of:
            self.hash_of[block] = block_hash
            self.by_hash.setdefault(block_hash, block)


@dataclass
class Scheduler:
    """First come, first served; the newest is preempted when blocks run out."""

    pool: BlockPool
    block_size: int
    max_tokens: int
    max_drafts: int
    rng: random.Random
    waiting: list[Request]
    running: list[Request] = field(default_factory=list)
    preemptions: int = 0
    hits: int = 0
    accepted: int = 0

    def preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.let_go(request)
        self.waiting.insert(0, request)
        self.preemptions += 1

    def let_go(self, request: Request) -> None:
        for block in reversed(request.blocks):
            self.pool.release(block)
        request.blocks, request.computed = [], 0

    def find_hits(self, request: Request) -> None:
        """Whole blocks of an equal prefix; the last token is always computed."""
        for end in range(self.block_size, len(request), self.block_size):
            block = self.pool.hit(request.hashes[end])
            if block is None:
                return
            request.blocks.append(block)
            request.computed = end
            self.hits += 1

    def chunk(self, request: Request, budget: int) -> Work:
        """How much to compute now: a decode step has one token, a prompt any number."""
        missing = len(request) - request.computed
        if missing > 1 or not request.computed:
            most = min(missing, budget)
            new = most if self.rng.random() < 0.4 else self.rng.randint(1, most)
            return Work(request, new, [])
        count = self.rng.randint(0, min(self.max_drafts, budget - 1))
        return Work(request, 1, [self.rng.randrange(3) for _ in range(count)])

    def grow(self, work: Work) -> bool:
        """Give a request its blocks, if there are enough."""
        request = work.request
        count = -(-work.end // self.block_size) - len(request.blocks)
        if count > len(self.pool.free):
            return False
        request.blocks += [self.pool.allocate() for _ in range(count)]
        return True

    def schedule(self) -> list[Work]:
        """The next step."""
        step: list[Work] = []
        budget, before = self.max_tokens, self.preemptions
        for request in list(self.running):
            if request not in self.running or not budget:
                continue
            work = self.chunk(request, budget)
            while not self.grow(work):
                self.preempt(self.running[-1])
                if request not in self.running:
                    break
            else:
                step.append(work)
                budget -= work.end - work.start
                self.remember(work)
        while self.waiting and budget and self.preemptions == before:
            request = self.waiting[0]
            self.find_hits(request)
            work = self.chunk(request, budget)
            if not self.grow(work):
                self.let_go(request)
                break
            self.running.append(self.waiting.pop(0))
            step.append(work)
            budget -= work.end - work.start
            self.remember(work)
        return step

    def remember(self, work: Work) -> None:
        """Make whole blocks known: a later request of the same step may hit them already."""
        request = work.request
        for i in range((work.start + work.new) // self.block_size):
            self.pool.remember(request.blocks[i], request.hashes[(i + 1) * self.block_size])

    def sample(self, step: list[Work]) -> None:
        """Count what was computed, accept drafts up to the first wrong one, add a token."""
        for work in step:
            request = work.request
            request.computed += work.new
            if request.computed < len(request):
                continue
            for draft in [*work.drafts, None]:
                token = self.rng.randrange(3)
                request.extend([token])
                if token != draft:
                    break
                request.computed += 1
                self.accepted += 1

    def let_finished_go(self) -> None:
        for request in list(self.running):
            if len(request) >= request.final_length:
                self.running.remove(request)
                self.let_go(request)


# ---- Pages: two placements, two orders of K. ----


@dataclass
class Cache:
    """Raw bytes of the two tiers (one tensor if joint), and their views."""

    layout: PageLayout
    raw: list[torch.Tensor]
    impl: TailorKVImpl | None = None  # of what serves them; none for copies
    kept: Any = None  # what vLLM holds, and our views hang from
    host: HostPages = field(init=False)
    derived: DerivedPages = field(init=False)
    records: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        layout = self.layout
        host = self.raw[0][:, : layout.host_bytes]
        derived = self.raw[-1][:, -layout.derived_bytes :]
        self.host = host_pages(host, layout, DTYPE)
        self.derived = derived_pages(derived, layout, DTYPE)
        shape = (layout.num_kv_heads, layout.groups_per_block, layout.record_bytes)
        self.records = derived.view(-1, *shape).transpose(1, 2)

    def clone(self) -> "Cache":
        return Cache(self.layout, [raw.clone() for raw in self.raw])

    def records_of(self, groups: torch.Tensor) -> torch.Tensor:
        """The bytes of records, without padding: [n, Hk, used]."""
        used = sum(part.num_bytes for part in self.layout.fields.values())
        per_block = self.layout.groups_per_block
        return self.records[groups // per_block, groups % per_block, :, :used]


@dataclass
class Server:
    """The layer of each placement with each order of K, full of garbage, and their builder."""

    load: "Load"
    kind: DerivedKind
    num_blocks: int
    caches: list[Cache] = field(init=False)
    builder: TailorKVMetadataBuilder = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.load.seed)
        self.caches = []
        for placement in ("joint", "split"):
            config = self.config(placement)
            spec = layer_spec(
                FullAttentionSpec(
                    block_size=self.load.sizes[1],
                    num_kv_heads=HEADS,
                    head_size=self.load.head_size,
                    dtype=DTYPE,
                ),
                LAYER,
                config,
            )
            self.builder = TailorKVMetadataBuilder(spec, [LAYER], config, torch.device("cpu"))
            # The other order of K is a GPU's, whose pages hold K once.
            major = replace(spec.layout, key_layout=KeyLayout.TOKEN_MAJOR, key_rows=False)
            for layout in (spec.layout, major):
                self.caches.append(self.cache(replace(spec, layout=layout), config, generator))

    def config(self, placement: str) -> Any:
        """What of vLLM's configuration the layer and the builder read."""
        model = ModelShape("test", "LlamaForCausalLM", 1, HEADS, self.load.head_size)
        group_size, load = self.load.sizes[0], self.load
        options = {
            "profile": {"dense_layers": [0] if self.kind is DerivedKind.DENSE else []},
            "index": "channels" if self.kind is DerivedKind.CHANNELS else "onebit",
            "group_size": group_size,
            "index_group_size": group_size,
            "bits": load.bits,
            "fit_codes": load.fit_codes,
            "key_rows": load.key_rows,
            "placement": placement,
            # Short contexts too are served by the tailored ops.
            "full_attention_below": 0,
            **{"sink_tokens": 1, "recent_tokens": 3, "topk_tokens": 8, "residual_tokens": 20},
        }
        plan = make_plan(options, model)
        assert plan.config.exact_below == 12
        return SimpleNamespace(
            additional_config={"tailorkv_plan": plan.as_json()},
            compilation_config=SimpleNamespace(static_forward_context={}),
            model_config=SimpleNamespace(get_num_attention_heads=lambda _: QUERY_HEADS),
            parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1),
            speculative_config=None,
        )

    def cache(self, spec: TailorKVSpec, config: Any, generator: torch.Generator) -> Cache:
        layout = spec.layout
        with set_current_vllm_config(VllmConfig(additional_config=config.additional_config)):
            impl = TailorKVImpl(QUERY_HEADS, self.load.head_size, 0.1, HEADS)
        impl.spec = spec
        page = layout.derived_bytes + (0 if spec.split else layout.host_bytes)
        given = torch.empty(self.num_blocks, page, dtype=torch.uint8)
        kept = given.view(DTYPE).view(self.num_blocks, HEADS, spec.block_size, -1)
        impl.bind(LAYER, kept)
        assert impl.pages is not None
        raw = [given]
        if spec.split:
            storage = impl.pages.host.value.untyped_storage()
            pool = torch.empty(0, dtype=torch.uint8).set_(storage)
            raw.insert(0, pool.view(self.num_blocks, layout.host_bytes))
        for tensor in raw:
            tensor.random_(0, 256, generator=generator)
            tensor[::2] = 0xFF  # NaN in every dtype
        return Cache(layout, raw, impl, kept)


# ---- One step, by the implementation. ----


def metadata_of(
    step: list[Work], server: Server, rng: random.Random
) -> tuple[TailorKVMetadata, torch.Tensor]:
    """What the builder makes of a batch, and the slots of its tokens."""
    block_size = server.load.sizes[1]
    width = max(len(work.request.blocks) for work in step) + 1
    table = torch.tensor(
        [
            # vLLM leaves the blocks of earlier requests beyond a row's own.
            work.request.blocks
            + [rng.randrange(server.num_blocks)] * (width - len(work.request.blocks))
            for work in step
        ],
        dtype=torch.int32,
    )
    slots = [slot for work in step for slot in work.request.slots(work.start, work.end, block_size)]
    mapping = torch.tensor(slots + [-1] * rng.randrange(3), dtype=torch.int64)
    lengths = torch.tensor([work.end for work in step], dtype=torch.int32)
    counts = torch.tensor([work.end - work.start for work in step], dtype=torch.int32)
    starts = torch.zeros(len(step) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(step),
        num_actual_tokens=len(slots),
        max_query_len=int(counts.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=mapping,
        is_prefilling=torch.tensor([w.start < w.request.prompt_length for w in step]),
    )
    return server.builder.build(0, common), mapping[: len(slots)]


def run_step(
    step: list[Work], server: Server, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do a step in every cache: returns slots and groups."""
    metadata, slots = metadata_of(step, server, rng)
    key, value = torch.cat([work.kv() for work in step]).unbind(1)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    query = torch.randn(len(key), QUERY_HEADS, server.load.head_size, generator=generator)
    query = query.to(DTYPE)
    rows = metadata.decode
    attended = []
    for cache in server.caches:
        output = torch.full_like(query, torch.nan)
        layer: Any = None
        assert cache.impl is not None
        cache.impl.forward(layer, query, key, value, cache.kept, metadata, output)
        if rows is not None:
            attended.append(output[rows.tokens])
    for output, split in zip(attended[:2], attended[2:], strict=True):
        assert output.isfinite().all()
        assert torch.equal(output, split)
    return slots, metadata.groups


# ---- What must hold after a step. ----


def check_untouched(before: Cache, after: Cache, slots: torch.Tensor, groups: torch.Tensor) -> None:
    """Every byte but those of the slots and records written is what it was."""
    layout, restored = before.layout, after.clone()
    blocks, offsets = slots // layout.block_size, slots % layout.block_size
    for name in ("key", "value", "key_rows"):
        pages, old = getattr(restored.host, name), getattr(before.host, name)
        if pages is not None:
            pages[blocks, :, offsets] = old[blocks, :, offsets]
    per_block = layout.groups_per_block
    where = (groups // per_block, groups % per_block)
    restored.records[where] = before.records[where]
    for raw, old_raw in zip(restored.raw, before.raw, strict=True):
        assert torch.equal(raw, old_raw)


class Truth:
    """Records by the hash of their group's last token, made by the reference."""

    def __init__(self, layout: PageLayout, fit_codes: bool) -> None:
        self.layout, self.fit_codes = layout, fit_codes
        self.known: dict[int, torch.Tensor] = {}

    def records(self, ends: list[tuple[Request, int]]) -> torch.Tensor:
        """Records [n, Hk, used] of the groups that end before these positions."""
        return torch.stack([self._record(request, end) for request, end in ends])

    def _record(self, request: Request, end: int) -> torch.Tensor:
        name = request.hashes[end]
        if name not in self.known:
            layout = self.layout
            raw = torch.full((1, layout.host_bytes + layout.derived_bytes), 0xFF, dtype=torch.uint8)
            page = Cache(layout, [raw])
            size = layout.group_size
            key, value = request.kv[end - size : end].transpose(0, 2).unbind(1)
            page.host.key[0, :, :size] = key
            page.host.value[0, :, :size] = value
            group = torch.tensor([0])
            pages = (page.host.key, page.host.value, page.derived)
            reference.quantize_groups(group, *pages, self.fit_codes)
            self.known[name] = page.records_of(group)[0].clone()
        return self.known[name]


def complete_groups(
    live: list[Request], layout: PageLayout
) -> tuple[torch.Tensor, list[tuple[Request, int]]]:
    """The complete groups of requests: int64 [n], and the positions at which they end."""
    size = layout.group_size
    ends = [(r, end) for r in live for end in range(size, r.computed + 1, size)]
    last = [r.slots(end - 1, end, layout.block_size)[0] for r, end in ends]
    return torch.tensor(last, dtype=torch.int64) // size, ends


def check_live(live: list[Request], caches: list[Cache], truth: Truth) -> None:
    """Host pages hold every computed token; records of complete groups are the truth's."""
    if not live:
        return
    layout = caches[0].layout
    block_size = layout.block_size
    slots = torch.tensor(
        [slot for request in live for slot in request.slots(0, request.computed, block_size)]
    )
    where = (slots // block_size, slice(None), slots % block_size)
    key, value = torch.cat([request.kv[: request.computed] for request in live]).unbind(1)
    groups, ends = complete_groups(live, layout)
    for cache in caches:
        assert torch.equal(cache.host.key[where], key)
        assert torch.equal(cache.host.value[where], value)
        if cache.host.key_rows is not None:
            assert torch.equal(cache.host.key_rows[where], key)
        if ends:
            assert torch.equal(cache.records_of(groups), truth.records(ends))


def check_from_scratch(live: list[Request], cache: Cache, fit_codes: bool) -> None:
    """The same once more without the truth: from the host pages as they are."""
    groups, _ = complete_groups(live, cache.layout)
    fresh = cache.clone()
    fresh.records.fill_(0xAA)
    pages = (fresh.host.key, fresh.host.value, fresh.derived)
    reference.quantize_groups(groups, *pages, fit_codes)
    assert torch.equal(cache.records_of(groups), fresh.records_of(groups))


# ---- The property. ----


@dataclass(frozen=True)
class Load:
    """Requests, and the machine that serves them."""

    sizes: tuple[int, int]  # of a group, of a block
    head_size: int
    bits: int
    fit_codes: bool
    key_rows: bool
    num_requests: int
    spare_blocks: int  # beyond what the largest request needs
    max_tokens: int  # of a step
    max_drafts: int
    caching: bool
    seed: int


loads = st.builds(
    Load,
    sizes=st.sampled_from([(32, 64), (32, 32), (32, 96), (64, 64), (64, 128)]),
    head_size=st.sampled_from([32, 80]),
    bits=st.sampled_from([1, 2, 4]),
    fit_codes=st.booleans(),
    key_rows=st.booleans(),
    num_requests=st.sampled_from([5, 4, 3, 2]),
    spare_blocks=st.sampled_from([1, 3, 6, 0]),
    max_tokens=st.sampled_from([130, 17, 64, 512]),
    max_drafts=st.sampled_from([4, 0]),
    caching=st.sampled_from([True, True, True, False]),
    seed=st.integers(0, 2**32),
)


def make_requests(load: Load, rng: random.Random) -> list[Request]:
    """Prompts that begin alike for a while, most of them."""
    families = [[rng.randrange(1000) for _ in range(200)] for _ in range(2)]
    requests = []
    for _ in range(load.num_requests):
        shared = rng.choice([0, 100, 200, rng.randrange(200)])
        tokens = rng.choices(families, [3, 1])[0][:shared]
        tokens = tokens + [rng.randrange(1000) for _ in range(rng.randint(1, 70))]
        requests.append(Request(tokens, rng.randint(1, 60), load.head_size))
    return requests


def serve(load: Load, kind: DerivedKind) -> Scheduler:
    """Serve a load to its end, checking after every step."""
    rng = random.Random(load.seed)
    block_size = load.sizes[1]
    requests = make_requests(load, rng)
    longest = max(request.final_length for request in requests)
    num_blocks = 1 + -(-(longest + load.max_drafts) // block_size) + load.spare_blocks
    server = Server(load, kind, num_blocks)
    caches = server.caches
    truth = Truth(caches[0].layout, load.fit_codes)
    pool = BlockPool(num_blocks, rng, caching=load.caching)
    arriving = list(requests)
    scheduler = Scheduler(pool, block_size, load.max_tokens, load.max_drafts, rng, [])
    steps = 0
    while arriving or scheduler.waiting or scheduler.running:
        if arriving and (rng.random() < 0.5 or not (scheduler.waiting or scheduler.running)):
            scheduler.waiting.append(arriving.pop())
        step = scheduler.schedule()
        if not step:
            continue
        rng.shuffle(step)  # the rows of a batch come in any order
        check_bytes = steps % 5 == 0
        before = [cache.clone() for cache in caches] if check_bytes else []
        slots, groups = run_step(step, server, rng)
        for old, cache in zip(before, caches if check_bytes else [], strict=True):
            check_untouched(old, cache, slots, groups)
        scheduler.sample(step)
        check_live(scheduler.running, caches, truth)
        if steps % 8 == 0:
            check_from_scratch(scheduler.running, caches[steps // 8 % len(caches)], load.fit_codes)
        scheduler.let_finished_go()
        steps += 1
    assert sorted(pool.free) == list(range(1, num_blocks))
    return scheduler


@pytest.mark.parametrize("kind", list(DerivedKind), ids=lambda kind: kind.value)
@given(load=loads)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_records_are_a_pure_function_of_host_pages(kind: DerivedKind, load: Load) -> None:
    serve(load, kind)


def test_the_model_does_what_vllm_does() -> None:
    """Prefixes are hit, drafts accepted, requests preempted."""
    load = Load((32, 64), 32, 2, True, True, 5, 1, 512, 4, caching=True, seed=5)
    scheduler = serve(load, DerivedKind.ONEBIT)
    assert scheduler.hits > 0
    assert scheduler.accepted > 0
    assert scheduler.preemptions > 0
