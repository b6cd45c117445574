"""What attention loses on the traffic at hand: now and then a row is attended exactly as well.

Only on CPUs. What requests are served is left as it is.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_tailorkv.attention import metrics
from vllm_tailorkv.attention.counting import layer_kind
from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.meters import histogram, meter
from vllm_tailorkv.attention.name import LOGGER
from vllm_tailorkv.attention.selection import Layer, Selector
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import DenseCodes
from vllm_tailorkv.layout import DerivedKind, PageLayout

logger = init_logger(LOGGER)

_WARNING_SECONDS = 60.0
_MOST = 10.0
"""What an error counts as that is larger, or no number."""


class Guard:
    """Guards the layers of one spec.

    warned: when one of this process last warned, in seconds of the monotonic clock.

    Args:
        layout: of their pages.
        config: the options, of which `guard_share` is positive.
        layer_names: vLLM's.
    """

    warned: ClassVar[float] = -_WARNING_SECONDS

    def __init__(self, layout: PageLayout, config: TailorKVConfig, layer_names: list[str]) -> None:
        self.kind = layer_kind(layout)
        self._every = round(1 / config.guard_share)
        self._bound = config.guard_bound
        self._steps = 0
        self._error = histogram(metrics.GUARD_ERROR, self.kind)
        self._lost = None
        self._remedy = "bits (4 is the most), or residual_tokens"
        if layout.kind is not DerivedKind.DENSE:
            self._lost = histogram(metrics.GUARD_LOST_MASS, self.kind)
            self._remedy = "topk_tokens"
        self._largest = {
            name: meter(metrics.GUARD_WORST_ERROR, self.kind, str(extract_layer_index(name)))
            for name in layer_names
        }
        self._worst = (0.0, "")

    def next(self, rows: DecodeRows | None) -> "GuardedRow | None":
        """The row that this step's layers attend exactly as well, or None; once a step.

        Args:
            rows: of the step.
        """
        if rows is None:
            return None
        self._warn()
        self._steps += 1
        if self._steps % self._every:
            return None
        # Another one each time, so that a long request is not the only one that is looked at.
        return GuardedRow(self, self._steps // self._every % len(rows.seq_lens))

    def saw(self, layer_name: str, error: float, lost: float | None) -> None:
        """What one layer lost in one row."""
        error = error if error < _MOST else _MOST
        self._error.observe(error)
        if self._lost is not None and lost is not None:
            self._lost.observe(lost)
        largest = self._largest[layer_name]
        if error > largest.value:
            largest.set(error)
        self._worst = max(self._worst, (error, layer_name))

    def _warn(self) -> None:
        error, name = self._worst
        if error <= self._bound or time.monotonic() - Guard.warned < _WARNING_SECONDS:
            return
        logger.warning(
            "TailorKV: the output of %s layer %d was off by %.2f of its size in a guarded row, "
            "more than guard_bound=%g; to lose less, raise %s.",
            self.kind,
            extract_layer_index(name),
            error,
            self._bound,
            self._remedy,
        )
        self._worst, Guard.warned = (0.0, ""), time.monotonic()


@dataclass(frozen=True)
class GuardedRow:
    """The row of a step that is attended exactly as well."""

    guard: Guard
    row: int

    def look(
        self,
        layer_name: str,
        layer: Layer,
        query: torch.Tensor,
        output: torch.Tensor,
        rows: DecodeRows,
        selector: Selector,
    ) -> None:
        """Compare what a layer has made of the row with exact attention.

        Args:
            query, output: [R, H, d], of all decode rows.
            selector: what chose the tokens of a sparse layer.
        """
        this = slice(self.row, self.row + 1)
        one = DecodeRows(
            slice(0, 1),
            rows.seq_lens[this],
            rows.block_table[this],
            rows.tail_start[this],
            rows.max_tail_start,
        )
        query, ours = query[this].contiguous(), output[this].float()
        exact = exact_attention(query, layer, one).float()
        error = float((ours - exact).norm() / exact.norm().clamp(min=1e-30))
        lost = None
        if not isinstance(layer.pages.derived, DenseCodes):
            lost = lost_mass(query, selector(query, layer, one), layer, one)
        self.guard.saw(layer_name, error, lost)


def exact_attention(query: torch.Tensor, layer: Layer, rows: DecodeRows) -> torch.Tensor:
    """Attention over all tokens of a context: [R, H, d]."""
    host = layer.pages.host
    output = torch.empty_like(query)
    ops.sparse_decode_attention(
        output,
        query,
        host.gathered_key,
        host.value,
        torch.full((len(query), host.key.shape[1], 1), -1, dtype=torch.int32),
        rows.block_table,
        rows.seq_lens,
        torch.zeros_like(rows.tail_start),
        sink_tokens=0,
        scale=layer.scale,
        softcap=layer.softcap,
        sink_logits=layer.sink_logits,
    )
    return output


def lost_mass(query: torch.Tensor, indices: torch.Tensor, layer: Layer, rows: DecodeRows) -> float:
    """The share of the true attention of one row on tokens that are not read, mean of its heads.

    What a head pays to its sink logit is part of its attention, and not lost.

    Args:
        query: [1, H, d]; rows: that one.
        indices: int32 [1, Hk, k], as of `Selector`.
    """
    key, sinks = layer.pages.host.gathered_key, layer.config.sink_tokens
    if int(rows.tail_start) <= sinks:
        return 0.0

    def log_mass(
        sink_tokens: int, tail_start: torch.Tensor, sink_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        mass = torch.empty(query.shape[:2], dtype=torch.float32)
        ops.log_mass(
            mass,
            query,
            key,
            rows.block_table,
            rows.seq_lens,
            tail_start,
            sink_tokens=sink_tokens,
            scale=layer.scale,
            softcap=layer.softcap,
            sink_logits=sink_logits,
        )
        return mass[0]

    # All but the first token, and that one: what has no middle is not weighed.
    every = log_mass(0, torch.ones_like(rows.tail_start), layer.sink_logits)
    every = every.logaddexp(log_mass(1, rows.seq_lens))
    always = log_mass(sinks, rows.tail_start, layer.sink_logits)
    block_size, kv_heads = key.shape[2], key.shape[1]
    places = indices[0].clamp(min=0).long()
    blocks = rows.block_table[0].long()[places // block_size]
    chosen = key[blocks, torch.arange(kv_heads)[:, None], places % block_size].float()
    grouped = query[0].float().unflatten(0, (kv_heads, -1))
    scores = torch.einsum("hgd,hnd->hgn", grouped, chosen) * layer.scale
    if layer.softcap > 0:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    scores = scores.masked_fill(indices[0, :, None] < 0, -torch.inf)
    kept = always.logaddexp(scores.logsumexp(-1).flatten())
    return float((1 - (kept - every).exp()).clamp(min=0).mean())
