"""Scores of the middle, with both indexes; what is outside the middle is not asked for."""

import pytest
import torch

from vllm_tailorkv.kernels import cpu as cpu_module
from vllm_tailorkv.kernels import ops, reference
from vllm_tailorkv.layout import DerivedKind, KeyLayout

LENGTHS = [1, 70, 129, 1000, 400]


def tolerance(implementation, kind):
    """Of the largest magnitude of all rows; looser where queries are rounded to bytes, or sums come
    from products with two bf16 parts of the query."""
    if kind is DerivedKind.CHANNELS:
        return 1e-5
    if implementation is not cpu_module:
        return 1e-4
    return 1.5e-2 if torch.ops.vllm_tailorkv.isa() in ("avx512_gfni", "avx2") else 1e-5


CASES = [
    # dtype, layout, heads, Q, head_size, block_size, group_size
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 1, 128, 128, 64),
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 4, 128, 128, 64),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 1, 7, 64, 128, 32),
    (torch.float16, KeyLayout.CHANNEL_MAJOR, 1, 1, 80, 64, 64),
    (torch.float16, KeyLayout.TOKEN_MAJOR, 2, 3, 96, 128, 128),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 1, 8, 256, 128, 128),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 1, 2, 72, 128, 32),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 1, 33, 64, 128, 64),
]


def run(function, context, query, tail_start, sink_tokens, size, critical=8, offset=None):
    rows, heads = query.shape[:2]
    offset = torch.zeros(query.shape[:3]) if offset is None else offset
    # Rows of the buffer are longer than needed, as the caller's are.
    scores = torch.full((rows, heads, size + 16), float("nan"))[..., :size]
    function(
        scores,
        query,
        context.cache.derived,
        context.cache.host.key,
        context.block_table,
        tail_start,
        offset,
        sink_tokens,
        critical,
    )
    return scores


@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
@pytest.mark.parametrize("sink_tokens", [0, 8, 70])
@pytest.mark.parametrize(
    ("dtype", "key_layout", "heads", "queries", "head_size", "block_size", "group_size"), CASES
)
def test_equals_reference(
    fast,
    build_context,
    kind,
    sink_tokens,
    dtype,
    key_layout,
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
        key_layout=key_layout,
    )
    # A middle may end inside a group, as long as the group is complete.
    tail_start = (context.complete - 5).clamp(min=0).int()
    query = torch.randn(len(LENGTHS), heads, queries, head_size)
    size = int(tail_start.max())
    # As far apart as the scores themselves: which query is the best depends on both.
    offset = torch.randn(query.shape[:3]) * head_size**0.5
    arguments = (context, query, tail_start, sink_tokens, size, 8, offset)
    expected = run(reference.score_tokens, *arguments)
    actual = run(fast.score_tokens, *arguments)
    limit = tolerance(fast, kind) * expected.nan_to_num().abs().amax()
    for row, end in enumerate(tail_start.tolist()):
        middle = slice(sink_tokens, max(sink_tokens, end))
        error = (actual[row, :, middle] - expected[row, :, middle]).abs()
        assert (error <= limit).all()


@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
@pytest.mark.parametrize("count", [1, 7])
def test_split_over_threads(cpu, build_context, error_of, threads, kind, count):
    context = build_context([5000], kind=kind, heads=1, dtype=torch.float32)
    arguments = (context, torch.randn(1, 1, 1, 64), context.complete, 8, 4992)
    expected = run(reference.score_tokens, *arguments)
    threads(count)
    actual = run(cpu.score_tokens, *arguments)
    assert error_of(actual[..., 8:], expected[..., 8:]) < tolerance(cpu, kind)


def test_ties_between_channels(fast, build_context, error_of):
    context = build_context([256], kind=DerivedKind.CHANNELS, dtype=torch.float32)
    context.cache.derived.extremes[..., 0, :] = -1.0
    context.cache.derived.extremes[..., 1, :] = 1.0
    arguments = (context, torch.ones(1, 2, 1, 64), context.complete, 8, 256, 3)
    expected = run(reference.score_tokens, *arguments)
    actual = run(fast.score_tokens, *arguments)
    assert error_of(actual[..., 8:], expected[..., 8:]) < 1e-5


