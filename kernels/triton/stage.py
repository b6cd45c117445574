"""K and V of whole contexts, gathered into a buffer."""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.types import STAGED_PADDING

_BLOCK_TOKENS = 16


@triton.jit(do_not_specialize=["table_row", "first_token", "places"])
def _stage_rows(
    key_rows,  # [C, Hk, d]
    value_rows,  # [C, Hk, d]
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    key_channel,
    value,  # [NB, Hk, bs, d]
    value_block,
    value_head,
    value_token,
    value_channel,
    block_table,  # int32 [R, max_blocks]
    table_row,
    context_start,  # int32 [R + 1]
    first_token,
    places,  # C
    padding,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """TOKENS tokens of one row and head; grid ((max_tokens + padding) / TOKENS, Hk, R)."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    start = tl.load(context_start + row)
    count = tl.load(context_start + row + 1) - start
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = tokens < count
    channels = tl.arange(0, CHANNELS)
    kept = (channels < HEAD_SIZE)[None, :]
    mask = there[:, None] & kept
    # Behind the last row come zeros.
    written = tokens < count + tl.where(row == tl.num_programs(2) - 1, padding, 0)
    written = (written & (start + tokens < places))[:, None] & kept
    position = first_token + tokens
    at = block_table + row * table_row + position // BLOCK_SIZE
    block = tl.load(at, mask=there, other=0).to(tl.int64)
    offset = position % BLOCK_SIZE
    to = ((start + tokens).to(tl.int64) * tl.num_programs(1) + head) * HEAD_SIZE
    to = to[:, None] + channels[None, :]
    rows = key + block * key_block + head * key_head + offset * key_token
    x = tl.load(rows[:, None] + channels[None, :] * key_channel, mask=mask, other=0.0)
    tl.store(key_rows + to, x, mask=written)
    rows = value + block * value_block + head * value_head + offset * value_token
    x = tl.load(rows[:, None] + channels[None, :] * value_channel, mask=mask, other=0.0)
    tl.store(value_rows + to, x, mask=written)


def stage_rows(
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_start: torch.Tensor,
    first_token: int,
    max_tokens: int,
) -> None:
    """See `ops.stage_rows`."""
    _, heads, block_size, head_size = key_cache.shape
    rows = block_table.shape[0]
    if not rows or not max_tokens:
        return
    _stage_rows[(triton.cdiv(max_tokens + STAGED_PADDING, _BLOCK_TOKENS), heads, rows)](
        key_rows,
        value_rows,
        key_cache,
        *key_cache.stride(),
        value_cache,
        *value_cache.stride(),
        block_table,
        block_table.stride(0),
        context_start,
        first_token,
        key_rows.shape[0],
        STAGED_PADDING,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        CHANNELS=triton.next_power_of_2(head_size),
        TOKENS=_BLOCK_TOKENS,
    )
