"""K and V of new tokens into pages."""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.hot import find_hot, hot_arguments
from vllm_tailorkv.kernels.types import HotRows

_BLOCK_TOKENS = 16


@triton.jit(do_not_specialize=["num_tokens"])
def _write_rows(
    key,  # [T, Hk, d]
    key_token,
    key_head,
    value,  # [T, Hk, d]
    value_token,
    value_head,
    key_cache,  # [NB, Hk, bs, d]
    key_cache_block,
    key_cache_head,
    key_cache_token,
    key_cache_channel,
    value_cache,  # [NB, Hk, bs, d]
    value_cache_block,
    value_cache_head,
    value_cache_token,
    value_cache_channel,
    slot_mapping,  # int64 [>= T]
    num_tokens,
    tags,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SETS: tl.constexpr,
):
    """TOKENS tokens of one head; grid (T / TOKENS, Hk)."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    slots = tl.load(slot_mapping + tokens, mask=tokens < num_tokens, other=-1)
    kept = (slots >= 0)[:, None] & (channels < HEAD_SIZE)[None, :]
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    if tags is not None:
        place, hit = find_hot(tags, head, tl.maximum(slots, 0), slots >= 0, SETS)
        tl.store(tags + place, -1, mask=hit)
    at = key + tokens[:, None] * key_token + head * key_head + channels[None, :]
    rows = key_cache + block * key_cache_block + head * key_cache_head + offset * key_cache_token
    tl.store(rows[:, None] + channels[None, :] * key_cache_channel, tl.load(at, mask=kept), kept)
    at = value + tokens[:, None] * value_token + head * value_head + channels[None, :]
    rows = value_cache + block * value_cache_block + head * value_cache_head
    rows += offset * value_cache_token
    tl.store(rows[:, None] + channels[None, :] * value_cache_channel, tl.load(at, mask=kept), kept)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_rows: torch.Tensor | None = None,
    hot: HotRows | None = None,
) -> None:
    """See `ops.write_kv`."""
    num_tokens, heads, head_size = key.shape
    if not num_tokens:
        return
    if key_rows is not None:
        # Pages that a GPU reads are token-major, and need no rows; where they are asked for,
        # writing K twice is good enough.
        write_kv(key, key, key_rows, key_rows, slot_mapping)
    tags, _, sets = hot_arguments(hot)
    _write_rows[(triton.cdiv(num_tokens, _BLOCK_TOKENS), heads)](
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        key_cache,
        *key_cache.stride(),
        value_cache,
        *value_cache.stride(),
        slot_mapping,
        num_tokens,
        tags,
        BLOCK_SIZE=key_cache.shape[2],
        HEAD_SIZE=head_size,
        TOKENS=_BLOCK_TOKENS,
        CHANNELS=triton.next_power_of_2(head_size),
        SETS=sets,
    )
