"""Every op on shapes drawn at random, for each instruction set, against the reference.

The memory of each tensor ends with its last element, and what lies between its elements is no
one's: it holds NaN, nothing may be written there, and under sanitizers (`make sanitize`) every
access to it, or to what lies around the tensor, is a fault. `TAILORKV_EXAMPLES` says how many
shapes each op is tried with.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sanitize
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_tailorkv.kernels import ops, reference
from vllm_tailorkv.layout import DerivedKind, KeyLayout

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1.6e-2}
TABLES = 1.5e-2
"""Of scores of queries that are rounded to bytes."""
MOST_SINKS = 70

few_shapes = settings(
    max_examples=int(os.environ.get("TAILORKV_EXAMPLES", "4")),
    derandomize=True,
    # `build_context` holds nothing between examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Case:
    """What the ops are called with.

    Args:
        lengths: tokens of each row.
        per_head: query heads of a KV head.
        shift: elements in front of a tensor in its memory: most are aligned to nothing then.
        sinks, k: tokens kept at the start, and selected.
        logits: whether heads have sink logits.
        seed: of everything else.
    """

    lengths: list[int]
    heads: int
    per_head: int
    head_size: int
    block_size: int
    group_size: int
    bits: int
    dtype: torch.dtype
    key_layout: KeyLayout
    shift: int
    threads: int
    sinks: int
    k: int
    softcap: float
    logits: bool
    flag: bool
    seed: int

    @property
    def layout(self) -> dict[str, Any]:
        names = ("heads", "head_size", "block_size", "group_size", "bits", "dtype", "key_layout")
        return {name: getattr(self, name) for name in names}

    @property
    def scale(self) -> float:
        return self.head_size**-0.5


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size, group_size = draw(
        st.sampled_from(
            [
                *((32, 32), (64, 32), (64, 64), (96, 32), (96, 96), (128, 32), (128, 64)),
                *((128, 128), (256, 32), (256, 64), (256, 128), (256, 256)),
            ]
        )
    )
    # The simplest come first: rows of several blocks, so that most examples have work.
    edges = [2 * block_size, block_size, block_size + 1, group_size - 1, group_size, 1, 0]
    length = st.one_of(st.sampled_from(edges), st.integers(0, 2 * block_size + 40))
    rows = draw(st.sampled_from([2, 1, 3, 0]))
    return Case(
        lengths=draw(st.lists(length, min_size=rows, max_size=rows)),
        heads=draw(st.integers(1, 3)),
        per_head=draw(st.sampled_from([4, 1, 7, 2, 3, 8])),
        head_size=draw(st.sampled_from([72, 8, 64, 80, 96, 128, 256])),
        block_size=block_size,
        group_size=group_size,
        bits=draw(st.sampled_from([1, 2, 4])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        key_layout=draw(st.sampled_from(list(KeyLayout))),
        shift=draw(st.integers(0, 7)),
        threads=draw(st.integers(1, 3)),
        sinks=draw(st.integers(0, MOST_SINKS)),
        k=draw(st.integers(1, 300)),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        logits=draw(st.booleans()),
        flag=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


class Maker:
    """Makes the tensors of a case."""

    def __init__(self, case: Case) -> None:
        sanitize.note(case)
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)

    def tight(self, tensor: Any) -> Any:
        """A copy with the same strides; of each tensor where there are several."""
        if isinstance(tensor, tuple):
            parts = map(self.tight, tensor)
            return type(tensor)(*parts) if hasattr(tensor, "_fields") else tuple(parts)
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            return tensor
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        count = self.case.shift + 1 + sum((size - 1) * stride for size, stride in steps)
        place = tensor.shape, tensor.stride(), self.case.shift
        memory = torch.full((count * tensor.itemsize,), 0xFF, dtype=torch.uint8).view(tensor.dtype)
        memory.as_strided(*place).copy_(tensor)
        used = torch.zeros(count + 1, dtype=torch.int8)
        used.as_strided(*place).fill_(1)
        used[count] = 1
        changes = used.diff(prepend=used.new_ones(1)).nonzero().flatten().tolist()
        for begin, end in zip(changes[::2], changes[1::2], strict=True):
            address = memory.data_ptr() + begin * tensor.itemsize
            sanitize.poison(address, (end - begin) * tensor.itemsize)
        return memory.as_strided(*place)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def query(self) -> torch.Tensor:
        case = self.case
        shape = (len(case.lengths), case.heads * case.per_head, case.head_size)
        return self.tight(self.normal(*shape).to(case.dtype))

    def softmax(self) -> dict[str, Any]:
        """How scores become weights, as ops take it by name."""
        case = self.case
        logits = self.tight(4 * self.normal(case.heads * case.per_head)) if case.logits else None
        return {"scale": case.scale, "softcap": case.softcap, "sink_logits": logits}

    def nothing(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An output."""
        value = float("nan") if dtype.is_floating_point else 12345
        return self.tight(torch.full(shape, value, dtype=dtype))

    def between(self, low: int, high: torch.Tensor) -> torch.Tensor:
        """int32 [R], at most `high`, which it often is."""
        share = torch.rand(len(high), generator=self.generator) * 1.5
        return self.tight((low + (high - low) * share.clamp(max=1)).int().minimum(high))

    def some_of(self, lengths: torch.Tensor, count: int, first: int = 0) -> torch.Tensor:
        """int32 [R, Hk, count]: ascending positions from `first` on, then -1."""
        result = torch.full((len(lengths), self.case.heads, count), -1, dtype=torch.int32)
        for row, length in enumerate(lengths.tolist()):
            for head in range(self.case.heads):
                order = torch.randperm(max(0, length - first), generator=self.generator)
                chosen = first + order[:count].sort().values
                result[row, head, : len(chosen)] = chosen.int()
        return self.tight(result)


