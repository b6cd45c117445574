"""Which tokens a sparse layer reads in a decode step (section 3.3 of the paper)."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.cache.views import HostPages
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import DenseCodes, DerivedPages, HotRows


@dataclass(frozen=True)
class Pages:
    """The two tiers of one layer's cache."""

    host: HostPages
    derived: DerivedPages


class Layer(NamedTuple):
    """What a policy may know of its layer.

    scale, softcap, sink_logits: what turns q.k into the softmax, see `kernels.ops`.
    workspace: scratch memory of the step.
    """

    pages: Pages
    config: TailorKVConfig
    scale: float
    softcap: float
    workspace: Workspace
    sink_logits: torch.Tensor | None = None


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


def retrieve(query: torch.Tensor, layer: Layer, rows: DecodeRows) -> torch.Tensor:
    """Propose middle tokens by the layer's index, take those that weigh most. See `Selector`."""
    host, index = layer.pages.host, layer.pages.derived
    assert not isinstance(index, DenseCodes)
    shape = (len(query), host.key.shape[1], layer.config.topk_tokens)
    indices = layer.workspace.get("indices", shape, torch.int32)
    ops.retrieve_topk(
        indices,
        query,
        index,
        host.key,
        host.gathered_key,
        rows.block_table,
        rows.seq_lens,
        rows.tail_start,
        **_options(layer, rows),
    )
    return indices


def attend_retrieved(
    output: torch.Tensor,
    query: torch.Tensor,
    layer: Layer,
    rows: DecodeRows,
    hot: HotRows | None = None,
) -> None:
    """Attend to sinks, what `retrieve` finds, and the tail, in one op.

    Args:
        output, query: [R, H, d], the model's dtype.
        hot: rows of the layer on the device.
    """
    host, index = layer.pages.host, layer.pages.derived
    assert not isinstance(index, DenseCodes)
    ops.retrieve_attention(
        output,
        query,
        index,
        host.key,
        host.gathered_key,
        host.value,
        rows.block_table,
        rows.seq_lens,
        rows.tail_start,
        topk=layer.config.topk_tokens,
        hot=hot,
        **_options(layer, rows),
    )


def attend_selected(
    output: torch.Tensor,
    query: torch.Tensor,
    indices: torch.Tensor,
    layer: Layer,
    rows: DecodeRows,
) -> None:
    """Attend to sinks, what a `Selector` has chosen, and the tail.

    Args:
        output, query: [R, H, d], the model's dtype.
        indices: int32 [R, Hk, k].
    """
    ops.sparse_decode_attention(
        output,
        query,
        layer.pages.host.gathered_key,
        layer.pages.host.value,
        indices,
        rows.block_table,
        rows.seq_lens,
        rows.tail_start,
        sink_tokens=layer.config.sink_tokens,
        scale=layer.scale,
        softcap=layer.softcap,
        sink_logits=layer.sink_logits,
    )


def _options(layer: Layer, rows: DecodeRows) -> dict[str, Any]:
    """How tokens are found: what both ops that do it take by name."""
    config = layer.config
    return {
        "sink_tokens": config.sink_tokens,
        "critical_channels": config.critical_channels,
        "candidates": config.candidate_tokens,
        "channels": _ranked_channels(layer.pages.host.gathered_key),
        "every_head": config.query_reduce == "max",
        "scale": layer.scale,
        "softcap": layer.softcap,
        "sink_logits": layer.sink_logits,
        "max_tail_start": max(0, rows.max_tail_start),
    }


def _ranked_channels(key: torch.Tensor) -> int:
    """Channels of [NB, Hk, bs, d] pages that ranking again reads.

    Where a token's channels lie apart, each costs a cache line; three eighths of them ranked as
    well as all on the model measured (`benchmarks/accuracy/NOTES.md`).
    """
    head_size = key.shape[3]
    return head_size if key.stride(3) == 1 else max(1, head_size * 3 // 8)
