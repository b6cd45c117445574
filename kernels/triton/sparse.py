"""Exact attention over gathered rows: sinks, selected tokens and tail."""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import (
    allocate_parts,
    attend_token_rows,
    load_queries,
    merge,
    merge_if_last,
    score_factors,
)
from vllm_tailorkv.kernels.triton.hot import hot_arguments, listed_tokens
from vllm_tailorkv.kernels.triton.launch import split_count
from vllm_tailorkv.kernels.types import HotRows

_BLOCK_TOKENS = 16
_TAIL_TOKENS = 128
"""Expected; a longer tail only makes the programs loop."""


@triton.jit
def _attend_gathered(
    output,  # [R, H, d]
    sums,  # float32 [R, H, parts, d]
    best,  # float32 [R, H, parts]
    totals,  # float32 [R, H, parts]
    counters,  # int32 [>= R * Hk], 0
    query,  # [R, H, d]
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
    indices,  # int32 [R, Hk, num_indices]
    num_indices,
    block_table,  # int32 [R, max_blocks]
    table_row,
    seq_lens,  # int32 [R]
    tail_start,  # int32 [R]
    sink_tokens,
    tags,
    hot,
    sink_logits,  # float32 [H], or None
    factor,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    MERGED: tl.constexpr,
    SETS: tl.constexpr,
):
    """Every so many runs of TOKENS of the tokens of one row and KV head, listed one after
    the other: sinks, selected, tail. The last program may merge all. Grid (parts, Hk, R).
    """
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    parts, part = tl.num_programs(0), tl.program_id(0)
    row_head = row * tl.num_programs(1) + head
    q = load_queries(query, row_head * PER_HEAD, PER_HEAD, ROWS, HEAD_SIZE, CHANNELS)
    length = tl.load(seq_lens + row)
    sinks = tl.minimum(sink_tokens, length)
    # A token that is both a sink and in the tail counts as a sink.
    tail = tl.maximum(tl.load(tail_start + row), sinks)
    indices += row_head * num_indices
    listed = sinks + num_indices + length - tail
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(part * TOKENS, listed, parts * TOKENS):
        token = listed_tokens(start + tl.arange(0, TOKENS), indices, num_indices, sinks, tail)
        highest, total, summed = attend_token_rows(
            q,
            key,
            value,
            token,
            (token >= 0) & (token < length),
            block_table + row * table_row,
            key_block,
            key_head,
            key_token,
            key_channel,
            value_block,
            value_head,
            value_token,
            value_channel,
            head,
            highest,
            total,
            summed,
            factor,
            cap,
            CAPPED,
            BLOCK_SIZE,
            HEAD_SIZE,
            tags,
            hot,
            SETS,
        )
    heads, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    at = (row_head * PER_HEAD + heads) * parts + part
    real = heads < PER_HEAD
    tl.store(best + at, highest, mask=real)
    tl.store(totals + at, total, mask=real)
    mask = real[:, None] & (channels < HEAD_SIZE)[None, :]
    tl.store(sums + at[:, None] * HEAD_SIZE + channels[None, :], summed, mask=mask)
    merge_if_last(
        output,
        sums,
        best,
        totals,
        counters,
        sink_logits,
        row_head,
        parts,
        HEAD_SIZE,
        CHANNELS,
        PER_HEAD,
        MERGED,
    )


def sparse_decode_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    indices: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None = None,
    hot: HotRows | None = None,
) -> None:
    """See `ops.sparse_decode_attention`; rows in `hot` are read from there."""
    rows, num_heads, head_size = query.shape
    if not rows:
        return
    heads, num_indices = indices.shape[1:]
    expected = sink_tokens + num_indices + _TAIL_TOKENS
    parts = split_count(query.device, rows * heads, triton.cdiv(expected, _BLOCK_TOKENS), 4)
    results = allocate_parts(query, heads, parts)
    tags, rows_kept, sets = hot_arguments(hot)
    _attend_gathered[(parts, heads, rows)](
        output,
        *results[:4],
        query,
        key_cache,
        *key_cache.stride(),
        value_cache,
        *value_cache.stride(),
        indices,
        num_indices,
        block_table,
        block_table.stride(0),
        seq_lens,
        tail_start,
        sink_tokens,
        tags,
        rows_kept,
        sink_logits,
        **score_factors(scale, softcap),
        BLOCK_SIZE=key_cache.shape[2],
        HEAD_SIZE=head_size,
        CHANNELS=triton.next_power_of_2(head_size),
        PER_HEAD=num_heads // heads,
        ROWS=max(16, triton.next_power_of_2(num_heads // heads)),
        TOKENS=_BLOCK_TOKENS,
        MERGED=results.merged,
        SETS=sets,
        num_warps=2,
    )
    merge(output, results, sink_logits)