ISAS = ("avx512_gfni", "avx512", "avx2", "portable")
EXACT_ISAS = ("amx", "avx512_bf16", *ISAS)


@pytest.fixture
def each_isa() -> Iterator[Callable[..., Iterator[str]]]:
    """Makes a loop over the instruction sets of this processor, with the threads of a case."""
    before, first = torch.get_num_threads(), torch.ops.vllm_tailorkv.isa()

    def loop(case: Case, names: tuple[str, ...] = ISAS) -> Iterator[str]:
        torch.set_num_threads(case.threads)
        for name in names:
            try:
                torch.ops.vllm_tailorkv.set_isa(name)
            except RuntimeError:
                continue
            yield name

    yield loop
    torch.set_num_threads(before)
    torch.ops.vllm_tailorkv.set_isa(first)


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def same_memory(actual: Any, expected: Any) -> bool:
    """All bytes, those between the elements, too."""
    if isinstance(actual, tuple):
        return all(map(same_memory, actual, expected))
    return actual is None or torch.equal(memory_of(actual), memory_of(expected))


@few_shapes
@given(case=cases(), tokens=st.integers(0, 80), order=st.sampled_from(["run", "any", "skipped"]))
def test_write_kv(build_cache, each_isa, case, tokens, order):
    make = Maker(case)
    rows = case.flag and case.key_layout is KeyLayout.CHANNEL_MAJOR
    host = build_cache(num_blocks=3, key_rows=rows, **case.layout).host
    capacity = 3 * case.block_size
    slots = torch.randperm(capacity, generator=make.generator)
    if order == "run":
        slots = slots[0] + torch.arange(capacity)
        slots[slots >= capacity] = -1
    elif order == "skipped":
        slots[::3] = -1
    # vLLM's K and V are parts of one tensor, and its slots may be more.
    fused = make.normal(tokens, 3, case.heads, case.head_size).to(case.dtype)
    arguments = make.tight((fused[:, 1], fused[:, 2]))
    slots = make.tight(slots[: tokens + case.seed % 2])
    pages = (host.key, host.value, host.key_rows)
    expected = make.tight(pages)
    reference.write_kv(*arguments, *expected[:2], slots, expected[2])
    for isa in each_isa(case):
        actual = make.tight(pages)
        ops.write_kv(*arguments, *actual[:2], slots, actual[2])
        assert same_memory(actual, expected), isa


@few_shapes
@given(case=cases(), kind=st.sampled_from(list(DerivedKind)))
def test_quantize_groups(build_cache, build_context, each_isa, case, kind):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, kind=kind, **case.layout)
    pages = make.tight(context.cache.host[:2])
    per_block = case.block_size // case.group_size
    groups = [
        int(context.block_table[row, i // per_block]) * per_block + i % per_block
        for row, length in enumerate(case.lengths)
        for i in range(length // case.group_size)
    ]
    groups = make.tight(torch.tensor(groups, dtype=torch.int64))
    empty = build_cache(kind, num_blocks=len(pages[0]), **case.layout).derived
    expected = make.tight(empty)
    reference.quantize_groups(groups, *pages, expected, case.flag)
    for isa in each_isa(case):
        actual = make.tight(empty)
        ops.quantize_groups(groups, *pages, actual, case.flag)
        assert same_memory(tuple(actual), tuple(expected)), isa


@few_shapes
@given(case=cases())
def test_quantized_decode_attention(build_context, error_of, each_isa, case):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, **case.layout)
    coded = make.between(0, context.complete) // case.group_size * case.group_size
    query = make.query()
    rest = (
        query,
        *make.tight(context.cache.host[:2]),
        make.tight(context.cache.derived),
        make.tight(context.block_table),
        make.tight(context.seq_lens),
        make.tight(coded),
    )
    options = make.softmax()
    expected = torch.empty_like(query)
    reference.quantized_decode_attention(expected, *rest, **options)
    for isa in each_isa(case):
        output = make.nothing(*query.shape, dtype=case.dtype)
        ops.quantized_decode_attention(output, *rest, **options)
        assert error_of(output, expected) < TOLERANCE[case.dtype], isa


@few_shapes
@given(case=cases())
def test_log_mass(build_context, each_isa, case):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, **case.layout)
    query = make.query()
    rest = (
        query,
        make.tight(context.cache.host.key),
        make.tight(context.block_table),
        make.tight(context.seq_lens),
        make.between(0, context.seq_lens),
    )
    options = {"sink_tokens": case.sinks, **make.softmax()}
    expected = torch.empty(query.shape[:2])
    reference.log_mass(expected, *rest, **options)
    for _ in each_isa(case):
        mass = make.nothing(*query.shape[:2])
        ops.log_mass(mass, *rest, **options)
        torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-4)


