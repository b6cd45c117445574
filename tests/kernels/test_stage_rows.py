"""Contexts land in the buffer bit for bit, one row after the other; zeros follow, nothing else."""

import pytest
import torch

from vllm_tailorkv.kernels import reference
from vllm_tailorkv.layout import KeyLayout

PADDING = 256
CASES = [
    # dtype, layout, heads, head_size, block_size
    (torch.bfloat16, KeyLayout.TOKEN_MAJOR, 2, 128, 128),
    (torch.float16, KeyLayout.TOKEN_MAJOR, 3, 80, 64),
    (torch.float32, KeyLayout.TOKEN_MAJOR, 1, 256, 64),
    (torch.bfloat16, KeyLayout.CHANNEL_MAJOR, 2, 96, 128),
    (torch.float32, KeyLayout.CHANNEL_MAJOR, 2, 64, 64),
]


def buffers(cache, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For K and V, full of NaN."""
    _, heads, _, head_size = cache.host.key.shape
    shape = (places, heads, head_size)
    return tuple(torch.full(shape, torch.nan, dtype=cache.host.key.dtype) for _ in range(2))


@pytest.mark.parametrize(("dtype", "key_layout", "heads", "head_size", "block_size"), CASES)
@pytest.mark.parametrize(("first_token", "room"), [(0, 5), (64, PADDING + 5), (70, 0)])
def test_against_loops(
    fast, build_context, dtype, key_layout, heads, head_size, block_size, first_token, room
):
    lengths = [200, 70, 131, 75]
    context = build_context(
        lengths,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        key_layout=key_layout,
    )
    host, table = context.cache.host, context.block_table
    counts = [length - first_token for length in lengths]
    longest = max(counts) + 9
    starts = torch.tensor([3, *(3 + sum(counts[: i + 1]) for i in range(4))], dtype=torch.int32)
    places = int(starts[-1]) + room
    found = buffers(context.cache, places)
    fast.stage_rows(*found, host.key, host.value, table, starts, first_token, longest)
    expected = buffers(context.cache, places)
    for row, count in enumerate(counts):
        for token in range(count):
            position = first_token + token
            block = int(table[row, position // block_size])
            place = int(starts[row]) + token
            expected[0][place] = host.key[block, :, position % block_size]
            expected[1][place] = host.value[block, :, position % block_size]
    for rows in expected:
        rows[int(starts[-1]) :][:PADDING] = 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    again = buffers(context.cache, places)
    reference.stage_rows(*again, host.key, host.value, table, starts, first_token, longest)
    assert torch.equal(again[0].nan_to_num(7), expected[0].nan_to_num(7))
    assert torch.equal(again[1].nan_to_num(7), expected[1].nan_to_num(7))


def test_nothing_to_stage(fast, build_context):
    """No rows, or rows of which nothing is staged."""
    context = build_context([100])
    host = context.cache.host
    found = buffers(context.cache, 4)
    zero = torch.zeros(1, dtype=torch.int32)
    fast.stage_rows(*found, host.key, host.value, context.block_table[:0], zero, 0, 0)
    both = torch.zeros(2, dtype=torch.int32)
    fast.stage_rows(*found, host.key, host.value, context.block_table, both, 0, 0)
    assert found[0].isnan().all()
    assert found[1].isnan().all()
    fast.stage_rows(*found, host.key, host.value, context.block_table, both, 0, 3)
    assert not found[0].any()
    assert not found[1].any()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("context_start", lambda x: x.long(), "context_start must be int32"),
        ("context_start", lambda x: x[:-1], "context_start must have R [+] 1=3 values, has 2"),
        ("context_start", lambda x: x.flip(0), "context_start holds"),
        ("context_start", lambda x: x - 1, "context_start holds -1"),
        ("context_start", lambda x: x + 3, "170 places"),
        ("key_rows", lambda x: x[:, :1], "key_rows must be"),
        ("value_rows", lambda x: x.half(), "value_rows must be bfloat16"),
        ("value_rows", lambda x: x[::2], "value_rows must be"),
        ("value_cache", lambda x: x[:, :, :64], "value_cache must be"),
        ("block_table", lambda x: x[:, :1], "there is room for 128"),
        ("first_token", lambda x: 300, "there is room for 384"),
        ("first_token", lambda x: -1, "first_token must be from 0"),
        ("max_tokens", lambda x: 60, "60 tokens a row at the most"),
    ],
)
def test_a_broken_argument_is_an_error(build_context, name, change, words):
    """Never a read or a write out of bounds."""
    context = build_context([100, 200])
    key_rows, value_rows = buffers(context.cache, 170)
    arguments = {
        "key_rows": key_rows,
        "value_rows": value_rows,
        "key_cache": context.cache.host.key,
        "value_cache": context.cache.host.value,
        "block_table": context.block_table,
        "context_start": torch.tensor([0, 40, 170], dtype=torch.int32),
        "first_token": 60,
        "max_tokens": 130,
    }
    torch.ops.vllm_tailorkv.stage_rows(*arguments.values())
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=words):
        torch.ops.vllm_tailorkv.stage_rows(*arguments.values())
