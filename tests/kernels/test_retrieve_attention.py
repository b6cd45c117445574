"""A sparse layer's step in one call is finding tokens and attending to them in two."""

import pytest
import torch

from vllm_tailorkv.kernels import composed, ops, reference
from vllm_tailorkv.layout import DerivedKind

LENGTHS = [450, 1, 500, 0, 406, 500, 320]
"""Enough for one or two threads that none shares a row and KV head with another, not for three."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1.6e-2}


def arguments_of(
    context, query, k, candidates, every_head, channels, softcap=0.0, sink_logits=None
):
    """Everything but the output, by position."""
    host, tail = context.cache.host, context.complete
    return (
        query,
        context.cache.derived,
        host.key,
        host.gathered_key,
        host.value,
        context.block_table,
        context.seq_lens,
        tail,
        8,
        8,
        k,
        candidates,
        channels,
        every_head,
        0.2,
        softcap,
        int(tail.max()),
        sink_logits,
    )


def attended(function, arguments):
    output = torch.full_like(arguments[0], float("nan"))
    function(output, *arguments)
    return output


@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
@pytest.mark.parametrize(("k", "candidates"), [(40, 40), (40, 90), (300, 400), (0, 9)])
@pytest.mark.parametrize(
    ("dtype", "heads", "group", "head_size", "key_rows", "softcap"),
    [
        (torch.bfloat16, 2, 4, 128, True, 0.0),
        (torch.float16, 1, 7, 80, False, 20.0),
        (torch.float32, 3, 1, 64, True, 0.0),
        (torch.bfloat16, 1, 8, 256, False, 0.0),
    ],
)
def test_equals_its_steps(
    cpu,
    build_context,
    threads,
    error_of,
    sinks_of,
    kind,
    k,
    candidates,
    dtype,
    heads,
    group,
    head_size,
    key_rows,
    softcap,
):
    context = build_context(
        LENGTHS, kind=kind, heads=heads, head_size=head_size, dtype=dtype, key_rows=key_rows
    )
    query = torch.randn(len(LENGTHS), heads * group, head_size).to(dtype)
    channels = head_size if key_rows else head_size * 3 // 8
    for every_head, count in ((True, 1), (True, 2), (False, 3)):
        threads(count)
        arguments = arguments_of(
            context, query, k, candidates, every_head, channels, softcap, sinks_of(heads * group)
        )
        expected = attended(composed.retrieve_attention, arguments)
        output = attended(cpu.retrieve_attention, arguments)
        # The mean of the heads may be added up in another order there, and tokens differ then.
        same = every_head or group == 1
        assert error_of(output, expected) < (TOLERANCE[dtype] if same else 0.1)


@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
def test_more_asked_for_than_there_is(cpu, build_context, error_of, kind):
    """All of the context is attended to; memory is taken for no more."""
    context = build_context(LENGTHS, kind=kind)
    query = torch.randn(len(LENGTHS), 4, 64).to(torch.bfloat16)
    arguments = arguments_of(context, query, 2**31 - 1, 2**31 - 1, True, 64)
    output = attended(cpu.retrieve_attention, arguments)
    host, lengths = context.cache.host, context.seq_lens
    none = torch.empty(len(LENGTHS), 2, 0, dtype=torch.int32)
    expected = torch.empty_like(query)
    reference.sparse_decode_attention(
        expected,
        query,
        host.key,
        host.value,
        none,
        context.block_table,
        lengths,
        0 * lengths,
        0,
        0.2,
        0.0,
    )
    assert error_of(output, expected) < TOLERANCE[torch.bfloat16]
    assert torch.equal(output, attended(composed.retrieve_attention, arguments))


def test_no_rows(cpu, build_context):
    context = build_context([64], kind=DerivedKind.ONEBIT)
    query = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    arguments = list(arguments_of(context, query, 8, 16, True, 64))
    for i in (0, 5, 6, 7):
        arguments[i] = arguments[i][:0]
    assert attended(cpu.retrieve_attention, arguments).shape == (0, 4, 64)


def test_public_op(build_context, error_of):
    """Contexts whose middle is shorter than `topk` are attended to in full."""
    context = build_context([140], kind=DerivedKind.ONEBIT)
    query = torch.randn(1, 4, 64).to(torch.bfloat16)
    host = context.cache.host
    output = torch.empty_like(query)
    rows = (context.block_table, context.seq_lens, context.complete)
    ops.retrieve_attention(
        output,
        query,
        context.cache.derived,
        host.key,
        host.gathered_key,
        host.value,
        *rows,
        sink_tokens=8,
        critical_channels=8,
        topk=200,
        candidates=400,
        channels=64,
        every_head=True,
        scale=0.1,
        max_tail_start=128,
    )
    expected = torch.empty_like(query)
    middle = torch.arange(8, 128).int().expand(1, 2, 120).contiguous()
    ops.sparse_decode_attention(
        expected, query, host.key, host.value, middle, *rows, sink_tokens=8, scale=0.1
    )
    assert error_of(output, expected) < TOLERANCE[torch.bfloat16]
