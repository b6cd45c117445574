"""Candidates ranked again by their true attention, K read in place."""

import math

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import (
    cap_scores,
    dot,
    finite,
    load_queries,
    score_factors,
)
from vllm_tailorkv.kernels.triton.hot import hot_arguments, hot_or_host
from vllm_tailorkv.kernels.triton.launch import counters, is_last, split_count
from vllm_tailorkv.kernels.types import HotRows

_LOG2_E = tl.constexpr(math.log2(math.e))
_BLOCK_TOKENS = 16
_BLOCK_PLACES = 512
_SAMPLES = 16
_MOST_CANDIDATES = 1 << 16
"""One program holds the weights of all: from 16384 on, it spills some of them."""
_PLACES_WITH_SCORES = 2048
"""Candidates that the programs that score them rank, too: more want more warps than these have."""


@triton.jit
def largest(values, there, count):
    """Mask of the `count` largest of float32 [n], the first among equals; all, where fewer are
    `there`. NaN counts as larger than all, or as smaller where it is negative.
    """
    bits = tl.where(values == 0.0, 0.0, values).to(tl.uint32, bitcast=True)
    # Unsigned keys that order as the values do, above 0, the key of what is not there.
    # (Triton 3.8's interpreter knows no `~` of them.)
    keys = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    keys = tl.where(there, keys, 0)
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((keys >= (threshold | bit)).to(tl.int32), 0) >= count
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    above, equal = keys > threshold, keys == threshold
    missing = count - tl.sum(above.to(tl.int32), 0)
    return there & (above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing)))


