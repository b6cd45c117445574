"""Attention over codes and exact rows, against the reference and against plain maths."""

import pytest
import torch

from vllm_tailorkv.kernels import cpu as cpu_module
from vllm_tailorkv.kernels import ops, reference
from vllm_tailorkv.layout import KeyLayout

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TWO_PARTS = 5e-4
"""Of products that GPUs make with two bf16 parts of each float; the interpreter cuts the second
part where a GPU rounds it, and a mean of random V is small beside what it is the sum of."""
LENGTHS = [1, 127, 128, 129, 700, 64]

CASES = [
    # dtype, layout, heads, G, head_size, block_size, group_size, bits
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 4, 128, 128, 64, 1),
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 4, 128, 128, 64, 2),
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 1, 8, 256, 128, 64, 2),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 2, 1, 64, 128, 64, 1),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 2, 1, 64, 128, 32, 4),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 1, 8, 96, 128, 128, 1),
    (torch.float16, KeyLayout.CHANNEL_MAJOR, 1, 7, 80, 64, 64, 2),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 2, 3, 256, 128, 64, 4),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 2, 2, 72, 128, 64, 1),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 2, 2, 72, 128, 64, 4),
]
# Two of four with a softcap, which changes scores one by one, whatever the shape.
CAPPED = [(*case, 5.0 * (i // 2 % 2)) for i, case in enumerate(CASES)]


def run(function, context, query, tail_start, softcap=0.0, sink_logits=None):
    output = torch.full_like(query, float("nan"))
    function(
        output,
        query,
        context.cache.host.key,
        context.cache.host.value,
        context.cache.derived,
        context.block_table,
        context.seq_lens,
        tail_start,
        query.shape[2] ** -0.5,
        softcap,
        sink_logits,
    )
    return output


@pytest.mark.interpreted
@pytest.mark.parametrize(
    (
        *("dtype", "key_layout", "heads", "per_head", "head_size", "block_size", "group_size"),
        *("bits", "softcap"),
    ),
    CAPPED,
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
    group_size,
    bits,
    softcap,
):
    context = build_context(
        LENGTHS,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        group_size=group_size,
        bits=bits,
        dtype=dtype,
        key_layout=key_layout,
    )
    query = torch.randn(len(LENGTHS), heads * per_head, head_size).to(dtype)
    residual = (context.seq_lens - 128).clamp(min=0) // group_size * group_size
    for tail_start in (context.complete, residual.int(), torch.zeros_like(residual)):
        options = (tail_start, softcap, sinks_of(heads * per_head))
        expected = run(reference.quantized_decode_attention, context, query, *options)
        actual = run(fast.quantized_decode_attention, context, query, *options)
        limit = TOLERANCE[dtype] if fast is cpu_module else max(TWO_PARTS, TOLERANCE[dtype])
        assert error_of(actual, expected) < limit


@pytest.mark.parametrize("count", [1, 2, 7])
def test_split_over_threads(cpu, build_context, error_of, sinks_of, threads, count):
    context = build_context([3000], heads=1, head_size=64, bits=2, dtype=torch.float32)
    query = torch.randn(1, 4, 64)
    options = (context.complete, 0.0, sinks_of(4))
    expected = run(reference.quantized_decode_attention, context, query, *options)
    threads(count)
    actual = run(cpu.quantized_decode_attention, context, query, *options)
    assert error_of(actual, expected) < 1e-5


def test_reference_without_codes_is_attention(build_context, error_of):
    context = build_context([200], dtype=torch.float32)
    query = torch.randn(1, 4, 64)
    actual = run(reference.quantized_decode_attention, context, query, torch.zeros(1).int())
    key, value = (
        page[context.block_table[0, :2].long()].transpose(0, 1).flatten(1, 2)[:, :200]
        for page in (context.cache.host.key, context.cache.host.value)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.unflatten(1, (2, 2))[0], key, value
    )
    assert error_of(actual, expected.flatten(0, 1)[None]) < 1e-5


def test_padding_rows(fast, build_context, error_of, sinks_of):
    """Rows of length 0, as CUDA graphs pad batches with: 0, and no page is read."""
    context = build_context([300, 70], dtype=torch.float32)
    query = torch.randn(2, 4, 64)
    coded = torch.tensor([192, 0], dtype=torch.int32)
    options = (coded, 0.0, sinks_of(4))
    expected = run(reference.quantized_decode_attention, context, query, *options)
    context.seq_lens[1] = 0
    actual = run(fast.quantized_decode_attention, context, query, *options)
    assert error_of(actual[0], expected[0]) < TWO_PARTS
    assert not actual[1].any()


def test_no_rows(fast, build_context):
    context = build_context([64])
    context.block_table, context.seq_lens = context.block_table[:0], context.seq_lens[:0]
    output = run(
        fast.quantized_decode_attention,
        context,
        torch.zeros(0, 4, 64, dtype=torch.bfloat16),
        context.seq_lens,
    )
    assert output.shape == (0, 4, 64)


def test_arguments(build_context):
    context = build_context([64])
    query = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    cache = context.cache
    arguments = [
        torch.empty_like(query),
        query,
        cache.host.key,
        cache.host.value,
        cache.derived,
        context.block_table,
        context.seq_lens,
        context.complete,
    ]
    for position, wrong, message in (
        (0, query[:, :2], "output"),
        (1, query[:, :3], "3 heads for 2 KV heads"),
        (1, query.float(), "query must be bfloat16, is float32"),
        (5, context.block_table.long(), "block_table"),
        (6, context.seq_lens.long(), "seq_lens"),
        (7, context.complete.repeat(2), "tail_start"),
    ):
        changed = list(arguments)
        changed[position] = wrong
        with pytest.raises(RuntimeError, match=message):
            ops.quantized_decode_attention(*changed, scale=1.0)
