"""Approximate scores of the middle tokens, from one-bit codes or from critical channels."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import load_queries
from vllm_tailorkv.kernels.triton.codes import code_numbers, dot_key_codes
from vllm_tailorkv.kernels.triton.launch import as_words, split_count
from vllm_tailorkv.kernels.types import SPREAD_GROUPS, ChannelIndex, OnebitIndex, TokenIndex

_BLOCK_TOKENS = 128
_BLOCK_GROUPS = 16


@triton.jit
def _load_scored(
    query,
    offset,
    row_head,
    factor,
    sign,
    MEAN: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """What one row and KV head is scored with, see `Scored`: float32 [ROWS, CHANNELS] and [ROWS].

    A line of padding is never the largest.
    """
    q = load_queries(query, row_head * QUERIES, QUERIES, ROWS, HEAD_SIZE, CHANNELS)
    q = q.to(tl.float32) * factor
    lines = tl.arange(0, ROWS)
    if MEAN:
        q = tl.where((lines == 0)[:, None], tl.sum(q, 0)[None, :], 0.0)
        offsets = tl.where(lines == 0, 0.0, -float("inf"))
    else:
        there = lines < QUERIES
        offsets = tl.load(offset + row_head * QUERIES + lines, mask=there, other=0.0) * sign
        offsets = tl.where(there, offsets, -float("inf"))
    return q, offsets


@triton.jit
def _score_codes(
    scores,  # float32 [R, Hk, S]
    scores_row,
    scores_head,
    query,  # [R, Hk, QUERIES, d]
    offset,  # float32 [R, Hk, QUERIES], or None
    factor,
    sign,
    words,  # [NB, Hk, G, d, GROUP / WORD_BITS]
    words_block,
    words_head,
    words_group,
    scale,  # float16 [NB, Hk, G, d], zero with the same strides
    zero,
    scale_block,
    scale_head,
    scale_group,
    block_table,  # int32 [R, max_blocks]
    table_row,
    tail_start,  # int32 [R]
    sink_tokens,
    PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    WORD_BITS: tl.constexpr,
    MEAN: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A run of groups of one row and head; grid (parts, Hk, R)."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    WORDS: tl.constexpr = GROUP // WORD_BITS
    end = tl.load(tail_start + row)
    first, last = sink_tokens // GROUP, tl.cdiv(end, GROUP)
    share = tl.cdiv(last - first, tl.num_programs(0))
    first += tl.program_id(0) * share
    channels = tl.arange(0, CHANNELS)
    kept = channels < HEAD_SIZE
    row_head = row * tl.num_programs(1) + head
    q, offsets = _load_scored(
        query, offset, row_head, factor, sign, MEAN, QUERIES, ROWS, HEAD_SIZE, CHANNELS
    )
    within = channels[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scores += row * scores_row + head * scores_head
    for index in range(first, tl.minimum(first + share, last)):
        block = tl.load(block_table + row * table_row + index // PER_BLOCK).to(tl.int64)
        group = index % PER_BLOCK
        base = block * words_block + head * words_head + group * words_group
        codes = tl.load(words + base + within, mask=kept[:, None], other=0)
        base = block * scale_block + head * scale_head + group * scale_group
        scales = tl.load(scale + base + channels, mask=kept, other=0.0).to(tl.float32)
        zeros = tl.load(zero + base + channels, mask=kept, other=0.0).to(tl.float32)
        products = dot_key_codes(q, codes, scales, zeros, 1, WORD_BITS)
        products += offsets[:, None]
        tokens = index * GROUP + code_numbers(GROUP, 1, WORD_BITS)
        middle = (tokens >= sink_tokens) & (tokens < end)
        tl.store(scores + tokens, tl.max(products, 0), mask=middle)


@triton.jit
def _find_extremes(
    found,  # float32 [R, Hk, parts, 2, CHANNELS]
    extremes,  # [NB, Hk, G, 2, d]
    extremes_block,
    extremes_head,
    extremes_group,
    block_table,  # int32 [R, max_blocks]
    table_row,
    tail_start,  # int32 [R]
    PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SPREAD_GROUPS: tl.constexpr,
):
    """Of each channel over a part of the groups of one row and head; grid (parts, Hk, R)."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    count = tl.cdiv(tl.load(tail_start + row), GROUP)
    stride = tl.cdiv(count, SPREAD_GROUPS)
    last = tl.cdiv(count, tl.maximum(stride, 1))
    channels = tl.arange(0, CHANNELS)
    low = tl.full([GROUPS, CHANNELS], float("inf"), tl.float32)
    high = tl.full([GROUPS, CHANNELS], -float("inf"), tl.float32)
    step = tl.num_programs(0) * GROUPS
    for start in range(tl.program_id(0) * GROUPS, last, step):
        unit = start + tl.arange(0, GROUPS)
        there = unit < last
        index = unit * stride
        at = block_table + row * table_row + index // PER_BLOCK
        block = tl.load(at, mask=there, other=0).to(tl.int64)
        at = block * extremes_block + head * extremes_head + index % PER_BLOCK * extremes_group
        mask = there[:, None] & (channels < HEAD_SIZE)[None, :]
        at = extremes + at[:, None] + channels[None, :]
        low = tl.minimum(low, tl.load(at, mask=mask, other=float("inf")).to(tl.float32))
        at += HEAD_SIZE
        high = tl.maximum(high, tl.load(at, mask=mask, other=-float("inf")).to(tl.float32))
    at = (row * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
    tl.store(found + 2 * at * CHANNELS + channels, tl.min(low, 0))
    tl.store(found + (2 * at + 1) * CHANNELS + channels, tl.max(high, 0))


@triton.jit
def _select_channels(
    selected,  # int32 [R, Hk, COUNT]
    found,  # float32 [R, Hk, parts, 2, CHANNELS]
    query,  # [R, Hk, QUERIES, d]
    factor,
    parts,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    MEAN: tl.constexpr,
    QUERIES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The channels that count most, the lower first among equals; grid (Hk, R)."""
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    channels = tl.arange(0, CHANNELS)
    kept = channels < HEAD_SIZE
    low = tl.full([CHANNELS], float("inf"), tl.float32)
    high = tl.full([CHANNELS], -float("inf"), tl.float32)
    for part in range(parts):
        row = found + 2 * (at * parts + part) * CHANNELS
        low = tl.minimum(low, tl.load(row + channels))
        high = tl.maximum(high, tl.load(row + CHANNELS + channels))
    weight = tl.zeros([CHANNELS], tl.float32)
    for i in range(QUERIES):
        row = query + (at * QUERIES + i) * HEAD_SIZE
        q = tl.load(row + channels, mask=kept, other=0.0).to(tl.float32) * factor
        weight = weight + q if MEAN else tl.maximum(weight, tl.abs(q))
    weight = tl.where(kept, tl.abs(weight) * (high - low), -1.0)
    for i in range(COUNT):
        best = tl.min(tl.where(weight == tl.max(weight, 0), channels, CHANNELS), 0)
        tl.store(selected + at * COUNT + i, best)
        weight = tl.where(channels == best, -2.0, weight)


@triton.jit
def _score_channels(
    scores,  # float32 [R, Hk, S]
    scores_row,
    scores_head,
    query,  # [R, Hk, QUERIES, d]
    offset,  # float32 [R, Hk, QUERIES], or None
    factor,
    sign,
    selected,  # int32 [R, Hk, COUNT]
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    key_channel,
    block_table,  # int32 [R, max_blocks]
    table_row,
    tail_start,  # int32 [R]
    sink_tokens,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MEAN: tl.constexpr,
    QUERIES: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Every so many runs of TOKENS tokens of one row and head; grid (parts, Hk, R)."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    end = tl.load(tail_start + row)
    at = row * tl.num_programs(1) + head
    numbers = tl.arange(0, PADDED)
    chosen = numbers < COUNT
    channels = tl.load(selected + at * COUNT + numbers, mask=chosen, other=0)
    scores += row * scores_row + head * scores_head
    step = tl.num_programs(0) * TOKENS
    for start in range(sink_tokens + tl.program_id(0) * TOKENS, end, step):
        tokens = start + tl.arange(0, TOKENS)
        middle = tokens < end
        place = block_table + row * table_row + tokens // BLOCK_SIZE
        block = tl.load(place, mask=middle, other=0).to(tl.int64)
        rows = key + block * key_block + head * key_head + tokens % BLOCK_SIZE * key_token
        mask = middle[:, None] & chosen[None, :]
        part = tl.load(rows[:, None] + channels[None, :] * key_channel, mask=mask, other=0.0)
        best = tl.full([TOKENS], 0.0 if MEAN else -float("inf"), tl.float32)
        for i in range(QUERIES):
            q = tl.load(query + (at * QUERIES + i) * HEAD_SIZE + channels, mask=chosen, other=0.0)
            q = q.to(tl.float32) * factor
            products = tl.sum(part.to(tl.float32) * q[None, :], 1)
            if MEAN:
                best += products
            else:
                best = tl.maximum(best, products + tl.load(offset + at * QUERIES + i) * sign)
        tl.store(scores + tokens, best, mask=middle)


class Scored(NamedTuple):
    """What tokens are scored with: the largest product of a query, plus its offset.

    query: [R, Hk, Q, d], times `factor`.
    offset: float32 [R, Hk, Q], times `sign`; None: tokens are scored with the sum of the queries.
    """

    query: torch.Tensor
    offset: torch.Tensor | None
    factor: float = 1.0
    sign: float = 1.0

    def rows(self, part: slice) -> "Scored":
        """Some of the rows."""
        offset = None if self.offset is None else self.offset[part]
        return self._replace(query=self.query[part], offset=offset)


def _score_by_codes(
    scores: torch.Tensor,
    scored: Scored,
    index: OnebitIndex,
    block_size: int,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
) -> None:
    rows, heads, queries, head_size = scored.query.shape
    device = scored.query.device
    per_block = index.key.scale.shape[2]
    group_size = block_size // per_block
    words = as_words(index.key.codes)
    channels = triton.next_power_of_2(head_size)
    query_rows = max(8, triton.next_power_of_2(queries))
    most = -(-scores.shape[2] // group_size)
    _score_codes[(split_count(device, rows * heads, most, 16), heads, rows)](
        scores,
        *scores.stride()[:2],
        *scored,
        words,
        *words.stride()[:3],
        *index.key[1:],
        *index.key.scale.stride()[:3],
        block_table,
        block_table.stride(0),
        tail_start,
        sink_tokens,
        PER_BLOCK=per_block,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        GROUP=group_size,
        WORD_BITS=8 * words.element_size(),
        MEAN=scored.offset is None,
        QUERIES=queries,
        ROWS=query_rows,
        # One warp holds 128 tokens of 128 channels and 8 queries, and exchanges nothing.
        num_warps=max(1, channels * group_size // 16384, channels * query_rows // 1024),
        num_stages=1,
    )


def _score_by_channels(
    scores: torch.Tensor,
    scored: Scored,
    index: ChannelIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
) -> None:
    query = scored.query
    rows, heads, queries, head_size = query.shape
    block_size, per_block = key_cache.shape[2], index.extremes.shape[2]
    channels, count = triton.next_power_of_2(head_size), min(critical_channels, head_size)
    most = -(-scores.shape[2] // _BLOCK_TOKENS)
    parts = split_count(query.device, rows * heads, most, 8)
    found = scores.new_empty(rows, heads, parts, 2, channels)
    selected = block_table.new_empty(rows, heads, count)
    where = (block_table, block_table.stride(0), tail_start)
    shape: dict[str, Any] = {
        "HEAD_SIZE": head_size,
        "MEAN": scored.offset is None,
        "QUERIES": queries,
        "COUNT": count,
    }
    _find_extremes[(parts, heads, rows)](
        found,
        index.extremes,
        *index.extremes.stride()[:3],
        *where,
        PER_BLOCK=per_block,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        GROUP=block_size // per_block,
        GROUPS=_BLOCK_GROUPS,
        SPREAD_GROUPS=SPREAD_GROUPS,
    )
    _select_channels[(heads, rows)](
        selected, found, query, scored.factor, parts, CHANNELS=channels, **shape
    )
    _score_channels[(parts, heads, rows)](
        scores,
        *scores.stride()[:2],
        *scored,
        selected,
        key_cache,
        *key_cache.stride(),
        *where,
        sink_tokens,
        BLOCK_SIZE=block_size,
        PADDED=triton.next_power_of_2(max(1, count)),
        TOKENS=_BLOCK_TOKENS,
        **shape,
    )


def score_with(
    scored: Scored,
    scores: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
) -> None:
    """`ops.score_tokens` with queries as a kernel takes them."""
    if not scores.shape[0] or not scores.shape[2]:
        return
    where = (block_table, tail_start, sink_tokens)
    if isinstance(index, ChannelIndex):
        _score_by_channels(scores, scored, index, key_cache, *where, critical_channels)
    else:
        _score_by_codes(scores, scored, index, key_cache.shape[2], *where)


def score_tokens(
    scores: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    offset: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
) -> None:
    """See `ops.score_tokens`."""
    rest = (index, key_cache, block_table, tail_start, sink_tokens, critical_channels)
    score_with(Scored(query, offset), scores, *rest)
