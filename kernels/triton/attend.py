"""Device functions of attention: products, scores, a tile of exact rows, and the merge.

Each program leaves the softmax of its own tokens: the largest score, the sum of the powers
and the weighted sum of values; the last one to come may merge them. Scores are kept in base 2. A
part without tokens has a largest score of minus infinity and counts for nothing.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_tailorkv import envs
from vllm_tailorkv.kernels.triton.hot import hot_or_host
from vllm_tailorkv.kernels.triton.launch import counters, is_last

_INTERPRETED = tl.constexpr(envs.triton_interpreted())
LOG2_E = tl.constexpr(math.log2(math.e))
_MERGED = 16
"""Parts that are read at a time."""
_MOST_MERGED = 48
"""Parts that the last program merges: alone it would read more for longer than a launch takes."""


@triton.jit
def dot(a, b):
    """Matrix product in float32; exact products of whatever dtype the operands have."""
    if _INTERPRETED:
        # The interpreter would multiply the bit patterns of bf16.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def cap_scores(scores, factor, cap, CAPPED: tl.constexpr):
    """Scores in base 2 from q.k; see `score_factors`."""
    scores *= factor
    if CAPPED:
        # tanh(x) = 1 - 2 / (e^2x + 1); the factor 2 is in `factor`.
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    return scores


@triton.jit
def finite(best):
    """The largest score, or 0 where there was none, so that no difference is a NaN."""
    return tl.where(best == -float("inf"), 0.0, best)


@triton.jit
def attend_rows(query, key, value, valid, best, total, output, factor, cap, CAPPED: tl.constexpr):
    """Add a tile of tokens to a softmax.

    query [M, d], key [d, n] and value [n, d] in one dtype, valid bool [n]; best and total
    float32 [M], output float32 [M, d].
    """
    scores = cap_scores(dot(query, key), factor, cap, CAPPED)
    scores = tl.where(valid[None, :], scores, -float("inf"))
    larger = tl.maximum(best, tl.max(scores, 1))
    shrink = tl.exp2(best - finite(larger))
    weights = tl.exp2(scores - finite(larger)[:, None])
    total = total * shrink + tl.sum(weights, 1)
    output = output * shrink[:, None] + dot(weights.to(value.dtype), value)
    return larger, total, output


@triton.jit
def load_queries(
    query,
    first,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The PER_HEAD query heads from `first` on, [ROWS, CHANNELS], 0 beyond them."""
    heads, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    at = (first + heads)[:, None] * HEAD_SIZE + channels[None, :]
    mask = (heads < PER_HEAD)[:, None] & (channels < HEAD_SIZE)[None, :]
    return tl.load(query + at, mask=mask, other=0.0)


