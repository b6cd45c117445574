"""Retrieval for sparse layers: kernels prepare queries themselves, nothing is made between them."""

import torch

from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.composed import turns
from vllm_tailorkv.kernels.triton.hot import keep_rows
from vllm_tailorkv.kernels.triton.mass import log_mass
from vllm_tailorkv.kernels.triton.rerank import rerank_topk
from vllm_tailorkv.kernels.triton.score import Scored, score_with
from vllm_tailorkv.kernels.triton.sparse import sparse_decode_attention
from vllm_tailorkv.kernels.types import HotRows, TokenIndex


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
    hot: HotRows | None = None,
) -> None:
    """See `ops.retrieve_topk`; rows in `hot` are read from there."""
    rows, num_heads, _ = query.shape
    heads = key_cache.shape[1]
    grouped = query.unflatten(1, (heads, -1))
    alone, reranked = num_heads == heads, candidates > indices.shape[2]
    by_head = every_head and not alone
    # A head that is alone in its group is compared with no other: its mass is not read.
    mass = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if not alone and (by_head or reranked):
        log_mass(
            mass,
            query,
            gathered_key,
            block_table,
            seq_lens,
            tail_start,
            sink_tokens,
            scale,
            softcap,
            sink_logits,
            hot,
        )
    scored = Scored(grouped, None, factor=1 / grouped.shape[2])
    if by_head:
        scored = Scored(grouped, mass.view(grouped.shape[:3]), factor=scale, sign=-1.0)
    found = indices.new_empty(rows, heads, candidates) if reranked else indices
    for part, scores in turns(rows, heads, max_tail_start, query.device):
        score_with(
            scored.rows(part),
            scores,
            index,
            key_cache,
            block_table[part],
            tail_start[part],
            sink_tokens,
            critical_channels,
        )
        ops.select_topk(found[part], scores, tail_start[part], sink_tokens=sink_tokens)
    if reranked:
        rerank_topk(
            indices, found, query, gathered_key, block_table, mass, channels, scale, softcap, hot
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
    hot: HotRows | None = None,
) -> None:
    """See `ops.retrieve_attention`."""
    shape = (len(query), key_cache.shape[1], min(topk, max_tail_start))
    indices = query.new_empty(shape, dtype=torch.int32)
    rows = (block_table, seq_lens, tail_start)
    retrieve_topk(
        indices,
        query,
        index,
        key_cache,
        gathered_key,
        *rows,
        sink_tokens,
        critical_channels,
        candidates,
        channels,
        every_head,
        scale,
        softcap,
        max_tail_start,
        sink_logits,
        hot,
    )
    if hot is not None:
        keep_rows(hot, gathered_key, value_cache, indices, *rows, sink_tokens)
    sparse_decode_attention(
        output,
        query,
        gathered_key,
        value_cache,
        indices,
        *rows,
        sink_tokens,
        scale,
        softcap,
        sink_logits,
        hot,
    )