@few_shapes
@given(case=cases(), kind=st.sampled_from([DerivedKind.ONEBIT, DerivedKind.CHANNELS]))
def test_score_select_and_propose(build_context, each_isa, case, kind):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, kind=kind, **case.layout)
    tail_start = make.between(0, context.complete)
    shape = (len(case.lengths), case.heads)
    query = make.tight(make.normal(*shape, case.per_head, case.head_size))
    rest = (
        query,
        make.tight(context.cache.derived),
        make.tight(context.cache.host.key),
        make.tight(context.block_table),
        tail_start,
    )
    options = {
        "offset": make.tight(make.normal(*query.shape[:3])),
        "sink_tokens": case.sinks,
        "critical_channels": 1 + case.seed % case.head_size,
    }
    most = max(tail_start.tolist(), default=0)
    # The caller's rows of scores may be longer.
    empty = torch.full((*shape, most + 16 * case.flag), float("nan"))[..., :most]
    expected = empty.clone()
    reference.score_tokens(expected, *rest, **options)
    limit = expected.nan_to_num().abs().amax().item() if expected.numel() else 0.0
    for isa in each_isa(case):
        scores = make.tight(empty)
        ops.score_tokens(scores, *rest, **options)
        tables = isa in ("avx512_gfni", "avx2") and kind is DerivedKind.ONEBIT
        found = torch.empty(*shape, case.k, dtype=torch.int32)
        for row, end in enumerate(tail_start.tolist()):
            middle = slice(case.sinks, max(case.sinks, end))
            error = (scores[row, :, middle] - expected[row, :, middle]).abs()
            assert (error <= limit * (TABLES if tables else 2e-5)).all(), isa
        reference.select_topk(found, scores, tail_start, case.sinks)
        selected = make.nothing(*found.shape, dtype=torch.int32)
        ops.select_topk(selected, scores, tail_start, sink_tokens=case.sinks)
        assert torch.equal(selected, found), isa
        proposed = make.nothing(*found.shape, dtype=torch.int32)
        ops.propose_topk(proposed, *rest, **options, max_tail_start=most)
        assert torch.equal(proposed, found), isa


@few_shapes
@given(case=cases(), longest=st.sampled_from([100, 3000, 20000]))
def test_select_topk(each_isa, case, longest):
    """Longer than a buffer, in parts."""
    make = Maker(case)
    lengths = torch.tensor([longest * length // 600 for length in case.lengths], dtype=torch.int32)
    most = max(lengths.tolist(), default=0)
    scores = make.normal(len(lengths), case.heads, most)
    # With ties, or rising: every score enters the buffer.
    scores = make.tight((scores * 3).round() if case.flag else scores.sort().values)
    expected = torch.empty(len(lengths), case.heads, case.k, dtype=torch.int32)
    reference.select_topk(expected, scores, lengths, case.sinks)
    for isa in each_isa(case):
        indices = make.nothing(*expected.shape, dtype=torch.int32)
        ops.select_topk(indices, scores, make.tight(lengths), sink_tokens=case.sinks)
        assert torch.equal(indices, expected), isa


@few_shapes
@given(case=cases(), count=st.integers(1, 400))
def test_rerank_topk(build_context, each_isa, case, count):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, **case.layout)
    query, candidates = make.query(), make.some_of(context.seq_lens, count)
    mass = make.normal(*query.shape[:2])
    rest = (
        candidates,
        query,
        make.tight(context.cache.host.key),
        make.tight(context.block_table),
        make.tight(torch.where(mass > 1, -torch.inf, mass)),
    )
    channels = case.head_size if case.flag else 1 + case.seed % case.head_size
    options = {"channels": channels, "scale": case.scale, "softcap": case.softcap}
    for isa in each_isa(case):
        indices = make.nothing(*candidates.shape[:2], case.k, dtype=torch.int32)
        ops.rerank_topk(indices, *rest, **options)
        for chosen, there in zip(indices.flatten(0, 1), candidates.flatten(0, 1), strict=True):
            kept = chosen[chosen >= 0].tolist()
            assert len(kept) == min(case.k, int((there >= 0).sum())), isa
            assert kept == sorted(set(kept) & set(there.tolist())), isa
            assert (chosen[len(kept) :] == -1).all(), isa


@few_shapes
@given(case=cases())
def test_sparse_decode_attention(build_context, error_of, each_isa, case):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, **case.layout)
    tail_start, query = make.between(0, context.seq_lens), make.query()
    rest = (
        query,
        *make.tight(context.cache.host[:2]),
        make.some_of(tail_start, case.k, case.sinks),
        make.tight(context.block_table),
        make.tight(context.seq_lens),
        tail_start,
    )
    options = {"sink_tokens": case.sinks, **make.softmax()}
    expected = torch.empty_like(query)
    reference.sparse_decode_attention(expected, *rest, **options)
    for isa in each_isa(case):
        output = make.nothing(*query.shape, dtype=case.dtype)
        ops.sparse_decode_attention(output, *rest, **options)
        assert error_of(output, expected) < TOLERANCE[case.dtype], isa