@triton.jit
def attend_token_rows(
    query,
    key,
    value,
    token,
    valid,
    block_table,
    key_block,
    key_head,
    key_token,
    key_channel,
    value_block,
    value_head,
    value_token,
    value_channel,
    head,
    best,
    total,
    output,
    factor,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    tags=None,
    hot=None,
    SETS: tl.constexpr = 1,
):
    """Add the host rows of tokens int [n] of one head to a softmax; see `HotRows`."""
    channels = tl.arange(0, query.shape[1])
    block = tl.load(block_table + token // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    offset = token % BLOCK_SIZE
    mask = valid[:, None] & (channels < HEAD_SIZE)[None, :]
    k_at = key + block * key_block + head * key_head + offset * key_token
    v_at = value + block * value_block + head * value_head + offset * value_token
    if tags is not None:
        slot = tl.where(valid, block * BLOCK_SIZE + offset, 0)
        k_at, v_at = hot_or_host(tags, hot, head, slot, valid, k_at, v_at, SETS, HEAD_SIZE)
    k = tl.load(k_at[:, None] + channels[None, :] * key_channel, mask=mask, other=0.0)
    v = tl.load(v_at[:, None] + channels[None, :] * value_channel, mask=mask, other=0.0)
    return attend_rows(query, tl.trans(k), v, valid, best, total, output, factor, cap, CAPPED)


@triton.jit
def _merge_head(
    output,  # [R, H, d]
    sums,  # float32 [R, H, parts, d]
    best,  # float32 [R, H, parts]
    totals,  # float32 [R, H, parts]
    sink_logits,  # float32 [H], or None
    at,
    head,
    parts,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The attention of one row and query head, from what all programs left."""
    channels = tl.arange(0, CHANNELS)
    kept = channels < HEAD_SIZE
    highest = -float("inf")
    total = 0.0
    merged = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        numbers = at * parts + start + tl.arange(0, PARTS)
        there = start + tl.arange(0, PARTS) < parts
        scores = tl.load(best + numbers, there, -float("inf"), cache_modifier=".cg")
        powers = tl.load(totals + numbers, there, 0.0, cache_modifier=".cg")
        rows = sums + numbers[:, None] * HEAD_SIZE + channels[None, :]
        rows = tl.load(rows, there[:, None] & kept[None, :], 0.0, cache_modifier=".cg")
        larger = tl.maximum(highest, tl.max(scores, 0))
        shrink = tl.exp2(highest - finite(larger))
        weights = tl.exp2(scores - finite(larger))
        total = total * shrink + tl.sum(weights * powers, 0)
        merged = merged * shrink + tl.sum(weights[:, None] * rows, 0)
        highest = larger
    if sink_logits is not None:
        sink = tl.load(sink_logits + head) * LOG2_E
        larger = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - finite(larger))
        total = total * shrink + tl.exp2(sink - finite(larger))
        merged *= shrink
    # A row without tokens is padding: 0.
    merged = merged / tl.where(total == 0.0, 1.0, total)
    tl.store(output + at * HEAD_SIZE + channels, merged.to(output.dtype.element_ty), mask=kept)


@triton.jit
def _merge_parts(
    output,
    sums,
    best,
    totals,
    sink_logits,
    parts,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row and query head, see `_merge_head`; grid (H, R)."""
    head = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head
    _merge_head(
        output, sums, best, totals, sink_logits, at, head, parts, HEAD_SIZE, CHANNELS, PARTS
    )


@triton.jit
def merge_if_last(
    output,
    sums,
    best,
    totals,
    counters,  # int32 [>= R * Hk], 0
    sink_logits,
    row_head,
    parts,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The query heads of one row and KV head, by its last program; nothing if PARTS is 0.

    Grid (parts, Hk, R).
    """
    if PARTS > 0:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if is_last(counters + row_head, parts):
            for at in range(row_head * PER_HEAD, (row_head + 1) * PER_HEAD):
                head = at % (tl.num_programs(1) * PER_HEAD)
                _merge_head(
                    output,
                    sums,
                    best,
                    totals,
                    sink_logits,
                    at,
                    head,
                    parts,
                    HEAD_SIZE,
                    CHANNELS,
                    PARTS,
                )


class Parts(NamedTuple):
    """What the programs of one call leave to the last one of each row and KV head.

    sums float32 [R, H, parts, d]; best, totals float32 [R, H, parts]; counters int32 [>= R * Hk].
    merged: how many that program reads at a time; 0 if they are left for `merge`.
    """

    sums: torch.Tensor
    best: torch.Tensor
    totals: torch.Tensor
    counters: torch.Tensor
    merged: int


def allocate_parts(query: torch.Tensor, heads: int, parts: int) -> Parts:
    """For query [R, H, d] and so many KV heads."""
    rows, num_heads, head_size = query.shape
    shape = (rows, num_heads, parts)
    dtype, device = torch.float32, query.device
    return Parts(
        torch.empty((*shape, head_size), dtype=dtype, device=device),
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty(shape, dtype=dtype, device=device),
        counters(device, rows * heads),
        # Attention in float32 needs the registers itself.
        _MERGED if parts <= _MOST_MERGED and query.itemsize == 2 else 0,
    )


def merge(output: torch.Tensor, parts: Parts, sink_logits: torch.Tensor | None = None) -> None:
    """Write the attention [R, H, d] that the parts sum up to, where no program has done so."""
    if parts.merged:
        return
    rows, heads, head_size = output.shape
    _merge_parts[(heads, rows)](
        output,
        *parts[:3],
        sink_logits,
        parts.best.shape[2],
        HEAD_SIZE=head_size,
        CHANNELS=triton.next_power_of_2(head_size),
        PARTS=_MERGED,
    )


def score_factors(scale: float, softcap: float) -> dict[str, float | bool]:
    """The arguments of `cap_scores` for the contract's `scale` and `softcap`."""
    base = math.log2(math.e)
    if softcap > 0:
        return {"factor": 2 * base * scale / softcap, "cap": base * softcap, "CAPPED": True}
    return {"factor": base * scale, "cap": 0.0, "CAPPED": False}
