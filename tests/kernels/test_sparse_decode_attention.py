"""Exact attention over the gathered tokens, and over nothing else."""

import pytest
import torch

from vllm_tailorkv.kernels import ops, reference, triton
from vllm_tailorkv.kernels.triton import attend
from vllm_tailorkv.layout import DerivedKind, KeyLayout

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LENGTHS = [1, 5, 60, 127, 129, 900]
SINKS = 8

CASES = [
    # dtype, layout, heads, G, head_size, block_size, k
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 4, 128, 128, 128),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 2, 4, 128, 128, 30),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 2, 1, 64, 128, 400),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 1, 8, 96, 64, 128),
    (torch.float16, KeyLayout.CHANNEL_MAJOR, 1, 7, 80, 64, 17),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 2, 3, 256, 128, 64),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 2, 2, 72, 128, 0),
]
# Two of four with a softcap, which changes scores one by one, whatever the shape.
CAPPED = [(*case, 5.0 * (i // 2 % 2)) for i, case in enumerate(CASES)]


def choose(tail_start: torch.Tensor, heads: int, k: int) -> torch.Tensor:
    """Random positions of the middle, some of them neighbours."""
    generator = torch.Generator().manual_seed(7)
    indices = torch.full((tail_start.shape[0], heads, k), -1, dtype=torch.int32)
    for row, end in enumerate(tail_start.tolist()):
        for head in range(heads):
            middle = torch.arange(SINKS, max(SINKS, end))
            kept = middle[torch.randperm(middle.numel(), generator=generator)[:k]]
            if k >= 30:
                kept = torch.cat([kept[: k // 2], middle[: k // 2]]).unique()
            kept = kept.sort().values[:k]
            indices[row, head, : kept.numel()] = kept.int()
    return indices


def run(function, context, query, indices, tail_start, softcap=0.0, sink_logits=None):
    output = torch.full_like(query, float("nan"))
    function(
        output,
        query,
        context.cache.host.key,
        context.cache.host.value,
        indices,
        context.block_table,
        context.seq_lens,
        tail_start,
        SINKS,
        query.shape[2] ** -0.5,
        softcap,
        sink_logits,
    )
    return output


@pytest.mark.parametrize(
    ("dtype", "key_layout", "heads", "per_head", "head_size", "block_size", "k", "softcap"), CAPPED
)
def test_equals_reference(
    fast,
    build_context,
    error_of,
    sinks_of,
    dtype,
    key_layout,
    heads,
    per_head,
    head_size,
    block_size,
    k,
    softcap,
):
    context = build_context(
        LENGTHS,
        kind=DerivedKind.ONEBIT,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        key_layout=key_layout,
    )
    lengths = context.seq_lens
    tail_start = (lengths - 56).clamp(min=SINKS).minimum(lengths).int()
    query = torch.randn(len(LENGTHS), heads * per_head, head_size).to(dtype)
    indices = choose(tail_start, heads, k)
    options = (indices, tail_start, softcap, sinks_of(heads * per_head))
    expected = run(reference.sparse_decode_attention, context, query, *options)
    actual = run(fast.sparse_decode_attention, context, query, *options)
    assert error_of(actual, expected) < TOLERANCE[dtype]


def test_merged_by_the_last_program_or_by_another_launch(
    monkeypatch, placed, build_context, sinks_of
):
    """Many programs share a row of a small batch: another launch merges what they left."""
    context = build_context([900, 0, 60], kind=DerivedKind.ONEBIT, dtype=torch.bfloat16)
    tail_start = torch.tensor([844, 0, 8], dtype=torch.int32)
    query, indices = torch.randn(3, 6, 64).to(torch.bfloat16), choose(tail_start, 2, 40)
    outputs = []
    for most in (0, 1000):
        monkeypatch.setattr(attend, "_MOST_MERGED", most)
        options = (indices, tail_start, 0.0, sinks_of(6))
        outputs.append(run(placed(triton).sparse_decode_attention, context, query, *options))
    assert torch.equal(*outputs)
    assert (outputs[0][1] == 0).all()
    assert not outputs[0].isnan().any()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_split_over_threads(cpu, build_context, error_of, sinks_of, threads, count):
    context = build_context([2000], kind=DerivedKind.CHANNELS, heads=1, dtype=torch.float32)
    tail_start = torch.tensor([1900], dtype=torch.int32)
    query, indices = torch.randn(1, 4, 64), choose(tail_start, 1, 700)
    options = (indices, tail_start, 0.0, sinks_of(4))
    expected = run(reference.sparse_decode_attention, context, query, *options)
    threads(count)
    actual = run(cpu.sparse_decode_attention, context, query, *options)
    assert error_of(actual, expected) < 1e-5


def test_everything_selected_is_attention(fast, build_context, error_of):
    context = build_context([300], dtype=torch.float32)
    query = torch.randn(1, 4, 64)
    tail_start = torch.tensor([250], dtype=torch.int32)
    indices = torch.arange(SINKS, 250, dtype=torch.int32).expand(1, 2, -1).contiguous()
    key, value = (
        page[context.block_table[0, :3].long()].transpose(0, 1).flatten(1, 2)[:, :300]
        for page in (context.cache.host.key, context.cache.host.value)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.unflatten(1, (2, 2))[0], key, value
    ).flatten(0, 1)[None]
    for implementation in (fast, reference):
        actual = run(implementation.sparse_decode_attention, context, query, indices, tail_start)
        assert error_of(actual, expected) < 1e-5


def test_padding_rows(fast, build_context, error_of, sinks_of):
    """Rows of length 0, as CUDA graphs pad batches with: 0, and no page is read."""
    context = build_context([300, 70], dtype=torch.float32)
    query = torch.randn(2, 4, 64)
    tail_start = torch.tensor([250, 0], dtype=torch.int32)
    indices = torch.full((2, 2, 20), -1, dtype=torch.int32)
    indices[0] = torch.arange(100, 120)
    options = (indices, tail_start, 0.0, sinks_of(4))
    expected = run(reference.sparse_decode_attention, context, query, *options)
    context.seq_lens[1] = 0
    actual = run(fast.sparse_decode_attention, context, query, *options)
    assert error_of(actual[0], expected[0]) < 1e-5
    assert not actual[1].any()


def test_no_rows(fast, build_context):
    context = build_context([64], kind=DerivedKind.ONEBIT)
    context.block_table, context.seq_lens = context.block_table[:0], context.seq_lens[:0]
    query = torch.zeros(0, 4, 64, dtype=torch.bfloat16)
    indices = torch.zeros(0, 2, 5, dtype=torch.int32)
    assert run(fast.sparse_decode_attention, context, query, indices, context.seq_lens).shape == (
        0,
        4,
        64,
    )


def test_arguments(build_context):
    context = build_context([64])
    query = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    pages = (context.cache.host.key, context.cache.host.value)
    rest = (context.block_table, context.seq_lens)
    indices = torch.zeros(1, 2, 5, dtype=torch.int32)
    options = {"sink_tokens": SINKS, "scale": 1.0}
    output = torch.empty_like(query)
    with pytest.raises(RuntimeError, match="indices"):
        ops.sparse_decode_attention(
            output, query, *pages, indices.long(), *rest, context.complete, **options
        )
    with pytest.raises(RuntimeError, match="indices"):
        ops.sparse_decode_attention(
            output, query, *pages, indices[:, :1].contiguous(), *rest, context.complete, **options
        )
    with pytest.raises(RuntimeError, match="tail_start"):
        ops.sparse_decode_attention(
            output, query, *pages, indices, *rest, context.complete.long(), **options
        )