@triton.jit
def select_heaviest(
    indices,  # int32 [R, Hk, num_indices]
    num_indices,
    candidates,  # int32 [R, Hk, num_candidates]
    num_candidates,
    scores,  # float32 [R, H, num_candidates], in base 2
    mass,  # float32 [R, H], in base e
    row_head,
    PER_HEAD: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The heaviest candidates of one row and KV head."""
    place = tl.arange(0, PLACES)
    token = tl.load(
        candidates + row_head * num_candidates + place, mask=place < num_candidates, other=-1
    )
    there = token >= 0
    scores += row_head * PER_HEAD * num_candidates + place
    # One head's order is that of its scores, also where weights vanish.
    weights = tl.load(scores, there, -float("inf"), cache_modifier=".cg")
    if PER_HEAD > 1:
        weights = tl.zeros([PLACES], tl.float32)
        for i in range(PER_HEAD):
            line = tl.load(scores + i * num_candidates, there, -float("inf"), cache_modifier=".cg")
            elsewhere = tl.load(mass + row_head * PER_HEAD + i) * _LOG2_E
            highest = finite(tl.maximum(tl.max(line, 0), elsewhere))
            powers = tl.exp2(line - highest)
            total = tl.sum(powers, 0) + tl.exp2(elsewhere - highest)
            weights += powers / tl.where(total == 0.0, 1.0, total)
    chosen = largest(weights, there, num_indices)
    indices += row_head * num_indices
    tl.store(indices + tl.cumsum(chosen.to(tl.int32), 0) - 1, token, mask=chosen)
    for start in range(tl.sum(chosen.to(tl.int32), 0), num_indices, PLACES):
        tl.store(indices + start + place, -1, mask=start + place < num_indices)


@triton.jit
def _sample_channels(
    selected,  # int32 [R, Hk, COUNT]
    candidates,  # int32 [R, Hk, num_candidates]
    num_candidates,
    query,  # [R, H, d]
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    key_channel,
    block_table,  # int32 [R, max_blocks]
    table_row,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COUNT: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The channels that count most over a few candidates, ascending; grid (Hk, R)."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row_head = row * tl.num_programs(0) + head
    candidates += row_head * num_candidates
    found = 0
    for start in range(0, num_candidates, PLACES):
        place = start + tl.arange(0, PLACES)
        token = tl.load(candidates + place, mask=place < num_candidates, other=-1)
        found += tl.sum((token >= 0).to(tl.int32), 0)
    samples = tl.minimum(found, SAMPLES)
    numbers = tl.arange(0, SAMPLES)
    there = numbers < samples
    place = numbers * found // tl.maximum(samples, 1)
    token = tl.load(candidates + place, mask=there, other=0)
    at = block_table + row * table_row + token // BLOCK_SIZE
    block = tl.load(at, mask=there, other=0).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    kept = channels < HEAD_SIZE
    at = key + block * key_block + head * key_head + token % BLOCK_SIZE * key_token
    at = at[:, None] + channels[None, :] * key_channel
    k = tl.load(at, mask=there[:, None] & kept[None, :], other=0.0).to(tl.float32)
    q = load_queries(query, row_head * PER_HEAD, PER_HEAD, ROWS, HEAD_SIZE, CHANNELS)
    low = tl.min(tl.where(there[:, None], k, float("inf")), 0)
    high = tl.max(tl.where(there[:, None], k, -float("inf")), 0)
    weight = tl.max(tl.abs(q.to(tl.float32)), 0) * (high - low)
    chosen = largest(weight, kept, COUNT)
    at = selected + row_head * COUNT + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(at, channels, mask=chosen)


@triton.jit
def _score_candidates(
    indices,  # int32 [R, Hk, num_indices]
    num_indices,
    mass,  # float32 [R, H]
    counters,  # int32 [>= R * Hk], 0
    scores,  # float32 [R, H, num_candidates]
    candidates,  # int32 [R, Hk, num_candidates]
    num_candidates,
    query,  # [R, H, d]
    selected,  # int32 [R, Hk, COUNT], or None for all channels
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    key_channel,
    block_table,  # int32 [R, max_blocks]
    table_row,
    tags,
    hot,
    factor,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACES: tl.constexpr,
    SETS: tl.constexpr,
):
    """Every so many runs of TOKENS candidates of one row and KV head, by all its query heads,
    in base 2; grid (parts, Hk, R). If PLACES is not 0, the last program selects the heaviest.
    """
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    row_head = row * tl.num_programs(1) + head
    proposed = candidates + row_head * num_candidates
    numbers, heads = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    read, real = numbers < COUNT, heads < PER_HEAD
    channels = numbers
    if selected is not None:
        channels = tl.load(selected + row_head * COUNT + numbers, mask=read, other=0)
    lines = row_head * PER_HEAD + heads
    q = query + lines[:, None] * HEAD_SIZE + channels[None, :]
    q = tl.load(q, mask=real[:, None] & read[None, :], other=0.0)
    key += head * key_head
    step = tl.num_programs(0) * TOKENS
    for start in range(tl.program_id(0) * TOKENS, num_candidates, step):
        place = start + tl.arange(0, TOKENS)
        token = tl.load(proposed + place, mask=place < num_candidates, other=-1)
        there = token >= 0
        at = block_table + row * table_row + token // BLOCK_SIZE
        block = tl.load(at, mask=there, other=0).to(tl.int64)
        offset = token % BLOCK_SIZE
        at = key + block * key_block + offset * key_token
        if tags is not None:
            slot = tl.where(there, block * BLOCK_SIZE + offset, 0)
            at, _ = hot_or_host(tags, hot, head, slot, there, at, at, SETS, HEAD_SIZE)
        at = at[:, None] + channels[None, :] * key_channel
        k = tl.load(at, mask=there[:, None] & read[None, :], other=0.0)
        products = cap_scores(dot(q, tl.trans(k)), factor, cap, CAPPED)
        at = lines[:, None] * num_candidates + place[None, :]
        tl.store(scores + at, products, mask=real[:, None] & there[None, :])
    if PLACES > 0:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if is_last(counters + row_head, tl.num_programs(0)):
            select_heaviest(
                indices,
                num_indices,
                candidates,
                num_candidates,
                scores,
                mass,
                row_head,
                PER_HEAD,
                PLACES,
            )


@triton.jit
def _select_heaviest(
    indices,  # int32 [R, Hk, num_indices]
    num_indices,
    candidates,  # int32 [R, Hk, num_candidates]
    num_candidates,
    scores,  # float32 [R, H, num_candidates], in base 2
    mass,  # float32 [R, H], in base e
    PER_HEAD: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The heaviest candidates of one row and KV head; grid (Hk, R)."""
    row_head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    select_heaviest(
        indices,
        num_indices,
        candidates,
        num_candidates,
        scores,
        mass,
        row_head,
        PER_HEAD,
        PLACES,
    )


def rerank_topk(
    indices: torch.Tensor,
    candidates: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    mass: torch.Tensor,
    channels: int,
    scale: float,
    softcap: float,
    hot: HotRows | None = None,
) -> None:
    """See `ops.rerank_topk`; up to 65536 candidates. Rows in `hot` are read from there.

    Raises:
        ValueError: there are more.
    """
    rows, num_heads, head_size = query.shape
    heads, num_candidates = candidates.shape[1:]
    if num_candidates > _MOST_CANDIDATES:
        raise ValueError(
            f"rerank_topk in Triton takes at most {_MOST_CANDIDATES} candidates, not "
            f"{num_candidates}; lower topk_tokens or rerank_factor"
        )
    if not num_candidates:
        indices.fill_(-1)
    if not rows or not num_candidates or not indices.shape[2]:
        return
    count = min(channels, head_size)
    places = triton.next_power_of_2(num_candidates)
    proposed = (candidates, num_candidates)
    pages = (key_cache, *key_cache.stride(), block_table, block_table.stride(0))
    shape = {
        "BLOCK_SIZE": key_cache.shape[2],
        "HEAD_SIZE": head_size,
        "COUNT": count,
        "PER_HEAD": num_heads // heads,
        "ROWS": max(16, triton.next_power_of_2(num_heads // heads)),
    }
    selected = None
    if count < head_size:
        selected = block_table.new_empty(rows, heads, count)
        _sample_channels[(heads, rows)](
            selected,
            *proposed,
            query,
            *pages,
            **shape,
            CHANNELS=triton.next_power_of_2(head_size),
            SAMPLES=_SAMPLES,
            PLACES=_BLOCK_PLACES,
            # One warp holds the samples of 128 channels, and exchanges nothing with others.
            num_warps=max(1, triton.next_power_of_2(head_size) // 128),
        )
    scores = torch.empty(
        (rows, num_heads, num_candidates), dtype=torch.float32, device=query.device
    )
    most = triton.cdiv(num_candidates, _BLOCK_TOKENS)
    tags, rows_kept, sets = hot_arguments(hot)
    _score_candidates[(split_count(query.device, rows * heads, most, 4), heads, rows)](
        indices,
        indices.shape[2],
        mass,
        counters(query.device, rows * heads),
        scores,
        *proposed,
        query,
        selected,
        *pages,
        tags,
        rows_kept,
        **score_factors(scale, softcap),
        **shape,
        # Products need 16 at least.
        CHANNELS=max(16, triton.next_power_of_2(count)),
        TOKENS=_BLOCK_TOKENS,
        PLACES=places if places <= _PLACES_WITH_SCORES else 0,
        SETS=sets,
        num_warps=2,
    )
    if places <= _PLACES_WITH_SCORES:
        return
    _select_heaviest[(heads, rows)](
        indices,
        indices.shape[2],
        *proposed,
        scores,
        mass,
        PER_HEAD=num_heads // heads,
        PLACES=places,
        # One warp exchanges nothing with others while it holds 16 weights a thread.
        num_warps=max(1, min(32, places // 512)),
    )