def test_constant_channels_tell_nothing(fast, build_context, error_of):
    context = build_context([500], kind=DerivedKind.CHANNELS, dtype=torch.float32)
    key = context.cache.host.key
    key[..., 11] = 100.0
    groups = torch.arange(len(key) * context.cache.layout.groups_per_block)
    reference.quantize_groups(groups, key, context.cache.host.value, context.cache.derived)
    # All but one channel of the query are alike, so that the spread of K alone decides.
    query = torch.ones(1, 2, 1, 64)
    arguments = (context, query, context.complete, 8, 448, 63)
    scores = run(fast.score_tokens, *arguments)
    assert error_of(scores[..., 8:], run(reference.score_tokens, *arguments)[..., 8:]) < 1e-5
    # The constant channel is the one left out: with it scores would be near 100.
    assert scores[..., 8:].abs().amax() < 60


def test_spread_is_sampled(fast, build_context, error_of):
    """Of more than 256 groups every second one tells the spread."""
    length = 32 * 300
    context = build_context(
        [length], kind=DerivedKind.CHANNELS, heads=1, group_size=32, dtype=torch.float32
    )
    extremes = context.cache.derived.extremes
    extremes[..., 0, :] = 0.0
    extremes[..., 1, :] = torch.arange(64.0)
    per_block = context.cache.layout.groups_per_block
    for group in range(1, 300, 2):
        block = int(context.block_table[0, group // per_block])
        extremes[block, :, group % per_block, 1] = torch.arange(64.0).flip(0) * 1000
    arguments = (context, torch.ones(1, 1, 1, 64), context.complete, 8, length, 2)
    actual = run(fast.score_tokens, *arguments)[..., 8:]
    assert error_of(actual, run(reference.score_tokens, *arguments)[..., 8:]) < 1e-5
    key = context.cache.host.key
    blocks = context.block_table[0, : -(-length // key.shape[2])].long()
    rows = key[blocks, 0].flatten(0, 1)[8:length]
    assert error_of(actual[0, 0], rows[:, 62:].sum(1)) < 1e-5


def test_reference_with_all_channels_is_exact(build_context, error_of):
    context = build_context([200], kind=DerivedKind.CHANNELS, dtype=torch.float32)
    query = torch.randn(1, 2, 3, 64)
    scores = run(reference.score_tokens, context, query, context.complete, 8, 192, 64)
    for token in range(8, 192):
        block = int(context.block_table[0, token // 128])
        key = context.cache.host.key[block, :, token % 128]
        expected = torch.einsum("hqd,hd->hq", query[0], key).amax(1)
        assert error_of(scores[0, :, token], expected) < 1e-5


def test_no_rows(fast, build_context):
    context = build_context([64], kind=DerivedKind.ONEBIT)
    context.block_table = context.block_table[:0]
    scores = run(fast.score_tokens, context, torch.zeros(0, 2, 1, 64), torch.zeros(0).int(), 8, 64)
    assert scores.shape == (0, 2, 64)


def test_arguments(build_context):
    context = build_context([64], kind=DerivedKind.ONEBIT)
    scores, query = torch.zeros(1, 2, 64), torch.zeros(1, 2, 1, 64)
    rest = (context.block_table, context.complete)
    pages = (context.cache.derived, context.cache.host.key)
    options = {"offset": torch.zeros(1, 2, 1), "sink_tokens": 8, "critical_channels": 8}
    with pytest.raises(RuntimeError, match="query"):
        ops.score_tokens(scores, query[..., :32], *pages, *rest, **options)
    with pytest.raises(RuntimeError, match="float32"):
        ops.score_tokens(scores.half(), query, *pages, *rest, **options)
    with pytest.raises(RuntimeError, match="tail_start"):
        ops.score_tokens(scores, query, *pages, rest[0], rest[1].long(), **options)
    with pytest.raises(RuntimeError, match="offset"):
        wrong = options | {"offset": torch.zeros(1, 2)}
        ops.score_tokens(scores, query, *pages, *rest, **wrong)
    dense = build_context([64], bits=2)
    with pytest.raises(RuntimeError, match="three tensors"):
        ops.score_tokens(scores, query, dense.cache.derived, pages[1], *rest, **options)
