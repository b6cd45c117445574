"""The ops in C++ with OpenMP (`csrc/cpu`): AVX-512, AVX2 or portable, chosen at run time."""

import importlib
import math

import torch

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels.types import (
    ChannelIndex,
    DenseCodes,
    DerivedPages,
    OnebitIndex,
    TokenIndex,
)

_ops = torch.ops.vllm_tailorkv


def unavailable() -> str | None:
    """Why the extension cannot be loaded, or None.

    Raises:
        TailorKVError: VLLM_TAILORKV_CPU_ISA asks for what the processor lacks.
    """
    try:
        importlib.import_module("vllm_tailorkv._cpu")
    except ImportError as error:
        return (
            f"the C++ extension cannot be loaded ({error}); "
            "build it with `pip install --no-build-isolation .`"
        )
    try:
        _ops.isa()
    except RuntimeError as error:
        raise TailorKVError(str(error).splitlines()[0]) from error
    return None


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_rows: torch.Tensor | None = None,
) -> None:
    """See `ops.write_kv`."""
    _ops.write_kv(key, value, key_cache, value_cache, slot_mapping, key_rows)


def quantize_groups(
    groups: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
) -> None:
    """See `ops.quantize_groups`."""
    if isinstance(derived, DenseCodes):
        _ops.quantize_dense(groups, key_cache, value_cache, *derived.key, *derived.value, fit)
    elif isinstance(derived, OnebitIndex):
        _ops.quantize_onebit(groups, key_cache, *derived.key, fit)
    else:
        _ops.reduce_channels(groups, key_cache, derived.extremes)


def quantized_decode_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    codes: DenseCodes,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    scale: float,
    softcap: float,
) -> None:
    """See `ops.quantized_decode_attention`."""
    _ops.quantized_decode_attention(
        output,
        query,
        key_cache,
        value_cache,
        *codes.key,
        *codes.value,
        block_table,
        seq_lens,
        num_quantized,
        scale,
        softcap,
    )


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
) -> None:
    """See `ops.log_mass`."""
    _ops.log_mass(
        mass, query, key_cache, block_table, seq_lens, tail_start, sink_tokens, scale, softcap
    )


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
    if isinstance(index, ChannelIndex):
        _ops.score_channels(
            scores,
            query,
            index.extremes,
            key_cache,
            block_table,
            tail_start,
            offset,
            sink_tokens,
            critical_channels,
        )
    else:
        _ops.score_onebit(
            scores,
            query,
            *index.key,
            block_table,
            tail_start,
            offset,
            sink_tokens,
            key_cache.shape[2],
        )


def propose_topk(
    indices: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    tail_start: torch.Tensor,
    offset: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
) -> None:
    """See `ops.propose_topk`."""
    if isinstance(index, ChannelIndex):
        _ops.propose_channels(
            indices,
            query,
            index.extremes,
            key_cache,
            block_table,
            tail_start,
            offset,
            sink_tokens,
            critical_channels,
        )
    else:
        _ops.propose_onebit(
            indices,
            query,
            *index.key,
            block_table,
            tail_start,
            offset,
            sink_tokens,
            key_cache.shape[2],
        )


def select_topk(
    indices: torch.Tensor, scores: torch.Tensor, tail_start: torch.Tensor, sink_tokens: int
) -> None:
    """See `ops.select_topk`."""
    _ops.select_topk(indices, scores, tail_start, sink_tokens)


def refine_topk(
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
    """See `ops.refine_topk`."""
    _ops.refine_topk(
        indices, candidates, query, key_cache, block_table, mass, channels, scale, softcap
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
) -> None:
    """See `ops.sparse_decode_attention`."""
    _ops.sparse_decode_attention(
        output,
        query,
        key_cache,
        value_cache,
        indices,
        block_table,
        seq_lens,
        tail_start,
        sink_tokens,
        scale,
        softcap,
    )


def dense_preference(
    query: torch.Tensor, key: torch.Tensor, alpha: float, scale: float, softcap: float
) -> torch.Tensor:
    """See `ops.dense_preference`."""
    result = torch.empty(query.shape[1], dtype=torch.float32)
    kept = max(1, math.floor(alpha * key.shape[0]))
    _ops.dense_preference(result, query, key, kept, scale, softcap)
    return result
