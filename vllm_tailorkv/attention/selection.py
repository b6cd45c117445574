"""Which tokens a sparse layer reads in a decode step (section 3.3 of the paper)."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.cache.views import HostPages
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import DenseCodes, DerivedPages


@dataclass(frozen=True)
class Pages:
    """The two tiers of one layer's cache."""

    host: HostPages
    derived: DerivedPages


class Layer(NamedTuple):
    """What a policy may know of its layer.

    scale, softcap: what turns q.k into the scores of the softmax, see `kernels.ops`.
    workspace: scratch memory of the step.
    """

    pages: Pages
    config: TailorKVConfig
    scale: float
    softcap: float
    workspace: Workspace


class Selector(Protocol):
    """A policy of selection; `retrieve` is ours, others may take its place for comparison."""

    def __call__(self, query: torch.Tensor, layer: Layer, rows: DecodeRows) -> torch.Tensor:
        """The tokens between sinks and tail that each row and KV head attends to.

        Args:
            query: [R, H, d], the model's dtype.

        Returns:
            int32 [R, Hk, k]: ascending positions, then -1.
        """
        ...


def reduce_query(query: torch.Tensor, num_kv_heads: int, how: str) -> torch.Tensor:
    """The queries that a KV head's tokens are scored with.

    Args:
        query: [R, H, d].
        how: `mean` of the query heads of a KV head, or `max` of their scores.

    Returns:
        float32 [R, Hk, Q, d], Q = 1 for `mean`, else H / Hk.
    """
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    return grouped.mean(2, keepdim=True) if how == "mean" else grouped


def retrieve(query: torch.Tensor, layer: Layer, rows: DecodeRows) -> torch.Tensor:
    """Propose middle tokens by the layer's index, take those that weigh most. See `Selector`."""
    host, index = layer.pages.host, layer.pages.derived
    assert not isinstance(index, DenseCodes)
    config, workspace = layer.config, layer.workspace
    shape = (len(query), host.key.shape[1])
    count = config.topk_tokens * config.rerank_factor
    candidates = workspace.get("candidates", (*shape, count), torch.int32)
    ops.propose_topk(
        candidates,
        reduce_query(query, host.key.shape[1], config.query_reduce),
        index,
        host.key,
        rows.block_table,
        rows.boundary,
        sink_tokens=config.sink_tokens,
        critical_channels=config.critical_channels,
        max_tail_start=rows.max_boundary,
    )
    if config.rerank_factor == 1:
        return candidates
    indices = workspace.get("indices", (*shape, config.topk_tokens), torch.int32)
    ops.refine_topk(
        indices,
        candidates,
        query,
        host.gathered_key,
        rows.block_table,
        channels=_ranked_channels(host.gathered_key),
        scale=layer.scale,
        softcap=layer.softcap,
    )
    return indices


def _ranked_channels(key: torch.Tensor) -> int:
    """Channels of [NB, Hk, bs, d] pages that ranking again reads.

    Where a token's channels lie apart, each costs a cache line; three eighths of them ranked as
    well as all on the model measured (`benchmarks/accuracy/NOTES.md`).
    """
    head_size = key.shape[3]
    return head_size if key.stride(3) == 1 else max(1, head_size * 3 // 8)
