"""Records of completed groups: low-bit codes, or the extremes of each channel.

In a decode step the tokens that complete them are written by the same launch.
"""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.library import check
from vllm_tailorkv.kernels.triton.hot import forget_slot, hot_arguments
from vllm_tailorkv.kernels.types import (
    ChannelIndex,
    DenseCodes,
    DerivedPages,
    GroupCodes,
    HotRows,
)

_TILE = 2048
"""Elements of K that a program holds in registers."""
_BLOCK_TOKENS = 32


@triton.jit
def _to_half(x):
    """The nearest float16, saturated. Adding 0 turns -0 into 0."""
    return (tl.minimum(tl.maximum(x, -65504.0), 65504.0) + 0.0).to(tl.float16)


@triton.jit
def _fitted_line(x, low, high, kept, AXIS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Scale and zero in float32 of the least squares line, as `ops.quantize_groups` defines them.

    `x` is [GROUP, n] or [n, GROUP], AXIS that of a group, of which COUNT are `kept`; low and high
    are [n]. No product is added to anything, so nothing contracts to a fused operation.
    """
    extent = high - low
    width = tl.div_rn(extent, 1023.0 + tl.zeros_like(extent))
    divisors = tl.expand_dims(tl.where(width == 0.0, 1.0, width), AXIS) + tl.zeros_like(x)
    steps = tl.div_rn(x - tl.expand_dims(low, AXIS), divisors)
    # 2^23 + step has no fraction: the addition rounds half to even.
    steps = (tl.minimum(steps, 1023.0) + 8388608.0).to(tl.int32, bitcast=True) & 1023
    steps = tl.where(kept, steps, 0)
    codes = (steps >= 512).to(tl.int32)
    if BITS == 2:
        codes += (steps >= 239).to(tl.int32) + (steps >= 785).to(tl.int32)
    sum_codes = tl.sum(codes, AXIS).to(tl.int64)
    sum_steps = tl.sum(steps, AXIS).to(tl.int64)
    spread = COUNT * tl.sum(codes * codes, AXIS).to(tl.int64) - sum_codes * sum_codes
    shared = COUNT * tl.sum(codes * steps, AXIS).to(tl.int64) - sum_codes * sum_steps
    offset = sum_steps * spread - shared * sum_codes
    # Where nothing spreads, the line is not used.
    divisor = tl.where(spread == 0, 1, spread).to(tl.float32)
    scale = tl.div_rn(extent * shared.to(tl.float32), 1023.0 * divisor)
    zero = low + tl.div_rn(extent * offset.to(tl.float32), (1023.0 * COUNT) * divisor)
    return scale, zero


@triton.jit
def _encode(
    x,
    low,
    high,
    kept,
    AXIS: tl.constexpr,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    FIT: tl.constexpr,
):
    """Scale and zero of groups in float16, as `ops.quantize_groups` defines them.

    Arguments are those of `_fitted_line`.
    """
    # An approximate division would round to another float16 now and then.
    step = tl.div_rn(high - low, (2**BITS - 1) * 1.0 + tl.zeros_like(high))
    scale, zero = _to_half(step), _to_half(low)
    if FIT and BITS <= 2:
        spanned = (scale == 0.0) | (step > 65504.0)
        fitted_scale, fitted_zero = _fitted_line(x, low, high, kept, AXIS, COUNT, BITS)
        scale = tl.where(spanned, scale, _to_half(fitted_scale))
        zero = tl.where(spanned, zero, _to_half(fitted_zero))
    return scale, zero


@triton.jit
def _round_codes(x, scale, zero, LEVELS: tl.constexpr):
    """Codes of x in int32; scale and zero broadcast against it."""
    divisor = scale.to(tl.float32)
    filled = divisor == 0.0
    codes = tl.div_rn(x - zero.to(tl.float32), tl.where(filled, 1.0, divisor) + tl.zeros_like(x))
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS * 1.0)
    # 2^23 + code has no fraction: the addition rounds half to even, the low bits are the code.
    codes = (codes + 8388608.0).to(tl.int32, bitcast=True) & LEVELS
    return tl.where(filled, 0, codes)


@triton.jit
def _encode_keys(
    x,  # float32 [GROUP, BLOCK]
    channels,
    codes,  # uint8 [d, GROUP * BITS / 8]
    scale,  # float16 [d]
    zero,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FIT: tl.constexpr,
):
    """Some channels of one group and head."""
    LEVELS: tl.constexpr = 2**BITS - 1
    PER_BYTE: tl.constexpr = 8 // BITS
    ROW_BYTES: tl.constexpr = GROUP // PER_BYTE
    kept = channels < HEAD_SIZE
    scales, zeros = _encode(x, tl.min(x, 0), tl.max(x, 0), kept[None, :], 0, GROUP, BITS, FIT)
    packed = tl.reshape(
        _round_codes(x, scales[None, :], zeros[None, :], LEVELS), (ROW_BYTES, PER_BYTE, x.shape[1])
    )
    packed = tl.sum(packed << (tl.arange(0, PER_BYTE) * BITS)[None, :, None], 1)
    at = codes + channels[None, :] * ROW_BYTES + tl.arange(0, ROW_BYTES)[:, None]
    tl.store(at, packed.to(tl.uint8), mask=kept[None, :])
    tl.store(scale + channels, scales, mask=kept)
    tl.store(zero + channels, zeros, mask=kept)


@triton.jit
def _encode_values(
    rows,  # V of the tokens, [BLOCK, 1] pointers
    value_channel,
    new,  # V of the token that `fresh` marks, or None
    fresh,  # bool [BLOCK]
    tokens,  # [BLOCK], within the group
    codes,  # uint8 [GROUP, ROW_BYTES]
    scale,  # float16 [GROUP, VALUE_GROUPS]
    zero,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FIT: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Some tokens of one group and head, one group of channels after the other."""
    LEVELS: tl.constexpr = 2**BITS - 1
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = GROUP // PER_BYTE
    shifts = (tl.arange(0, PER_BYTE) * BITS)[None, None, :]
    for part in tl.static_range(VALUE_GROUPS):
        channels = part * GROUP + tl.arange(0, GROUP)
        kept = (channels < HEAD_SIZE)[None, :]
        x = tl.load(rows + channels[None, :] * value_channel, mask=kept, other=0.0)
        if new is not None:
            x = tl.where(fresh[:, None], tl.load(new + channels[None, :], mask=kept, other=0.0), x)
        x = x.to(tl.float32)
        low = tl.min(tl.where(kept, x, float("inf")), 1)
        high = tl.max(tl.where(kept, x, -float("inf")), 1)
        scales, zeros = _encode(
            x, low, high, kept, 1, min(GROUP, HEAD_SIZE - part * GROUP), BITS, FIT and BITS == 1
        )
        packed = tl.where(kept, _round_codes(x, scales[:, None], zeros[:, None], LEVELS), 0)
        packed = tl.sum(tl.reshape(packed, (x.shape[0], BYTES, PER_BYTE)) << shifts, 2)
        at = part * BYTES + tl.arange(0, BYTES)
        tl.store(
            codes + tokens[:, None] * ROW_BYTES + at[None, :],
            packed.to(tl.uint8),
            mask=(at < ROW_BYTES)[None, :],
        )
        tl.store(scale + tokens * VALUE_GROUPS + part, scales)
        tl.store(zero + tokens * VALUE_GROUPS + part, zeros)


@triton.jit
def _copy_row(to, to_channel, row, HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """One token's K or V of one head."""
    channels = tl.arange(0, CHANNELS)
    kept = channels < HEAD_SIZE
    tl.store(to + channels * to_channel, tl.load(row + channels, mask=kept), mask=kept)


@triton.jit
def _derive(
    groups,  # int64 [N], negative for none
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
    new_key,  # [N, Hk, d], or None: no token is written
    new_key_token,
    new_key_head,
    new_value,  # [N, Hk, d]
    new_value_token,
    new_value_head,
    slots,  # int64 [N]
    tags,  # int32 [Hk, SETS], or None
    codes,  # uint8 [NB, Hk, G, d, GROUP * BITS / 8], or None
    codes_block,
    codes_head,
    codes_group,
    scale,  # float16 [NB, Hk, G, d], zero with the same strides
    zero,
    scale_block,
    scale_head,
    scale_group,
    value_codes,  # uint8 [NB, Hk, G, GROUP, ROW_BYTES], or None
    value_codes_block,
    value_codes_head,
    value_codes_group,
    value_scale,  # float16 [NB, Hk, G, GROUP, VALUE_GROUPS], zero with the same strides
    value_zero,
    value_scale_block,
    value_scale_head,
    value_scale_group,
    extremes,  # [NB, Hk, G, 2, d], K's dtype, or None
    extremes_block,
    extremes_head,
    extremes_group,
    PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FIT: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    SETS: tl.constexpr,
):
    """One group of one head: BLOCK channels of K, or TOKENS tokens of V. Grid (N, Hk, parts), the
    first KEY_PARTS those of K.

    A new token completes the group of its number. All programs take it from where it comes from,
    not from its page, which the first of them writes: none waits for another.
    """
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    item = tl.load(groups + number)
    fresh = -1
    if new_key is not None:
        slot = tl.load(slots + number)
        new_key += number * new_key_token + head * new_key_head
        new_value += number * new_value_token + head * new_value_head
        if (part == 0) & (slot >= 0):
            if tags is not None:
                forget_slot(tags, head, slot, SETS)
            page, offset = slot // (PER_BLOCK * GROUP), slot % (PER_BLOCK * GROUP)
            to = key + page * key_block + head * key_head + offset * key_token
            _copy_row(to, key_channel, new_key, HEAD_SIZE, CHANNELS)
            to = value + page * value_block + head * value_head + offset * value_token
            _copy_row(to, value_channel, new_value, HEAD_SIZE, CHANNELS)
        fresh = (slot % GROUP).to(tl.int32)
    if item < 0:
        return
    block, group = item // PER_BLOCK, item % PER_BLOCK
    if part < KEY_PARTS:
        channels = part * BLOCK + tl.arange(0, BLOCK)
        kept = (channels < HEAD_SIZE)[None, :]
        tokens = tl.arange(0, GROUP)
        at = key + block * key_block + head * key_head
        at += (group * GROUP + tokens)[:, None] * key_token + channels[None, :] * key_channel
        x = tl.load(at, mask=kept, other=0.0)
        if new_key is not None:
            row = tl.load(new_key + channels[None, :], mask=kept, other=0.0)
            x = tl.where((tokens == fresh)[:, None], row, x)
        x = x.to(tl.float32)
        if extremes is not None:
            to = extremes + block * extremes_block + head * extremes_head
            to += group * extremes_group + channels
            lowest = tl.min(x, 0).to(extremes.dtype.element_ty)
            highest = tl.max(x, 0).to(extremes.dtype.element_ty)
            tl.store(to, lowest, mask=channels < HEAD_SIZE)
            tl.store(to + HEAD_SIZE, highest, mask=channels < HEAD_SIZE)
        else:
            record = block * scale_block + head * scale_head + group * scale_group
            _encode_keys(
                x,
                channels,
                codes + block * codes_block + head * codes_head + group * codes_group,
                scale + record,
                zero + record,
                HEAD_SIZE,
                GROUP,
                BITS,
                FIT,
            )
    elif value_codes is not None:
        places = (part - KEY_PARTS) * TOKENS + tl.arange(0, TOKENS)
        rows = value + block * value_block + head * value_head
        rows += (group * GROUP + places)[:, None] * value_token
        record = block * value_codes_block + head * value_codes_head + group * value_codes_group
        line = block * value_scale_block + head * value_scale_head + group * value_scale_group
        _encode_values(
            rows,
            value_channel,
            new_value,
            places == fresh,
            places,
            value_codes + record,
            value_scale + line,
            value_zero + line,
            HEAD_SIZE,
            GROUP,
            BITS,
            FIT,
            VALUE_GROUPS,
            ROW_BYTES,
        )


_Arguments = tuple[torch.Tensor | int | None, ...]
_NO_CODES: _Arguments = (None, 0, 0, 0, None, None, 0, 0, 0)


def _strides(codes: GroupCodes) -> _Arguments:
    """The kernel's arguments for one set of codes."""
    return (codes.codes, *codes.codes.stride()[:3], *codes[1:], *codes.scale.stride()[:3])


def _launch(
    groups: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    derived: DerivedPages,
    fit: bool,
    new: _Arguments,
    hot: HotRows | None = None,
) -> None:
    if not len(groups):
        return
    _, heads, block_size, head_size = key_cache.shape
    records = derived.extremes if isinstance(derived, ChannelIndex) else derived.key.scale
    per_block = records.shape[2]
    group_size = block_size // per_block
    channels = triton.next_power_of_2(head_size)
    block = min(_TILE // group_size, channels)
    key_parts = triton.cdiv(head_size, block)
    parts, bits, value_groups, row_bytes = key_parts, 1, 1, 1
    key, value, extremes = _NO_CODES, _NO_CODES, _NO_CODES[:4]
    if isinstance(derived, ChannelIndex):
        extremes = (derived.extremes, *derived.extremes.stride()[:3])
    else:
        bits = derived.key.codes.shape[4] * 8 // group_size
        key = _strides(derived.key)
    if isinstance(derived, DenseCodes):
        parts += group_size // _BLOCK_TOKENS
        value = _strides(derived.value)
        value_groups, row_bytes = derived.value.scale.shape[4], derived.value.codes.shape[4]
    tags, _, sets = hot_arguments(hot)
    _derive[(len(groups), heads, parts)](
        groups,
        key_cache,
        *key_cache.stride(),
        value_cache,
        *value_cache.stride(),
        *new,
        tags,
        *key,
        *value,
        *extremes,
        PER_BLOCK=per_block,
        HEAD_SIZE=head_size,
        CHANNELS=channels,
        GROUP=group_size,
        BITS=bits,
        FIT=fit,
        VALUE_GROUPS=value_groups,
        ROW_BYTES=row_bytes,
        KEY_PARTS=key_parts,
        BLOCK=block,
        TOKENS=_BLOCK_TOKENS,
        SETS=sets,
    )


def quantize_groups(
    groups: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
) -> None:
    """See `ops.quantize_groups`."""
    new = (None, 0, 0, None, 0, 0, None)
    _launch(groups, key_cache, value_cache, derived, fit, new)


def append_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    groups: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
    hot: HotRows | None = None,
) -> None:
    """See `ops.append_tokens`."""
    check("write_kv", key, value, key_cache, value_cache, slot_mapping)
    check("quantize_groups", groups, key_cache, value_cache, derived, fit)
    new: _Arguments = (key, *key.stride()[:2], value, *value.stride()[:2], slot_mapping)
    _launch(groups, key_cache, value_cache, derived, fit, new, hot)
