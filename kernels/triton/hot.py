"""Rows of host pages that lie on the device too, the ones read last: `HotRows`.

A slot has one place for each head. Within a launch that reads rows no tag changes, and a row is
taken from its place only if the tag there is its slot: else it is read from its page, so that
results are the same whatever the places hold.
"""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.launch import split_count
from vllm_tailorkv.kernels.types import HotRows

_BLOCK_TOKENS = 64
_BLOCK_BYTES = 128
"""Of a row, read at a time."""
_BUSY = tl.constexpr(-2)
"""The tag of a place whose row is being written."""
_NEVER = tl.constexpr(-3)
_MOST_TAIL = 2048
"""Newest tokens of a tail that are kept: the whole context of the last token of a prompt is not."""


@triton.jit
def hot_place(head, slot, SETS: tl.constexpr):
    """The place of a slot of one head, int64. Equal slots of blocks do not meet."""
    return head * SETS + (slot + slot // SETS * 40503) % SETS


@triton.jit
def find_hot(tags, head, slot, there, SETS: tl.constexpr):
    """The places of slots int64 [n], and whether their rows lie there."""
    place = hot_place(head, slot, SETS)
    return place, tl.load(tags + place, mask=there, other=-1) == slot


@triton.jit
def hot_or_host(tags, rows, head, slot, there, key, value, SETS: tl.constexpr, SIZE: tl.constexpr):
    """Where K and V of slots begin: [n] pointers, those into pages where a row is not kept."""
    place, hit = find_hot(tags, head, slot, there, SETS)
    kept = rows + place * (2 * SIZE)
    key, value = tl.where(hit, kept, key), tl.where(hit, kept + SIZE, value)
    if SIZE % 8 == 0:
        # Rows are whole 16 bytes, which the choice hides: elements would be read one by one.
        key, value = tl.multiple_of(key, 16), tl.multiple_of(value, 16)
    return key, value


@triton.jit
def forget_slot(tags, head, slot, SETS: tl.constexpr):
    """A slot's row is about to change in its page."""
    at = tags + hot_place(head, slot, SETS)
    if tl.load(at) == slot:
        tl.store(at, -1)


@triton.jit
def listed_tokens(place, indices, num_indices, sinks, tail):
    """The tokens at places of a list: sinks, selected (-1 for none), tail."""
    before_tail = sinks + num_indices
    listed = (place >= sinks) & (place < before_tail)
    selected = tl.load(indices + place - sinks, mask=listed, other=-1)
    token = tl.where(place < sinks, place, tail + place - before_tail)
    return tl.where(listed, selected, token)


@triton.jit
def _keep_rows(
    tags,  # int32 [Hk, SETS]
    rows,  # [Hk, SETS, 2, d]
    counts,  # int64 [2]
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    value,  # [NB, Hk, bs, d]
    value_block,
    value_head,
    value_token,
    indices,  # int32 [R, Hk, num_indices]
    num_indices,
    block_table,  # int32 [R, max_blocks]
    table_row,
    seq_lens,  # int32 [R]
    tail_start,  # int32 [R]
    sink_tokens,
    most_tail,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SETS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Fetch what is not kept of the tokens of one row and KV head; grid (parts, Hk, R).

    Of several slots that want one place the last to come stays. Whoever claims it writes it alone:
    tags are taken and given back by one thread for each token, rows written in between.
    """
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(seq_lens + row)
    sinks = tl.minimum(sink_tokens, length)
    tail = tl.maximum(tl.maximum(tl.load(tail_start + row), sinks), length - most_tail)
    indices += (row * tl.num_programs(1) + head) * num_indices
    total = sinks + num_indices + length - tail
    found, fetched = tl.zeros([TOKENS], tl.int64), tl.zeros([TOKENS], tl.int64)
    for start in range(tl.program_id(0) * TOKENS, total, tl.num_programs(0) * TOKENS):
        place = start + tl.arange(0, TOKENS)
        token = listed_tokens(place, indices, num_indices, sinks, tail)
        there = (token >= 0) & (token < length) & (place < total)
        at = block_table + row * table_row + token // BLOCK_SIZE
        block = tl.load(at, mask=there, other=0).to(tl.int64)
        offset = tl.where(there, token % BLOCK_SIZE, 0)
        slot = block * BLOCK_SIZE + offset
        place, hit = find_hot(tags, head, slot, there, SETS)
        missing = there & ~hit
        old = tl.load(tags + place, mask=missing, other=_BUSY, cache_modifier=".cg")
        free = missing & (old != _BUSY) & (old != slot)
        busy = tl.full([TOKENS], _BUSY, tl.int32)
        claimed = tl.atomic_cas(
            tags + place, tl.where(free, old, _NEVER), busy, sem="acq_rel", scope="gpu"
        )
        won = free & (claimed == old)
        to = rows + (place * (2 * HEAD_SIZE))[:, None]
        from_key = key + block * key_block + head * key_head + offset * key_token
        from_value = value + block * value_block + head * value_head + offset * value_token
        # Whole rows of all tokens would not fit the registers.
        for first in tl.static_range(0, HEAD_SIZE, CHANNELS):
            channels = (first + tl.arange(0, CHANNELS))[None, :]
            mask = won[:, None] & (channels < HEAD_SIZE)
            k = tl.load(from_key[:, None] + channels, mask=mask)
            v = tl.load(from_value[:, None] + channels, mask=mask)
            tl.store(to + channels, k, mask=mask)
            tl.store(to + HEAD_SIZE + channels, v, mask=mask)
        tl.debug_barrier()
        tl.atomic_xchg(tags + place, slot.to(tl.int32), mask=won, sem="acq_rel", scope="gpu")
        found += hit.to(tl.int64)
        fetched += missing.to(tl.int64)
    tl.atomic_add(counts, tl.sum(found, 0), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(fetched, 0), sem="relaxed")


def keep_rows(
    hot: HotRows,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    indices: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
) -> None:
    """Fetch the rows that `sparse_decode_attention` is about to read.

    Args:
        hot: where they go.
        key_cache, value_cache: [NB, Hk, bs, d], the last axis contiguous.
        indices, block_table, seq_lens, tail_start, sink_tokens: as of `sparse_decode_attention`.
    """
    rows, heads, num_indices = indices.shape
    head_size = key_cache.shape[3]
    if not rows:
        return
    most = triton.cdiv(sink_tokens + num_indices + 2 * _BLOCK_TOKENS, _BLOCK_TOKENS)
    _keep_rows[(split_count(key_cache.device, rows * heads, most, 8), heads, rows)](
        *hot,
        key_cache,
        *key_cache.stride()[:3],
        value_cache,
        *value_cache.stride()[:3],
        indices,
        num_indices,
        block_table,
        block_table.stride(0),
        seq_lens,
        tail_start,
        sink_tokens,
        _MOST_TAIL,
        BLOCK_SIZE=key_cache.shape[2],
        HEAD_SIZE=head_size,
        CHANNELS=_BLOCK_BYTES // key_cache.itemsize,
        SETS=hot.tags.shape[1],
        TOKENS=_BLOCK_TOKENS,
        num_warps=2,
    )


def hot_arguments(hot: HotRows | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Tags, rows and SETS, as kernels take them that read rows."""
    return (None, None, 1) if hot is None else (hot.tags, hot.rows, hot.tags.shape[1])
