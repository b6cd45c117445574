"""Causal attention to all of a context, whatever the chunk."""

import itertools

import pytest
import torch

from vllm_tailorkv.kernels import reference
from vllm_tailorkv.layout import DerivedKind, KeyLayout

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LENGTHS = [1, 5, 60, 127, 129, 900]
QUERIES = [1, 5, 0, 100, 1, 37]

CASES = [
    # dtype, layout, heads, G, head_size, block_size
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 2, 4, 128, 128),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 1, 7, 64, 32),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 1, 8, 80, 64),
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 1, 96, 96),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 1, 3, 256, 128),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 1, 17, 72, 64),
    (torch.float16, KeyLayout.TOKEN_MAJOR, 1, 7, 80, 64),
    (torch.float16, KeyLayout.CHANNEL_MAJOR, 2, 4, 128, 128),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 2, 3, 64, 128),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 1, 8, 96, 64),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 1, 1, 72, 32),
]


def starts_of(query_lens: torch.Tensor) -> torch.Tensor:
    return (query_lens.cumsum(0) - query_lens).int()


def run(function, context, query, query_lens, seq_lens, softcap=0.0, sink_logits=None):
    output = torch.full(query.shape, float("nan"), dtype=query.dtype)
    function(
        output,
        query,
        context.cache.host.key,
        context.cache.host.value,
        context.block_table,
        starts_of(query_lens),
        query_lens,
        seq_lens,
        query.shape[2] ** -0.5,
        softcap,
        sink_logits,
    )
    return output


def queries(context, group, tokens, seed=3):
    layout = context.cache.layout
    shape = (tokens, layout.num_kv_heads * group, layout.head_size)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2).to(context.cache.host.key.dtype)


def build(build_context, lengths, dtype, key_layout, heads, head_size, block_size):
    return build_context(
        lengths,
        kind=DerivedKind.ONEBIT,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        group_size=32,
        dtype=dtype,
        key_layout=key_layout,
    )


@pytest.mark.parametrize(
    ("dtype", "key_layout", "heads", "group", "head_size", "block_size"), CASES
)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_equals_reference(
    exact_cpu,
    build_context,
    error_of,
    sinks_of,
    dtype,
    key_layout,
    heads,
    group,
    head_size,
    block_size,
    softcap,
):
    context = build(build_context, LENGTHS, dtype, key_layout, heads, head_size, block_size)
    query_lens = torch.tensor(QUERIES, dtype=torch.int32)
    query = queries(context, group, sum(QUERIES))

    options = (query_lens, context.seq_lens, softcap, sinks_of(heads * group))
    expected = run(reference.exact_attention, context, query, *options)
    actual = run(exact_cpu.exact_attention, context, query, *options)

    assert error_of(actual, expected) < TOLERANCE[dtype]


LONG = [5000, 2047, 2049, 4096]
"""Beyond a segment, at its edges, and in the last case a whole number of them."""


@pytest.mark.parametrize("threads_used", [1, 8])
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [40, 3, 200, 1]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_contexts(
    exact_cpu, build_context, error_of, sinks_of, threads, dtype, query_lens, threads_used
):
    context = build(build_context, LONG, dtype, KeyLayout.TOKEN_MAJOR, 1, 64, 128)
    query_lens = torch.tensor(query_lens, dtype=torch.int32)
    query = queries(context, 2, int(query_lens.sum()))
    threads(threads_used)

    options = (query_lens, context.seq_lens, 0.0, sinks_of(2))
    expected = run(reference.exact_attention, context, query, *options)
    actual = run(exact_cpu.exact_attention, context, query, *options)

    assert error_of(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("key_layout", list(KeyLayout))
def test_chunks_change_no_bit(exact_cpu, build_context, sinks_of, threads, dtype, key_layout):
    """Whatever the chunks, the rest of the batch, and the threads."""
    length = 4500
    context = build(build_context, [length, 70], dtype, key_layout, 1, 64, 64)
    query = queries(context, 3, 300)
    whole = run(
        exact_cpu.exact_attention,
        context,
        query,
        torch.tensor([300, 0], dtype=torch.int32),
        context.seq_lens,
        sink_logits=sinks_of(3),
    )

    before = length - 300
    for threads_used, cuts in ((1, (0, 1, 130, 300)), (8, (0, 64, 299, 300))):
        threads(threads_used)
        for start, end in itertools.pairwise(cuts):
            mixed = torch.cat([query[start:end], queries(context, 3, 5, seed=end)])
            result = run(
                exact_cpu.exact_attention,
                context,
                mixed,
                torch.tensor([end - start, 5], dtype=torch.int32),
                torch.tensor([before + end, 70], dtype=torch.int32),
                sink_logits=sinks_of(3),
            )
            assert torch.equal(result[:-5], whole[start:end])


def test_tokens_of_no_row_are_left(exact_cpu, build_context):
    """Rows may lie anywhere in the batch, their queries and outputs anywhere in memory."""
    context = build(build_context, [100, 9], torch.bfloat16, KeyLayout.TOKEN_MAJOR, 2, 64, 64)
    host, lens = context.cache.host, torch.tensor([2, 3], dtype=torch.int32)
    query = queries(context, 2, 8)
    expected = run(reference.exact_attention, context, query[:5], lens, context.seq_lens)
    spread = torch.full((8, 4, 3 * 64), float("nan"), dtype=torch.bfloat16)[..., 64:128]
    output = torch.full((8, 4, 2 * 64), float("nan"), dtype=torch.bfloat16)[..., :64]
    starts = torch.tensor([6, 1], dtype=torch.int32)
    spread[6:8], spread[1:4] = query[:2], query[2:5]

    exact_cpu.exact_attention(
        output,
        spread,
        host.key,
        host.value,
        context.block_table,
        starts,
        lens,
        context.seq_lens,
        64**-0.5,
        0.0,
    )

    both = torch.cat([output[6:8], output[1:4]])
    torch.testing.assert_close(both, expected, rtol=0.05, atol=0.02)
    assert output[[0, 4, 5]].isnan().all()


def test_large_scores(exact_cpu, build_context, error_of):
    """Scores of thousands, of either sign, whose largest may come first or last."""
    context = build(build_context, [400, 400], torch.float32, KeyLayout.TOKEN_MAJOR, 1, 64, 64)
    host, lens = context.cache.host, torch.tensor([4, 4], dtype=torch.int32)
    query = queries(context, 1, 8) * 500
    expected = run(reference.exact_attention, context, query, lens, context.seq_lens)
    assert host.key.dtype == torch.float32

    actual = run(exact_cpu.exact_attention, context, query, lens, context.seq_lens)

    assert error_of(actual, expected) < 1e-4


def test_nothing_to_do(exact_cpu, build_context):
    context = build(build_context, [0, 5], torch.bfloat16, KeyLayout.TOKEN_MAJOR, 1, 64, 64)
    none = torch.zeros(2, dtype=torch.int32)
    run(exact_cpu.exact_attention, context, queries(context, 1, 0), none, context.seq_lens)
    assert (
        run(exact_cpu.exact_attention, context, queries(context, 1, 2), none, context.seq_lens)
        .isnan()
        .all()
    )
