"""Attention of a dense layer: codes of K and V, and an exact tail from the host pages."""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.triton.attend import (
    allocate_parts,
    attend_token_rows,
    cap_scores,
    dot,
    load_queries,
    merge,
    merge_if_last,
    score_factors,
)
from vllm_tailorkv.kernels.triton.codes import (
    code_numbers,
    dot_key_codes,
    expand_codes,
    join_rows,
    split_rows,
)
from vllm_tailorkv.kernels.triton.launch import as_words, split_count
from vllm_tailorkv.kernels.types import DenseCodes, GroupCodes

_TAIL_PARTS = 4
"""Programs of a row and head that read the tail, over the bus, while the others read codes."""
_TAIL_TOKENS = 32


@triton.jit
def _attend_tail(
    query,
    key,
    key_block,
    key_head,
    key_token,
    key_channel,
    value,
    value_block,
    value_head,
    value_token,
    value_channel,
    block_table,
    start,
    length,
    head,
    row_head,
    part,
    factor,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Every PARTS-th run of TOKENS exact rows of [start, length)."""
    q = load_queries(query, row_head * PER_HEAD, PER_HEAD, ROWS, HEAD_SIZE, CHANNELS)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(start + part * TOKENS, length, PARTS * TOKENS):
        token = first + tl.arange(0, TOKENS)
        best, total, output = attend_token_rows(
            q,
            key,
            value,
            token,
            token < length,
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
            CAPPED,
            BLOCK_SIZE,
            HEAD_SIZE,
        )
    return best, total, output


@triton.jit
def _attend_groups(
    query,
    key_words,
    key_words_block,
    key_words_head,
    key_words_group,
    key_scale,
    key_zero,
    key_scale_block,
    key_scale_head,
    key_scale_group,
    value_words,
    value_words_block,
    value_words_head,
    value_words_group,
    value_scale,
    value_zero,
    value_scale_block,
    value_scale_head,
    value_scale_group,
    block_table,
    start,
    end,
    head,
    row_head,
    factor,
    cap,
    CAPPED: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KEY_WORD_BITS: tl.constexpr,
    VALUE_WORD_BITS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The groups [start, end): best, total and, by group of channels, output."""
    KEY_WORDS: tl.constexpr = GROUP * BITS // KEY_WORD_BITS
    VALUE_WORDS: tl.constexpr = GROUP * BITS // VALUE_WORD_BITS
    q = load_queries(query, row_head * PER_HEAD, PER_HEAD, ROWS, HEAD_SIZE, CHANNELS)
    q = q.to(tl.float32)
    channels = tl.arange(0, CHANNELS)
    kept = channels < HEAD_SIZE
    numbers = tl.arange(0, PADDED_GROUPS)
    there = (numbers < VALUE_GROUPS)[:, None]
    within_key = channels[:, None] * KEY_WORDS + tl.arange(0, KEY_WORDS)[None, :]
    # V's tokens in the order of K's scores. Words of V by group of channels, then by token.
    tokens = code_numbers(GROUP, BITS, KEY_WORD_BITS)
    word = tl.reshape(
        tl.broadcast_to(numbers[:, None] * VALUE_WORDS, (PADDED_GROUPS, GROUP)),
        (PADDED_GROUPS * GROUP,),
    )
    word = word[:, None] + tl.arange(0, VALUE_WORDS)[None, :]
    lines = tl.reshape(
        tl.broadcast_to(tokens[None, :] * ROW_WORDS, (PADDED_GROUPS, GROUP)),
        (PADDED_GROUPS * GROUP,),
    )
    within_value = lines[:, None] + word
    within_scale = tokens[None, :] * VALUE_GROUPS + numbers[:, None]
    best = tl.full([ROWS], -float("inf"), tl.float32)
    # Sums over tokens wait until the end, when they are made once.
    total = tl.zeros([ROWS, GROUP], tl.float32)
    products = tl.zeros([PADDED_GROUPS, 2 * ROWS, GROUP], tl.float32)
    offsets = tl.zeros([PADDED_GROUPS, ROWS, GROUP], tl.float32)
    for index in range(start, end):
        block = tl.load(block_table + index // PER_BLOCK).to(tl.int64)
        group = index % PER_BLOCK
        base = block * key_words_block + head * key_words_head + group * key_words_group
        codes = tl.load(key_words + base + within_key, mask=kept[:, None], other=0)
        base = block * key_scale_block + head * key_scale_head + group * key_scale_group
        scale = tl.load(key_scale + base + channels, mask=kept, other=0.0).to(tl.float32)
        zero = tl.load(key_zero + base + channels, mask=kept, other=0.0).to(tl.float32)
        base = block * value_words_block + head * value_words_head + group * value_words_group
        words = tl.load(value_words + base + within_value, mask=word < ROW_WORDS, other=0)
        base = block * value_scale_block + head * value_scale_head + group * value_scale_group
        scales = tl.load(value_scale + base + within_scale, mask=there, other=0.0)
        zeros = tl.load(value_zero + base + within_scale, mask=there, other=0.0)
        scales = scales.to(tl.float32) * 2**BITS
        zeros = zeros.to(tl.float32) - scales

        scores = dot_key_codes(q, codes, scale, zero, BITS, KEY_WORD_BITS)
        scores = cap_scores(scores, factor, cap, CAPPED)
        larger = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - larger)
        best = larger
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink[:, None] + weights
        scaled = split_rows(weights[None, :, :] * scales[:, None, :])
        expanded = expand_codes(words, BITS, VALUE_WORD_BITS)
        expanded = tl.reshape(expanded, (PADDED_GROUPS, GROUP, GROUP))
        both = tl.reshape(tl.broadcast_to(shrink[None, :], (2, ROWS)), (2 * ROWS,))
        products = products * both[None, :, None] + dot(scaled, expanded)
        offsets *= shrink[None, :, None]
        offsets += weights[None, :, :] * zeros[:, None, :]
    return best, tl.sum(total, 1), join_rows(products) + tl.sum(offsets, 2)[:, :, None]


@triton.jit
def _attend_codes(
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
    key_words,  # [NB, Hk, G, d, GROUP * BITS / KEY_WORD_BITS]
    key_words_block,
    key_words_head,
    key_words_group,
    key_scale,  # float16 [NB, Hk, G, d], zero with the same strides
    key_zero,
    key_scale_block,
    key_scale_head,
    key_scale_group,
    value_words,  # [NB, Hk, G, GROUP, ROW_WORDS]
    value_words_block,
    value_words_head,
    value_words_group,
    value_scale,  # float16 [NB, Hk, G, GROUP, VALUE_GROUPS], zero with the same strides
    value_zero,
    value_scale_block,
    value_scale_head,
    value_scale_group,
    block_table,  # int32 [R, max_blocks]
    table_row,
    seq_lens,  # int32 [R]
    tail_start,  # int32 [R]
    sink_logits,  # float32 [H], or None
    factor,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KEY_WORD_BITS: tl.constexpr,
    VALUE_WORD_BITS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
    TAIL_PARTS: tl.constexpr,
    TAIL_TOKENS: tl.constexpr,
    MERGED: tl.constexpr,
):
    """One row and KV head: the first TAIL_PARTS programs read the exact tail, the others a
    run of groups each; the last program may merge all. Grid (parts, Hk, R).
    """
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    parts, part = tl.num_programs(0), tl.program_id(0)
    row_head = row * tl.num_programs(1) + head
    table = block_table + row * table_row
    coded = tl.load(tail_start + row)
    if part < TAIL_PARTS:
        tail_heads, channels = tl.arange(0, TAIL_ROWS), tl.arange(0, CHANNELS)
        tail_best, tail_total, tail_output = _attend_tail(
            query,
            key,
            key_block,
            key_head,
            key_token,
            key_channel,
            value,
            value_block,
            value_head,
            value_token,
            value_channel,
            table,
            coded,
            tl.load(seq_lens + row),
            head,
            row_head,
            part,
            factor,
            cap,
            CAPPED,
            BLOCK_SIZE,
            HEAD_SIZE,
            CHANNELS,
            PER_HEAD,
            TAIL_ROWS,
            TAIL_PARTS,
            TAIL_TOKENS,
        )
        tail_at = (row_head * PER_HEAD + tail_heads) * parts + part
        tail_real = tail_heads < PER_HEAD
        tl.store(best + tail_at, tail_best, mask=tail_real)
        tl.store(totals + tail_at, tail_total, mask=tail_real)
        tl.store(
            sums + tail_at[:, None] * HEAD_SIZE + channels[None, :],
            tail_output,
            mask=tail_real[:, None] & (channels < HEAD_SIZE)[None, :],
        )
    else:
        groups = coded // GROUP
        share = tl.cdiv(groups, parts - TAIL_PARTS)
        start = (part - TAIL_PARTS) * share
        highest, total, summed = _attend_groups(
            query,
            key_words,
            key_words_block,
            key_words_head,
            key_words_group,
            key_scale,
            key_zero,
            key_scale_block,
            key_scale_head,
            key_scale_group,
            value_words,
            value_words_block,
            value_words_head,
            value_words_group,
            value_scale,
            value_zero,
            value_scale_block,
            value_scale_head,
            value_scale_group,
            table,
            start,
            tl.minimum(start + share, groups),
            head,
            row_head,
            factor,
            cap,
            CAPPED,
            BLOCK_SIZE // GROUP,
            HEAD_SIZE,
            CHANNELS,
            GROUP,
            BITS,
            KEY_WORD_BITS,
            VALUE_WORD_BITS,
            ROW_WORDS,
            VALUE_GROUPS,
            PADDED_GROUPS,
            PER_HEAD,
            ROWS,
        )
        heads, numbers = tl.arange(0, ROWS), tl.arange(0, PADDED_GROUPS)
        at = (row_head * PER_HEAD + heads) * parts + part
        real = heads < PER_HEAD
        tl.store(best + at, highest, mask=real)
        tl.store(totals + at, total, mask=real)
        order = code_numbers(GROUP, BITS, VALUE_WORD_BITS)
        channel = numbers[:, None, None] * GROUP + order[None, None, :]
        mask = real[None, :, None] & (channel < HEAD_SIZE)
        tl.store(sums + at[None, :, None] * HEAD_SIZE + channel, summed, mask=mask)
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


def _arguments(codes: GroupCodes, words: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    return (words, *words.stride()[:3], *codes[1:], *codes.scale.stride()[:3])


def _num_warps(elements: int, bits: int) -> int:
    """As few as hold a group without spilling: the fewer, the less they exchange.

    Args:
        elements: codes of K in a group, for every 8 query heads, twice for float32.
        bits: of a code.
    """
    if elements > 8192:
        return 8
    return 4 if bits == 4 else 2


def quantized_decode_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    codes: DenseCodes,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """See `ops.quantized_decode_attention`."""
    rows, num_heads, head_size = query.shape
    if not rows:
        return
    heads, block_size = key_cache.shape[1:3]
    group_size = block_size // codes.key.scale.shape[2]
    bits = codes.key.codes.shape[4] * 8 // group_size
    channels = triton.next_power_of_2(head_size)
    per_head, value_groups = num_heads // heads, codes.value.scale.shape[4]
    key_words, value_words = as_words(codes.key.codes), as_words(codes.value.codes)
    most = block_table.shape[1] * block_size // group_size
    parts = _TAIL_PARTS + split_count(query.device, rows * heads, most, 8)
    query_rows = max(8, triton.next_power_of_2(per_head))
    elements = channels * group_size * query_rows // 8 * query.element_size() // 2
    results = allocate_parts(query, heads, parts)
    _attend_codes[(parts, heads, rows)](
        output,
        *results[:4],
        query,
        key_cache,
        *key_cache.stride(),
        value_cache,
        *value_cache.stride(),
        *_arguments(codes.key, key_words),
        *_arguments(codes.value, value_words),
        block_table,
        block_table.stride(0),
        seq_lens,
        tail_start,
        sink_logits,
        **score_factors(scale, softcap),
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        GROUP=group_size,
        BITS=bits,
        KEY_WORD_BITS=8 * key_words.element_size(),
        VALUE_WORD_BITS=8 * value_words.element_size(),
        ROW_WORDS=value_words.shape[4],
        VALUE_GROUPS=value_groups,
        PADDED_GROUPS=triton.next_power_of_2(value_groups),
        PER_HEAD=per_head,
        ROWS=query_rows,
        TAIL_ROWS=max(16, triton.next_power_of_2(per_head)),
        TAIL_PARTS=_TAIL_PARTS,
        TAIL_TOKENS=_TAIL_TOKENS,
        MERGED=results.merged,
        num_warps=_num_warps(elements, bits),
    )
    merge(output, results, sink_logits)
