"""Every op in plain torch and float32: the truth that the fast versions are tested against.

Written to be read. One row or one group at a time where that is clearer; speed is no aim.
"""

import itertools
import math

import torch

from vllm_tailorkv.kernels.types import (
    SPREAD_GROUPS,
    STAGED_PADDING,
    ChannelIndex,
    DenseCodes,
    DerivedPages,
    GroupCodes,
    TokenIndex,
)

FLOAT16_MAX = torch.finfo(torch.float16).max
FIT_STEPS = 1023
"""Steps of a group's range in which a line is fitted; see `ops.quantize_groups`."""
FIT_THRESHOLDS = {1: (512,), 2: (239, 512, 785)}
"""Steps from which a rough code is one more, by bits."""


def unavailable() -> str | None:
    """Always there."""
    return None


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the last axis, code i at bit `i*b % 8` of byte `i*b // 8`.

    Args:
        codes: uint8 [..., n], each below `2^bits`; n is padded to whole bytes with 0.

    Returns:
        uint8 [..., ceil(n * bits / 8)].
    """
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    codes = torch.nn.functional.pad(codes, (0, padding))
    codes = codes.reshape(*codes.shape[:-1], -1, per_byte).to(torch.int32)
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * bits
    return (codes << shifts).sum(-1).to(torch.uint8)


def unpack_codes(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The inverse of `pack_codes`: uint8 [..., bytes] to uint8 [..., length]."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=packed.device, dtype=torch.int32) * bits
    codes = (packed.unsqueeze(-1).to(torch.int32) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :length].to(torch.uint8)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 to float16, saturated."""
    # Adding 0 turns -0 into 0: which of the two a minimum is, depends on the order.
    return (x.clamp(-FLOAT16_MAX, FLOAT16_MAX) + 0.0).to(torch.float16)


