"""Scoring and selecting at once finds what scoring, then selecting finds."""

import pytest
import torch

from vllm_tailorkv.kernels import composed, dispatch, ops, reference
from vllm_tailorkv.layout import DerivedKind

LENGTHS = [1, 70, 129, 1000, 400, 5000]
OPTIONS = {"sink_tokens": 8, "critical_channels": 8}

each_kind = pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])


def offset_of(query):
    """Something else for each query, as long as there are several."""
    return torch.arange(query.shape[2]).float().expand(query.shape[:3]).contiguous()


def propose(function, context, query, tail_start, k, sink_tokens=8):
    indices = torch.full((*query.shape[:2], k), 12345, dtype=torch.int32)
    pages = (context.cache.derived, context.cache.host.key, context.block_table)
    most = max(0, int(tail_start.max())) if len(tail_start) else 0
    function(indices, query, *pages, tail_start, offset_of(query), sink_tokens, 8, most)
    return indices


def in_two_steps(module, context, query, tail_start, k, sink_tokens=8):
    scores = torch.full((*query.shape[:2], max(1, int(tail_start.max()))), float("nan"))
    pages = (context.cache.derived, context.cache.host.key, context.block_table)
    module.score_tokens(scores, query, *pages, tail_start, offset_of(query), sink_tokens, 8)
    indices = torch.full((*query.shape[:2], k), 12345, dtype=torch.int32)
    module.select_topk(indices, scores, tail_start, sink_tokens)
    return indices


@each_kind
@pytest.mark.parametrize(("k", "sink_tokens"), [(1, 0), (128, 8), (600, 70), (5000, 8)])
@pytest.mark.parametrize(
    ("dtype", "heads", "queries", "head_size", "block_size", "group_size"),
    [
        (torch.bfloat16, 2, 1, 128, 128, 64),
        (torch.float32, 1, 7, 64, 128, 32),
        (torch.float16, 3, 4, 80, 64, 64),
        (torch.bfloat16, 8, 1, 96, 128, 128),
    ],
)
def test_equals_two_steps(
    cpu,
    build_context,
    kind,
    k,
    sink_tokens,
    dtype,
    heads,
    queries,
    head_size,
    block_size,
    group_size,
):
    context = build_context(
        LENGTHS,
        kind=kind,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        group_size=group_size,
        dtype=dtype,
    )
    tail_start = (context.complete - 5).clamp(min=0).int()
    query = torch.randn(len(LENGTHS), heads, queries, head_size)
    arguments = (context, query, tail_start, k, sink_tokens)
    expected = in_two_steps(cpu, *arguments)
    assert torch.equal(propose(cpu.propose_topk, *arguments), expected)


@each_kind
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("heads", [1, 4])
def test_parts_of_a_row_share_their_floor(cpu, build_context, threads, kind, count, heads):
    context = build_context([30000, 9000], kind=kind, heads=heads)
    query = torch.randn(2, heads, 1, 64)
    expected = in_two_steps(cpu, context, query, context.complete, 512)
    threads(count)
    for _ in range(5):
        found = propose(cpu.propose_topk, context, query, context.complete, 512)
        assert torch.equal(found, expected)


