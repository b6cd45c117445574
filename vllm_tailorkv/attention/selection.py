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


def reranked(config: TailorKVConfig) -> bool:
    """Whether what the index proposes is ranked again."""
    return config.candidate_tokens > config.topk_tokens


def paid_elsewhere(query: torch.Tensor, layer: Layer, rows: DecodeRows) -> torch.Tensor:
    """What each head pays to sinks and tail, which are read anyway: a measure of its scores.

    Args:
        query: [R, H, d].

    Returns:
        float32 [R, H], logarithms; -inf where heads need no common measure.
    """
    key, config = layer.pages.host.gathered_key, layer.config
    mass = layer.workspace.get("mass", query.shape[:2], torch.float32)
    alone = query.shape[1] == key.shape[1]
    if alone or (config.query_reduce == "mean" and not reranked(config)):
        return mass.fill_(-torch.inf)
    ops.log_mass(
        mass,
        query,
        key,
        rows.block_table,
        rows.seq_lens,
        rows.boundary,
        sink_tokens=layer.config.sink_tokens,
        scale=layer.scale,
        softcap=layer.softcap,
    )
    return mass


def scored_queries(
    query: torch.Tensor, layer: Layer, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries that a KV head's tokens are scored with, and what is added to their scores.

    With `query_reduce="max"` a token counts by the head that it matters most to. Heads' scores have
    different levels, so each head's are measured against what it pays elsewhere. Only that measure
    heeds a soft cap: rough scores are not capped.

    Args:
        query: [R, H, d].
        mass: as of `paid_elsewhere`.

    Returns:
        float32 [R, Hk, Q, d] and [R, Hk, Q], Q = 1 for `mean`, else H / Hk.
    """
    grouped = query.float().unflatten(1, (layer.pages.host.key.shape[1], -1))
    if layer.config.query_reduce == "mean" or grouped.shape[2] == 1:
        mean = grouped.mean(2, keepdim=True)
        return mean, mean.new_zeros(mean.shape[:3])
    return grouped * layer.scale, -mass.view(grouped.shape[:3])


def retrieve(query: torch.Tensor, layer: Layer, rows: DecodeRows) -> torch.Tensor:
    """Propose middle tokens by the layer's index, take those that weigh most. See `Selector`."""
    host, index = layer.pages.host, layer.pages.derived
    assert not isinstance(index, DenseCodes)
    config, workspace = layer.config, layer.workspace
    shape = (len(query), host.key.shape[1])
    candidates = workspace.get("candidates", (*shape, config.candidate_tokens), torch.int32)
    mass = paid_elsewhere(query, layer, rows)
    queries, offset = scored_queries(query, layer, mass)
    ops.propose_topk(
        candidates,
        queries,
        index,
        host.key,
        rows.block_table,
        rows.boundary,
        offset=offset,
        sink_tokens=config.sink_tokens,
        critical_channels=config.critical_channels,
        max_tail_start=rows.max_boundary,
    )
    if not reranked(config):
        return candidates
    indices = workspace.get("indices", (*shape, config.topk_tokens), torch.int32)
    ops.refine_topk(
        indices,
        candidates,
        query,
        host.gathered_key,
        rows.block_table,
        mass,
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
