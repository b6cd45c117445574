"""The attention to sinks and tail, and to nothing else."""

import math

import pytest
import torch

from vllm_tailorkv.kernels import ops, reference
from vllm_tailorkv.layout import DerivedKind, KeyLayout

LENGTHS = [3, 1, 5, 60, 129, 900]

CASES = [
    # dtype, layout, heads, G, head_size, block_size, sinks, recent
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 4, 128, 128, 8, 56),
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 2, 7, 64, 128, 8, 119),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 1, 8, 96, 64, 0, 1),
    (torch.float16, KeyLayout.TOKEN_MAJOR, 3, 1, 80, 64, 70, 300),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 1, 2, 256, 128, 300, 600),
]


def run(function, context, query, tail_start, sink_tokens, softcap=0.0, sink_logits=None):
    mass = torch.full(query.shape[:2], float("nan"))
    function(
        mass,
        query,
        context.cache.host.key,
        context.block_table,
        context.seq_lens,
        tail_start,
        sink_tokens,
        query.shape[2] ** -0.5,
        softcap,
        sink_logits,
    )
    return mass


@pytest.mark.parametrize(
    ("dtype", "key_layout", "heads", "per_head", "head_size", "block_size", "sinks", "recent"),
    CASES,
)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_equals_reference(
    fast,
    build_context,
    sinks_of,
    dtype,
    key_layout,
    heads,
    per_head,
    head_size,
    block_size,
    sinks,
    recent,
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
    context.seq_lens[0] = 0
    tail_start = (context.seq_lens - recent).clamp(min=0).int()
    query = (4 * torch.randn(len(LENGTHS), heads * per_head, head_size)).to(dtype)
    options = (tail_start, sinks, softcap, sinks_of(heads * per_head))
    expected = run(reference.log_mass, context, query, *options)
    actual = run(fast.log_mass, context, query, *options)
    assert (expected[0] == 0).all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_counts_what_is_kept_once(fast, build_context):
    """With a query of zeros every token weighs 1: the mass is how many there are."""
    context = build_context([500], dtype=torch.float32)
    query = torch.zeros(1, 4, 64)
    for sinks, start, count in [(8, 444, 64), (0, 499, 1), (100, 450, 150), (0, 500, 0)]:
        tail_start = torch.tensor([start], dtype=torch.int32)
        expected = math.log(count) if count else 0.0
        for module in (fast, reference):
            mass = run(module.log_mass, context, query, tail_start, sinks)
            torch.testing.assert_close(mass, torch.full_like(mass, expected))


def test_sink_logits_weigh_beside_tokens(fast, build_context):
    """Where no token is kept they are all there is."""
    context = build_context([500], dtype=torch.float32)
    query, logits = torch.zeros(1, 4, 64), torch.tensor([math.log(36), -30.0, 0.0, 500.0])
    for sinks, start, expected in [
        (8, 444, [math.log(100), math.log(64), math.log(65), 500.0]),
        (0, 500, logits.tolist()),
        (8, 8, [0.0] * 4),
    ]:
        tail_start = torch.tensor([start], dtype=torch.int32)
        for module in (fast, reference):
            mass = run(module.log_mass, context, query, tail_start, sinks, sink_logits=logits)
            torch.testing.assert_close(mass, torch.tensor([expected]))


def test_rows_without_a_middle_are_not_weighed(fast, build_context):
    """Their K is not read: it is NaN."""
    context = build_context([500, 500, 500, 30, 500], dtype=torch.float32)
    tail_start = torch.tensor([0, 8, -5, 8, 9], dtype=torch.int32)
    query = torch.randn(5, 4, 64)
    weighed = run(reference.log_mass, context, query, tail_start, 8)[4]
    context.cache.host.key[context.block_table[:4].long()] = float("nan")
    for module in (fast, reference):
        mass = run(module.log_mass, context, query, tail_start, 8)
        assert (mass[:4] == 0).all()
        torch.testing.assert_close(mass[4], weighed)


def test_arguments(build_context):
    context = build_context([64], dtype=torch.float32)
    query, mass = torch.zeros(1, 4, 64), torch.zeros(1, 4)
    rest = (context.cache.host.key, context.block_table, context.seq_lens, context.complete)
    options = {"sink_tokens": 8, "scale": 1.0}
    with pytest.raises(RuntimeError, match="mass"):
        ops.log_mass(mass.half(), query, *rest, **options)
    with pytest.raises(RuntimeError, match="mass"):
        ops.log_mass(mass[:, :2], query, *rest, **options)
    with pytest.raises(RuntimeError, match="tail_start"):
        ops.log_mass(mass, query, *rest[:3], context.complete.long(), **options)