def fitted_line(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of the least squares line from rough codes to x; see `ops.quantize_groups`.

    Args:
        x: float32 [..., n], not constant along the last axis.

    Returns:
        float32 [...] each.
    """
    n = x.shape[-1]
    low = x.amin(-1, keepdim=True)
    extent = x.amax(-1, keepdim=True) - low
    steps = ((x - low) / (extent / FIT_STEPS)).round().nan_to_num().long()
    codes = (steps.unsqueeze(-1) >= steps.new_tensor(FIT_THRESHOLDS[bits])).long().sum(-1)
    sum_codes, sum_steps = codes.sum(-1), steps.sum(-1)
    spread = n * (codes * codes).sum(-1) - sum_codes * sum_codes
    shared = n * (codes * steps).sum(-1) - sum_codes * sum_steps
    offset = sum_steps * spread - shared * sum_codes
    extent, low = extent.squeeze(-1), low.squeeze(-1)
    scale = extent * shared.float() / (FIT_STEPS * spread.float())
    zero = low + extent * offset.float() / (FIT_STEPS * n * spread.float())
    return scale, zero


def quantize(
    x: torch.Tensor, bits: int, fit: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize along the last axis, one group.

    Args:
        x: float32 [..., n].
        fit: see `ops.quantize_groups`.

    Returns:
        codes uint8 [..., n]; scale and zero float16 [...].
    """
    levels = 2**bits - 1
    low, high = x.amin(-1), x.amax(-1)
    step = (high - low) / levels
    scale, zero = to_half(step), to_half(low)
    if fit and bits in FIT_THRESHOLDS:
        spanned = (scale == 0) | (step > FLOAT16_MAX)
        fitted_scale, fitted_zero = fitted_line(x, bits)
        scale = torch.where(spanned, scale, to_half(fitted_scale))
        zero = torch.where(spanned, zero, to_half(fitted_zero))
    divisor = scale.float().unsqueeze(-1)
    codes = ((x - zero.float().unsqueeze(-1)) / divisor).round().clamp(0, levels)
    codes = torch.where(divisor == 0, torch.zeros_like(codes), codes)
    return codes.to(torch.uint8), scale, zero


def quantize_rows(
    x: torch.Tensor, bits: int, group_size: int, fit: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize V rows, every `group_size` channels on their own, the last group partial.

    Args:
        x: float32 [..., d].

    Returns:
        packed codes uint8 [..., ceil(d*b/8)]; scale and zero float16 [..., Vg].
    """
    fit = fit and bits == 1
    parts = [quantize(part, bits, fit) for part in x.split(group_size, dim=-1)]
    codes = torch.cat([part[0] for part in parts], dim=-1)
    scale = torch.stack([part[1] for part in parts], dim=-1)
    zero = torch.stack([part[2] for part in parts], dim=-1)
    return pack_codes(codes, bits), scale, zero


def dequantize_keys(codes: GroupCodes, block: int, group_size: int) -> torch.Tensor:
    """K of one block from its codes: float32 [Hk, bs, d]."""
    bits = codes.codes.shape[4] * 8 // group_size
    x = unpack_codes(codes.codes[block], bits, group_size).float()
    x = x * codes.scale[block].float().unsqueeze(-1) + codes.zero[block].float().unsqueeze(-1)
    return x.transpose(2, 3).flatten(1, 2)


def dequantize_values(
    codes: GroupCodes, block: int, group_size: int, bits: int, head_size: int
) -> torch.Tensor:
    """V of one block from its codes: float32 [Hk, bs, d]."""
    x = unpack_codes(codes.codes[block], bits, head_size).float()
    scale = codes.scale[block].float().repeat_interleave(group_size, -1)[..., :head_size]
    zero = codes.zero[block].float().repeat_interleave(group_size, -1)[..., :head_size]
    return (x * scale + zero).flatten(1, 2)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_rows: torch.Tensor | None = None,
) -> None:
    """See `ops.write_kv`."""
    block_size = key_cache.shape[2]
    slots = slot_mapping[: key.shape[0]]
    valid = slots >= 0
    blocks, offsets = slots[valid] // block_size, slots[valid] % block_size
    key_cache[blocks, :, offsets] = key[valid]
    value_cache[blocks, :, offsets] = value[valid]
    if key_rows is not None:
        key_rows[blocks, :, offsets] = key[valid]


def quantize_groups(
    groups: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
) -> None:
    """See `ops.quantize_groups`."""
    block_size = key_cache.shape[2]
    records = derived.extremes if isinstance(derived, ChannelIndex) else derived.key.scale
    per_block = records.shape[2]
    group_size = block_size // per_block
    for item in groups.tolist():
        if item < 0:
            continue
        block, group = divmod(item, per_block)
        tokens = slice(group * group_size, (group + 1) * group_size)
        key = key_cache[block, :, tokens].float()
        if isinstance(derived, ChannelIndex):
            extremes = torch.stack((key.amin(1), key.amax(1)), dim=1)
            derived.extremes[block, :, group] = extremes.to(key_cache.dtype)
            continue
        bits = derived.key.codes.shape[4] * 8 // group_size
        codes, scale, zero = quantize(key.transpose(1, 2), bits, fit)
        derived.key.codes[block, :, group] = pack_codes(codes, bits)
        derived.key.scale[block, :, group] = scale
        derived.key.zero[block, :, group] = zero
        if isinstance(derived, DenseCodes):
            value = value_cache[block, :, tokens].float()
            packed, scale, zero = quantize_rows(value, bits, group_size, fit)
            derived.value.codes[block, :, group] = packed
            derived.value.scale[block, :, group] = scale
            derived.value.zero[block, :, group] = zero


def gather_rows(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens: [NB, Hk, bs, d] and int [n] blocks to float32 [Hk, length, d]."""
    block_size = cache.shape[2]
    pages = cache[blocks[: math.ceil(length / block_size)].long()].float()
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


def stage_rows(
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_start: torch.Tensor,
    first_token: int,
    max_tokens: int,
) -> None:
    """See `ops.stage_rows`."""
    block_size = key_cache.shape[2]
    starts = context_start.tolist()
    if max_tokens and len(starts) > 1:
        key_rows[starts[-1] : starts[-1] + STAGED_PADDING] = 0
        value_rows[starts[-1] : starts[-1] + STAGED_PADDING] = 0
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        position = torch.arange(first_token, first_token + end - start, device=key_cache.device)
        block, offset = block_table[row, position // block_size].long(), position % block_size
        key_rows[start:end] = key_cache[block, :, offset]
        value_rows[start:end] = value_cache[block, :, offset]


def weigh(scores: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """The softmax of scores [Hk, G, n], where each head's sink logit is one more, left out."""
    if sink_logits is None:
        return scores.softmax(-1)
    sinks = sink_logits.view(*scores.shape[:2], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention of one query token.

    Args:
        query: float32 [H, d].
        key, value: float32 [Hk, n, d].
        sink_logits: float32 [H].

    Returns:
        float32 [H, d].
    """
    grouped = query.unflatten(0, (key.shape[0], -1))
    scores = torch.einsum("hgd,hnd->hgn", grouped, key) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hgn,hnd->hgd", weigh(scores, sink_logits), value).flatten(0, 1)


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
    _, _, block_size, head_size = key_cache.shape
    group_size = block_size // codes.key.scale.shape[2]
    bits = codes.key.codes.shape[4] * 8 // group_size
    for row, (length, coded) in enumerate(zip(seq_lens.tolist(), tail_start.tolist(), strict=True)):
        key = gather_rows(key_cache, block_table[row], length)
        value = gather_rows(value_cache, block_table[row], length)
        for i in range(math.ceil(coded / block_size)):
            block = int(block_table[row, i])
            tokens = slice(i * block_size, min((i + 1) * block_size, coded))
            count = tokens.stop - tokens.start
            key[:, tokens] = dequantize_keys(codes.key, block, group_size)[:, :count]
            value[:, tokens] = dequantize_values(codes.value, block, group_size, bits, head_size)[
                :, :count
            ]
        result = attend(query[row].float(), key, value, scale, softcap, sink_logits)
        output[row] = result.to(output.dtype)


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
) -> None:
    """See `ops.log_mass`."""
    for row, (length, start) in enumerate(zip(seq_lens.tolist(), tail_start.tolist(), strict=True)):
        positions = torch.arange(length, device=query.device)
        kept = (positions < sink_tokens) | (positions >= start)
        nothing = not kept.any() and sink_logits is None
        if start <= sink_tokens or nothing:
            mass[row] = 0
            continue
        key = gather_rows(key_cache, block_table[row], length)[:, kept]
        grouped = query[row].float().unflatten(0, (key.shape[0], -1))
        scores = torch.einsum("hgd,hnd->hgn", grouped, key) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        mass[row] = scores.logsumexp(-1).flatten()
        if sink_logits is not None:
            mass[row] = mass[row].logaddexp(sink_logits)


def critical_channel_mask(
    query: torch.Tensor, spread: torch.Tensor, critical_channels: int
) -> torch.Tensor:
    """The channels that count most: float32 [Q, d] and [d] to bool [d]."""
    weight = query.abs().amax(0) * spread
    order = torch.argsort(weight, descending=True, stable=True)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[order[:critical_channels]] = True
    return mask


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
    block_size = key_cache.shape[2]
    for row, end in enumerate(tail_start.tolist()):
        if end <= sink_tokens:
            continue
        blocks = block_table[row, : math.ceil(end / block_size)].long()
        if isinstance(index, ChannelIndex):
            key = gather_rows(key_cache, blocks, end)
            group_size = block_size // index.extremes.shape[2]
            count = math.ceil(end / group_size)
            extremes = index.extremes[blocks].float().transpose(0, 1).flatten(1, 2)
            extremes = extremes[:, : count : math.ceil(count / SPREAD_GROUPS)]
            spread = extremes[:, :, 1].amax(1) - extremes[:, :, 0].amin(1)
            for head in range(key.shape[0]):
                mask = critical_channel_mask(query[row, head], spread[head], critical_channels)
                key[head] *= mask
        else:
            group_size = block_size // index.key.scale.shape[2]
            pages = [dequantize_keys(index.key, int(b), group_size) for b in blocks]
            key = torch.cat(pages, dim=1)[:, :end]
        products = torch.einsum("hqd,hnd->hqn", query[row], key) + offset[row, :, :, None]
        scores[row, :, sink_tokens:end] = products.amax(1)[:, sink_tokens:]


def select_topk(
    indices: torch.Tensor, scores: torch.Tensor, tail_start: torch.Tensor, sink_tokens: int
) -> None:
    """See `ops.select_topk`."""
    k = indices.shape[2]
    indices.fill_(-1)
    for row, end in enumerate(tail_start.tolist()):
        if end <= sink_tokens:
            continue
        middle = scores[row, :, sink_tokens:end]
        best = torch.argsort(middle, dim=-1, descending=True, stable=True)[:, :k]
        best = best.sort(-1).values + sink_tokens
        indices[row, :, : best.shape[1]] = best.to(torch.int32)


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
) -> None:
    """See `ops.rerank_topk`."""
    _, num_kv_heads, block_size, _ = key_cache.shape
    indices.fill_(-1)
    for row in range(query.shape[0]):
        grouped = query[row].float().unflatten(0, (num_kv_heads, -1))
        for head in range(num_kv_heads):
            chosen = candidates[row, head]
            chosen = chosen[chosen >= 0].long()
            blocks = block_table[row, chosen // block_size].long()
            key = key_cache[blocks, head, chosen % block_size].float()
            if len(chosen) and channels < key.shape[1]:
                samples = min(16, len(chosen))
                sample = key[[i * len(chosen) // samples for i in range(samples)]]
                spread = sample.amax(0) - sample.amin(0)
                mask = critical_channel_mask(grouped[head], spread, channels)
                key = key * mask
            scores = grouped[head] @ key.T * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            # One head's order is that of its scores, also where weights vanish.
            elsewhere = mass[row].unflatten(0, (num_kv_heads, -1))[head, :, None]
            shares = torch.cat((scores, elsewhere), dim=-1).softmax(-1)[:, :-1]
            weights = scores[0] if len(scores) == 1 else shares.sum(0)
            best = torch.argsort(weights, descending=True, stable=True)[: indices.shape[2]]
            kept = chosen[best].sort().values
            indices[row, head, : len(kept)] = kept.to(torch.int32)


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
) -> None:
    """See `ops.sparse_decode_attention`."""
    num_kv_heads = key_cache.shape[1]
    for row, (length, tail) in enumerate(zip(seq_lens.tolist(), tail_start.tolist(), strict=True)):
        key = gather_rows(key_cache, block_table[row], length)
        value = gather_rows(value_cache, block_table[row], length)
        grouped = query[row].float().unflatten(0, (num_kv_heads, -1))
        for head in range(num_kv_heads):
            kept = torch.zeros(length, dtype=torch.bool)
            kept[:sink_tokens] = True
            kept[tail:] = True
            chosen = indices[row, head]
            kept[chosen[chosen >= 0].long()] = True
            result = attend(
                grouped[head],
                key[head, kept][None],
                value[head, kept][None],
                scale,
                softcap,
                None if sink_logits is None else sink_logits.view(num_kv_heads, -1)[head],
            )
            output[row].unflatten(0, (num_kv_heads, -1))[head] = result.to(output.dtype)


def exact_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """See `ops.exact_attention`."""
    lengths = torch.stack([query_start, query_lens, seq_lens]).T.tolist()
    for row, (start, count, length) in enumerate(lengths):
        key = gather_rows(key_cache, block_table[row], length)
        value = gather_rows(value_cache, block_table[row], length)
        for i in range(count):
            seen = length - (count - 1 - i)
            one = query[start + i].float()
            result = attend(one, key[:, :seen], value[:, :seen], scale, softcap, sink_logits)
            output[start + i] = result.to(output.dtype)


def dense_preference(
    query: torch.Tensor,
    key: torch.Tensor,
    alpha: float,
    scale: float,
    softcap: float,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.dense_preference`."""
    num_queries, num_heads, _ = query.shape
    length, num_kv_heads, _ = key.shape
    kept = max(1, math.floor(alpha * length))
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    total = torch.zeros(num_kv_heads, num_heads // num_kv_heads)
    for i in range(num_queries):
        visible = key[: length - num_queries + i + 1].float()
        scores = torch.einsum("hgd,nhd->hgn", grouped[i] * scale, visible)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        weights = weigh(scores, sink_logits)
        sinks = 0 if sink_logits is None else 1 - weights.sum(-1)
        total += weights.topk(min(kept, visible.shape[0]), dim=-1).values.sum(-1) + sinks
    return 1 - (total / num_queries).flatten()
