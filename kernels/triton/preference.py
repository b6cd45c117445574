"""The identification score of a layer: how much weight lies beyond the largest few."""

import math

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import LOG2_E, cap_scores, dot, score_factors

_SELECT_QUERIES = 8
_SELECT_TOKENS = 512


@triton.jit(do_not_specialize=["num_queries", "length"])
def _query_scores(
    scores,  # float32 [G, num_queries, length]
    query,  # [num_queries, H, d], of the first head of a KV head
    query_token,
    key,  # [length, Hk, d], of one head
    key_token,
    num_queries,
    length,
    factor,
    cap,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Scores in base 2 of one query head; grid (length / TOKENS, G, num_queries / ROWS)."""
    channels = tl.arange(0, CHANNELS)
    kept = channels < HEAD_SIZE
    queries = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real, there = queries < num_queries, tokens < length
    at = query + tl.program_id(1) * HEAD_SIZE + queries.to(tl.int64)[:, None] * query_token
    q = tl.load(at + channels[None, :], mask=real[:, None] & kept[None, :], other=0.0)
    at = key + tokens[:, None] * key_token + channels[None, :]
    k = tl.load(at, mask=there[:, None] & kept[None, :], other=0.0)
    products = cap_scores(dot(q, tl.trans(k)), factor, cap, CAPPED)
    # Causal: query i of n stands at position length - n + i.
    visible = tokens[None, :] <= (length - num_queries + queries)[:, None]
    rows = (tl.program_id(1) * num_queries + queries).to(tl.int64) * length
    at = scores + rows[:, None] + tokens[None, :]
    products = tl.where(visible, products, -float("inf"))
    tl.store(at, products, mask=real[:, None] & there[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_queries", "length", "kept"])
def _largest_share(
    shares,  # float32 [num_rows]
    scores,  # float32 [num_rows, length], num_rows = G * num_queries
    sink_logits,  # float32 [G], or None
    num_rows,
    num_queries,
    length,
    kept,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Share of the `kept` largest weights of each row, and of sinks; grid (num_rows / ROWS,).

    The smallest of them is found bit by bit: floats that are not negative are ordered as
    their bits are.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < num_rows
    base = scores + rows.to(tl.int64)[:, None] * length
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    for start in range(0, length, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        mask = real[:, None] & (tokens < length)[None, :]
        x = tl.load(base + tokens[None, :], mask=mask, other=-float("inf"))
        highest = tl.maximum(highest, tl.max(x, 1))
    highest = tl.where(real, highest, 0.0)
    wanted = tl.minimum(kept, length - num_queries + rows % num_queries + 1)
    smallest = tl.zeros([ROWS], tl.int32)
    for step in range(30):
        candidate = smallest | (1 << (29 - step))
        count = tl.zeros([ROWS], tl.int32)
        for start in range(0, length, TOKENS):
            tokens = start + tl.arange(0, TOKENS)
            mask = real[:, None] & (tokens < length)[None, :]
            x = tl.load(base + tokens[None, :], mask=mask, other=-float("inf"))
            bits = tl.exp2(x - highest[:, None]).to(tl.int32, bitcast=True)
            count += tl.sum((bits >= candidate[:, None]).to(tl.int32), 1)
        smallest = tl.where(count >= wanted, candidate, smallest)
    total = tl.zeros([ROWS], tl.float32)
    above = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for start in range(0, length, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        mask = real[:, None] & (tokens < length)[None, :]
        x = tl.load(base + tokens[None, :], mask=mask, other=-float("inf"))
        weights = tl.exp2(x - highest[:, None])
        larger = weights.to(tl.int32, bitcast=True) > smallest[:, None]
        total += tl.sum(weights, 1)
        above += tl.sum(tl.where(larger, weights, 0.0), 1)
        count += tl.sum(larger.to(tl.int32), 1)
    # The others that are kept are equal to the smallest.
    above += (wanted - count).to(tl.float32) * smallest.to(tl.float32, bitcast=True)
    if sink_logits is not None:
        sink = tl.load(sink_logits + rows // num_queries, mask=real, other=0.0) * LOG2_E
        larger = tl.maximum(highest, sink)
        shrink, sinks = tl.exp2(highest - larger), tl.exp2(sink - larger)
        above, total = above * shrink + sinks, total * shrink + sinks
    tl.store(shares + rows, above / tl.where(real, total, 1.0), mask=real)


def dense_preference(
    query: torch.Tensor,
    key: torch.Tensor,
    alpha: float,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.dense_preference`."""
    num_queries, num_heads, head_size = query.shape
    length, heads, _ = key.shape
    per_head = num_heads // heads
    kept = max(1, math.floor(alpha * length))
    # Exact float32 products take many registers.
    rows, tokens = (16, 32) if query.dtype == torch.float32 else (32, 128)
    scores = torch.empty(per_head * num_queries, length, dtype=torch.float32, device=query.device)
    shares = torch.empty(heads, per_head * num_queries, dtype=torch.float32, device=query.device)
    grid = (triton.cdiv(length, tokens), per_head, triton.cdiv(num_queries, rows))
    # A KV head at a time: the scores of a long prompt are large.
    for head in range(heads):
        _query_scores[grid](
            scores,
            query[:, head * per_head :],
            query.stride(0),
            key[:, head],
            key.stride(0),
            num_queries,
            length,
            HEAD_SIZE=head_size,
            CHANNELS=max(16, triton.next_power_of_2(head_size)),
            ROWS=rows,
            TOKENS=tokens,
            **score_factors(scale, softcap),
        )
        _largest_share[(triton.cdiv(per_head * num_queries, _SELECT_QUERIES),)](
            shares[head],
            scores,
            None if sink_logits is None else sink_logits[head * per_head :],
            per_head * num_queries,
            num_queries,
            length,
            kept,
            ROWS=_SELECT_QUERIES,
            TOKENS=_SELECT_TOKENS,
        )
    return 1 - shares.view(num_heads, num_queries).mean(1)
