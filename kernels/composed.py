"""Ops that are made of other ops, for implementations that do not do them in one.

Nothing waits for the device and shapes follow from shapes, so that a CUDA graph can capture them.
"""

from collections.abc import Iterator

import torch

from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import DerivedPages, TokenIndex

SCORES_BYTES = 256 << 20
"""Memory for scores, at most, as long as those of one row fit: more rows take turns."""


def unavailable() -> str | None:
    """None: it runs wherever the ops do that it is made of."""
    return None


def append_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    groups: torch.Tensor,
    derived: DerivedPages,
    fit: bool = True,
) -> None:
    """See `ops.append_tokens`."""
    ops.write_kv(key, value, key_cache, value_cache, slot_mapping)
    ops.quantize_groups(groups, key_cache, value_cache, derived, fit)


def turns(
    rows: int, heads: int, length: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows that are scored together, in turn, and where: float32 [rows, heads, length]."""
    step = max(1, min(rows, SCORES_BYTES // max(1, 4 * heads * length)))
    scores = torch.empty(step, heads, length, dtype=torch.float32, device=device)
    for first in range(0, rows, step):
        yield slice(first, first + step), scores[: rows - first]


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
    max_tail_start: int,
) -> None:
    """See `ops.propose_topk`."""
    rows, heads = query.shape[:2]
    for part, scores in turns(rows, heads, max_tail_start, query.device):
        ops.score_tokens(
            scores,
            query[part],
            index,
            key_cache,
            block_table[part],
            tail_start[part],
            offset=offset[part],
            sink_tokens=sink_tokens,
            critical_channels=critical_channels,
        )
        ops.select_topk(indices[part], scores, tail_start[part], sink_tokens=sink_tokens)


def retrieve_topk(
    indices: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    gathered_key: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
    candidates: int,
    channels: int,
    every_head: bool,
    scale: float,
    softcap: float,
    max_tail_start: int,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """See `ops.retrieve_topk`."""
    rows, heads = query.shape[0], key_cache.shape[1]
    candidates = max(indices.shape[2], min(candidates, max_tail_start))
    grouped = query.float().unflatten(1, (heads, -1))
    alone, reranked = grouped.shape[2] == 1, candidates > indices.shape[2]
    by_head = every_head and not alone
    mass = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    if not alone and (by_head or reranked):
        ops.log_mass(
            mass,
            query,
            gathered_key,
            block_table,
            seq_lens,
            tail_start,
            sink_tokens=sink_tokens,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
        )
    queries = grouped * scale if by_head else grouped.mean(2, keepdim=True)
    offset = -mass.view(grouped.shape[:3]) if by_head else queries.new_zeros(rows, heads, 1)
    found = indices.new_empty(rows, heads, candidates) if reranked else indices
    ops.propose_topk(
        found,
        queries,
        index,
        key_cache,
        block_table,
        tail_start,
        offset=offset,
        sink_tokens=sink_tokens,
        critical_channels=critical_channels,
        max_tail_start=max_tail_start,
    )
    if reranked:
        ops.rerank_topk(
            indices,
            found,
            query,
            gathered_key,
            block_table,
            mass,
            channels=channels,
            scale=scale,
            softcap=softcap,
        )


def retrieve_attention(
    output: torch.Tensor,
    query: torch.Tensor,
    index: TokenIndex,
    key_cache: torch.Tensor,
    gathered_key: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_start: torch.Tensor,
    sink_tokens: int,
    critical_channels: int,
    topk: int,
    candidates: int,
    channels: int,
    every_head: bool,
    scale: float,
    softcap: float,
    max_tail_start: int,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """See `ops.retrieve_attention`."""
    shape = (len(query), key_cache.shape[1], min(topk, max_tail_start))
    indices = query.new_empty(shape, dtype=torch.int32)
    ops.retrieve_topk(
        indices,
        query,
        index,
        key_cache,
        gathered_key,
        block_table,
        seq_lens,
        tail_start,
        sink_tokens=sink_tokens,
        critical_channels=critical_channels,
        candidates=candidates,
        channels=channels,
        every_head=every_head,
        scale=scale,
        softcap=softcap,
        max_tail_start=max_tail_start,
        sink_logits=sink_logits,
    )
    ops.sparse_decode_attention(
        output,
        query,
        gathered_key,
        value_cache,
        indices,
        block_table,
        seq_lens,
        tail_start,
        sink_tokens=sink_tokens,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
    )
