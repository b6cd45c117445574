"""Records of completed groups: low-bit codes, or the extremes of each channel."""

import torch
import triton
import triton.language as tl

from vllm_tailorkv.kernels.types import ChannelIndex, DenseCodes, DerivedPages, GroupCodes

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
def _quantize_keys(
    groups,  # int64 [N], negative for none
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    key_channel,
    codes,  # uint8 [NB, Hk, G, d, GROUP * BITS / 8]
    codes_block,
    codes_head,
    codes_group,
    scale,  # float16 [NB, Hk, G, d], zero with the same strides
    zero,
    scale_block,
    scale_head,
    scale_group,
    PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of one head, BLOCK channels; grid (N, Hk, channels / BLOCK)."""
    LEVELS: tl.constexpr = 2**BITS - 1
    PER_BYTE: tl.constexpr = 8 // BITS
    ROW_BYTES: tl.constexpr = GROUP // PER_BYTE
    item = tl.load(groups + tl.program_id(0))
    if item < 0:
        return
    block, group = item // PER_BLOCK, item % PER_BLOCK
    head = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    tokens = group * GROUP + tl.arange(0, GROUP)
    kept = channels < HEAD_SIZE
    at = key + block * key_block + head * key_head
    at += tokens[:, None] * key_token + channels[None, :] * key_channel
    x = tl.load(at, mask=kept[None, :], other=0.0).to(tl.float32)
    scales, zeros = _encode(x, tl.min(x, 0), tl.max(x, 0), kept[None, :], 0, GROUP, BITS, FIT)
    packed = tl.reshape(
        _round_codes(x, scales[None, :], zeros[None, :], LEVELS), (ROW_BYTES, PER_BYTE, BLOCK)
    )
    shifts = (tl.arange(0, PER_BYTE) * BITS)[None, :, None]
    packed = tl.sum(packed << shifts, 1)
    at = codes + block * codes_block + head * codes_head + group * codes_group
    at += channels[None, :] * ROW_BYTES + tl.arange(0, ROW_BYTES)[:, None]
    tl.store(at, packed.to(tl.uint8), mask=kept[None, :])
    at = block * scale_block + head * scale_head + group * scale_group + channels
    tl.store(scale + at, scales, mask=kept)
    tl.store(zero + at, zeros, mask=kept)


@triton.jit
def _quantize_values(
    groups,  # int64 [N], negative for none
    value,  # [NB, Hk, bs, d]
    value_block,
    value_head,
    value_token,
    value_channel,
    codes,  # uint8 [NB, Hk, G, GROUP, ROW_BYTES]
    codes_block,
    codes_head,
    codes_group,
    scale,  # float16 [NB, Hk, G, GROUP, VALUE_GROUPS], zero with the same strides
    zero,
    scale_block,
    scale_head,
    scale_group,
    PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    FIT: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens of one group and head, one group of channels after the other.

    Grid (N, Hk, GROUP / BLOCK).
    """
    LEVELS: tl.constexpr = 2**BITS - 1
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = GROUP // PER_BYTE
    item = tl.load(groups + tl.program_id(0))
    if item < 0:
        return
    block, group = item // PER_BLOCK, item % PER_BLOCK
    head = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    value += block * value_block + head * value_head
    rows = value + (group * GROUP + tokens)[:, None] * value_token
    codes += block * codes_block + head * codes_head + group * codes_group
    scales_at = block * scale_block + head * scale_head + group * scale_group
    shifts = (tl.arange(0, PER_BYTE) * BITS)[None, None, :]
    for part in tl.static_range(VALUE_GROUPS):
        channels = part * GROUP + tl.arange(0, GROUP)
        kept = (channels < HEAD_SIZE)[None, :]
        x = tl.load(rows + channels[None, :] * value_channel, mask=kept, other=0.0)
        x = x.to(tl.float32)
        low = tl.min(tl.where(kept, x, float("inf")), 1)
        high = tl.max(tl.where(kept, x, -float("inf")), 1)
        scales, zeros = _encode(
            x, low, high, kept, 1, min(GROUP, HEAD_SIZE - part * GROUP), BITS, FIT and BITS == 1
        )
        packed = tl.where(kept, _round_codes(x, scales[:, None], zeros[:, None], LEVELS), 0)
        packed = tl.sum(tl.reshape(packed, (BLOCK, BYTES, PER_BYTE)) << shifts, 2)
        at = part * BYTES + tl.arange(0, BYTES)
        tl.store(
            codes + tokens[:, None] * ROW_BYTES + at[None, :],
            packed.to(tl.uint8),
            mask=(at < ROW_BYTES)[None, :],
        )
        tl.store(scale + scales_at + tokens * VALUE_GROUPS + part, scales)
        tl.store(zero + scales_at + tokens * VALUE_GROUPS + part, zeros)


@triton.jit
def _reduce_channels(
    groups,  # int64 [N], negative for none
    key,  # [NB, Hk, bs, d]
    key_block,
    key_head,
    key_token,
    key_channel,
    extremes,  # [NB, Hk, G, 2, d], K's dtype
    extremes_block,
    extremes_head,
    extremes_group,
    PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of one head, BLOCK channels; grid (N, Hk, channels / BLOCK)."""
    item = tl.load(groups + tl.program_id(0))
    if item < 0:
        return
    block, group = item // PER_BLOCK, item % PER_BLOCK
    head = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    tokens = group * GROUP + tl.arange(0, GROUP)
    kept = channels < HEAD_SIZE
    at = key + block * key_block + head * key_head
    at += tokens[:, None] * key_token + channels[None, :] * key_channel
    x = tl.load(at, mask=kept[None, :], other=0.0).to(tl.float32)
    at = (
        extremes + block * extremes_block + head * extremes_head + group * extremes_group + channels
    )
    tl.store(at, tl.min(x, 0).to(extremes.dtype.element_ty), mask=kept)
    tl.store(at + HEAD_SIZE, tl.max(x, 0).to(extremes.dtype.element_ty), mask=kept)


def _strides(codes: GroupCodes) -> tuple[torch.Tensor | int, ...]:
    """The kernels' arguments for one set of codes."""
    return (codes.codes, *codes.codes.stride()[:3], *codes[1:], *codes.scale.stride()[:3])


def quantize_groups(
    groups: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
) -> None:
    """See `ops.quantize_groups`."""
    if not len(groups):
        return
    _, heads, block_size, head_size = key_cache.shape
    records = derived.extremes if isinstance(derived, ChannelIndex) else derived.key.scale
    per_block = records.shape[2]
    group_size = block_size // per_block
    block = min(_TILE // group_size, triton.next_power_of_2(head_size))
    grid = (len(groups), heads, triton.cdiv(head_size, block))
    shape = {"PER_BLOCK": per_block, "HEAD_SIZE": head_size, "GROUP": group_size}
    key = (key_cache, *key_cache.stride())
    if isinstance(derived, ChannelIndex):
        strides = derived.extremes.stride()[:3]
        _reduce_channels[grid](groups, *key, derived.extremes, *strides, **shape, BLOCK=block)
        return
    bits = derived.key.codes.shape[4] * 8 // group_size
    shape |= {"BITS": bits, "FIT": fit}
    _quantize_keys[grid](groups, *key, *_strides(derived.key), **shape, BLOCK=block)
    if isinstance(derived, DenseCodes):
        _quantize_values[(len(groups), heads, group_size // _BLOCK_TOKENS)](
            groups,
            value_cache,
            *value_cache.stride(),
            *_strides(derived.value),
            **shape,
            VALUE_GROUPS=derived.value.scale.shape[4],
            ROW_BYTES=derived.value.codes.shape[4],
            BLOCK=_BLOCK_TOKENS,
        )
