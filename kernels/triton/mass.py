"""The attention that each head pays to sinks, tail and sink logit."""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import (
    LOG2_E,
    cap_scores,
    dot,
    finite,
    load_queries,
    score_factors,
)
from vllm_tailorkv.kernels.triton.hot import hot_arguments, hot_or_host
from vllm_tailorkv.kernels.types import HotRows

_BLOCK_TOKENS = 16
_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log_mass(
    mass,  # float32 [R, H]
    query,  # [R, H, d]
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    key_channel,
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
    SETS: tl.constexpr,
):
    """Sinks, then the tail, of one row and KV head; grid (Hk, R)."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row_head = row * tl.num_programs(0) + head
    q = load_queries(query, row_head * PER_HEAD, PER_HEAD, ROWS, HEAD_SIZE, CHANNELS)
    start = tl.load(tail_start + row)
    # Without a middle there is nothing to compare, and the tail may be a whole context.
    length = tl.where(start > sink_tokens, tl.load(seq_lens + row), 0)
    sinks = tl.minimum(sink_tokens, length)
    # A token that is both a sink and in the tail counts as a sink.
    skipped = tl.minimum(tl.maximum(start, sinks), length) - sinks
    channels, heads = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, length - skipped, TOKENS):
        place = first + tl.arange(0, TOKENS)
        there = place < length - skipped
        token = tl.where(place < sinks, place, place + skipped)
        at = block_table + row * table_row + token // BLOCK_SIZE
        block = tl.load(at, mask=there, other=0).to(tl.int64)
        offset = token % BLOCK_SIZE
        at = key + block * key_block + head * key_head + offset * key_token
        if tags is not None:
            slot = tl.where(there, block * BLOCK_SIZE + offset, 0)
            at, _ = hot_or_host(tags, hot, head, slot, there, at, at, SETS, HEAD_SIZE)
        at = at[:, None] + channels[None, :] * key_channel
        mask = there[:, None] & (channels < HEAD_SIZE)[None, :]
        k = tl.load(at, mask=mask, other=0.0)
        scores = cap_scores(dot(q, tl.trans(k)), factor, cap, CAPPED)
        scores = tl.where(there[None, :], scores, -float("inf"))
        larger = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - finite(larger))
        total = total * shrink + tl.sum(tl.exp2(scores - finite(larger)[:, None]), 1)
        highest = larger
    if sink_logits is not None:
        at = sink_logits + head * PER_HEAD + heads
        sink = tl.load(at, mask=heads < PER_HEAD, other=0.0) * LOG2_E
        sink = tl.where(start > sink_tokens, sink, -float("inf"))
        larger = tl.maximum(highest, sink)
        total = total * tl.exp2(highest - finite(larger)) + tl.exp2(sink - finite(larger))
        highest = larger
    found = (highest + tl.log2(tl.where(total > 0, total, 1.0))) * _LOG_2
    found = tl.where(total > 0, found, 0.0)
    tl.store(mass + row_head * PER_HEAD + heads, found, mask=heads < PER_HEAD)


def log_mass(
    mass: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None = None,
    hot: HotRows | None = None,
) -> None:
    """See `ops.log_mass`; rows in `hot` are read from there."""
    rows, num_heads, head_size = query.shape
    heads = key_cache.shape[1]
    if not rows:
        return
    tags, rows_kept, sets = hot_arguments(hot)
    _log_mass[(heads, rows)](
        mass,
        query,
        key_cache,
        *key_cache.stride(),
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
        SETS=sets,
        num_warps=2,
    )