@each_kind
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-41, -1e-41, 3.0, -3.0])
def test_equal_scores_go_by_position(cpu, build_context, threads, kind, value):
    """Most tokens score the same, which is then the floor; the first of them are taken."""
    context = build_context([20000], kind=kind, heads=2, dtype=torch.float32)
    host, derived = context.cache.host, context.cache.derived
    host.key.fill_(0)
    host.key[..., 0] = value
    groups = torch.arange(context.cache.layout.groups_per_block)
    reference.quantize_groups(groups, host.key, host.key, derived)
    # All blocks are the same.
    context.cache.raw[1:] = context.cache.raw[0]
    query = torch.zeros(1, 2, 1, 64)
    query[..., 0] = 1.0
    threads(4)
    found = propose(cpu.propose_topk, context, query, context.complete, 300)
    assert torch.equal(found, torch.arange(8, 308, dtype=torch.int32).expand(1, 2, -1))


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(cpu, build_context, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows, heads = draw(1, 6), draw(1, 5)
    kind = (DerivedKind.ONEBIT, DerivedKind.CHANNELS)[seed % 2]
    lengths = [draw(1, 3000) for _ in range(rows)]
    context = build_context(lengths, seed, kind=kind, heads=heads)
    query = torch.randn(rows, heads, 1, 64, generator=generator)
    arguments = (context, query, context.complete, draw(1, 700), draw(0, 100))
    expected = in_two_steps(cpu, *arguments)
    assert torch.equal(propose(cpu.propose_topk, *arguments), expected)


@each_kind
def test_without_a_fused_op(monkeypatch, build_context, kind):
    """An implementation that has none does it in two steps."""
    context = build_context(LENGTHS, kind=kind)
    query = torch.randn(len(LENGTHS), 2, 1, 64)
    expected = in_two_steps(reference, context, query, context.complete, 100)
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "reference")
    dispatch.forget()
    indices = torch.empty(len(LENGTHS), 2, 100, dtype=torch.int32)
    pages = (context.cache.derived, context.cache.host.key, context.block_table)
    try:
        ops.propose_topk(
            indices,
            query,
            *pages,
            context.complete,
            offset=offset_of(query),
            max_tail_start=5000,
            **OPTIONS,
        )
    finally:
        monkeypatch.undo()
        dispatch.forget()
    assert torch.equal(indices, expected)


@each_kind
@pytest.mark.parametrize("fitting", [0, 1, 2, 5, 6, 7])
def test_rows_take_turns_where_scores_need_much_memory(
    cpu, monkeypatch, build_context, kind, fitting
):
    context = build_context(LENGTHS, kind=kind)
    query = torch.randn(len(LENGTHS), 2, 3, 64)
    expected = in_two_steps(cpu, context, query, context.complete, 100)
    row_bytes = 2 * int(context.complete.max()) * 4
    monkeypatch.setattr(composed, "SCORES_BYTES", fitting * row_bytes)
    turns, score = [], ops.score_tokens

    def score_some(scores, *arguments, **options):
        turns.append(len(scores))
        score(scores, *arguments, **options)

    monkeypatch.setattr(ops, "score_tokens", score_some)
    found = propose(composed.propose_topk, context, query, context.complete, 100)
    most = max(fitting, 1)
    assert turns == [min(most, len(LENGTHS) - i) for i in range(0, len(LENGTHS), most)]
    assert torch.equal(found, expected)


def test_nothing_asked_for(cpu, build_context):
    context = build_context([64], kind=DerivedKind.ONEBIT)
    none = torch.zeros(1, 2, 1, 64)
    assert propose(cpu.propose_topk, context, none, context.complete, 0).numel() == 0
    context.block_table = context.block_table[:0]
    found = propose(cpu.propose_topk, context, none[:0], torch.zeros(0).int(), 8)
    assert found.shape == (0, 2, 8)


def test_arguments(build_context):
    context = build_context([64], kind=DerivedKind.ONEBIT)
    indices, query = torch.zeros(1, 2, 8).int(), torch.zeros(1, 2, 1, 64)
    rest = (context.cache.derived, context.cache.host.key, context.block_table, context.complete)
    options = {"offset": offset_of(query), "max_tail_start": 64, **OPTIONS}
    with pytest.raises(RuntimeError, match="query"):
        ops.propose_topk(indices, query[..., :32], *rest, **options)
    with pytest.raises(RuntimeError, match="indices"):
        ops.propose_topk(indices.long(), query, *rest, **options)
    with pytest.raises(RuntimeError, match="indices"):
        ops.propose_topk(indices[:, :1], query, *rest, **options)