@few_shapes
@given(case=cases(), most=st.sampled_from([1, 40, 300]))
def test_exact_attention(build_context, error_of, each_isa, case, most):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, **case.layout)
    lengths = context.seq_lens
    lens = (torch.randint(0, most + 1, lengths.shape, generator=make.generator)).int()
    lens = torch.minimum(lens, lengths)
    starts = (lens.cumsum(0) - lens).int()
    fused = make.normal(int(lens.sum()), 2, case.heads * case.per_head, case.head_size)
    query = make.tight(fused.to(case.dtype))[:, 1]
    rest = (
        query,
        *make.tight(context.cache.host[:2]),
        make.tight(context.block_table),
        *map(make.tight, (starts, lens, lengths)),
    )
    options = make.softmax()
    expected = torch.empty(query.shape, dtype=case.dtype)
    reference.exact_attention(expected, *rest, **options)
    for isa in each_isa(case, EXACT_ISAS):
        output = make.nothing(*query.shape, dtype=case.dtype)
        ops.exact_attention(output, *rest, **options)
        assert error_of(output, expected) < TOLERANCE[case.dtype], isa


@few_shapes
@given(case=cases(), kind=st.sampled_from([DerivedKind.ONEBIT, DerivedKind.CHANNELS]))
def test_retrieve_attention(build_context, error_of, each_isa, case, kind):
    make = Maker(case)
    context = build_context(case.lengths, case.seed, kind=kind, **case.layout)
    tail_start, query = make.between(0, context.complete), make.query()
    key, value = make.tight(context.cache.host[:2])
    before = (query, make.tight(context.cache.derived), key, key)
    rows = (make.tight(context.block_table), make.tight(context.seq_lens), tail_start)
    softmax = make.softmax()
    options = softmax | {
        "sink_tokens": case.sinks,
        "critical_channels": 1 + case.seed % case.head_size,
        "candidates": case.k * (1 + case.seed % 3),
        "channels": case.head_size,
        "every_head": case.flag,
        "max_tail_start": max(tail_start.tolist(), default=0),
    }
    for isa in each_isa(case):
        indices = make.nothing(len(query), case.heads, case.k, dtype=torch.int32)
        ops.retrieve_topk(indices, *before, *rows, **options)
        expected = torch.empty_like(query)
        attended = (query, key, value, indices, *rows, case.sinks, *softmax.values())
        reference.sparse_decode_attention(expected, *attended)
        output = make.nothing(*query.shape, dtype=case.dtype)
        ops.retrieve_attention(output, *before, value, *rows, topk=case.k, **options)
        assert error_of(output, expected) < TOLERANCE[case.dtype], isa


@few_shapes
@given(case=cases(), length=st.integers(1, 300), queries=st.integers(1, 20))
def test_dense_preference(each_isa, case, length, queries):
    make = Maker(case)
    shape = (min(queries, length), case.heads * case.per_head, case.head_size)
    query = make.tight(make.normal(*shape).to(case.dtype))
    key = make.tight(make.normal(length, case.heads, case.head_size).to(case.dtype))
    options = {"alpha": (1 + case.k) / 301, **make.softmax()}
    expected = reference.dense_preference(query, key, **options)
    for isa in each_isa(case):
        actual = ops.dense_preference(query, key, **options)
        assert (actual - expected).abs().max() < 2e-5, isa
