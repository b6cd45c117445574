"""Rows of host pages that lie on the GPU too: how they are made, and what metrics say of them."""

import time
from functools import cache

import torch

from vllm_tailorkv.attention import metrics
from vllm_tailorkv.attention.meters import meter
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.kernels.types import HotRows
from vllm_tailorkv.layout import DerivedKind
from vllm_tailorkv.plan import hot_sets

_SECONDS = 0.5
"""Between two looks at what the device counted."""


# vLLM measures memory in inference mode: what is made in it cannot be written to outside of it.
@cache
@torch.inference_mode(mode=False)
def counts_on(device: torch.device) -> torch.Tensor:
    """What all layers on a device count together."""
    return torch.zeros(2, dtype=torch.int64, device=device)


@torch.inference_mode(mode=False)
def make_hot_rows(spec: TailorKVSpec, tokens: int, device: torch.device) -> HotRows | None:
    """Room for the rows of a layer that were read last, or None if it keeps none.

    Args:
        tokens: of each KV head; see `hot_sets`.
    """
    layout = spec.layout
    if not tokens or layout.kind is DerivedKind.DENSE:
        return None
    shape = (layout.num_kv_heads, hot_sets(tokens))
    rows = torch.empty(*shape, 2, layout.head_size, dtype=spec.dtype, device=device)
    tags = torch.full(shape, -1, dtype=torch.int32, device=device)
    return HotRows(tags, rows, counts_on(device))


class HotMeter:
    """Tells the metrics what the device counted, and does not wait for it."""

    @torch.inference_mode(mode=False)
    def __init__(self, device: torch.device) -> None:
        self._counts = counts_on(device)
        self._seen = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._told = [0, 0]
        self._next = 0.0
        self._meters = [meter(metrics.HOT_ROWS, "sparse", to) for to in ("found", "fetched")]

    def look(self) -> None:
        """Once a step: what the look before this one has brought, and a new one."""
        now = time.monotonic()
        if now < self._next or (self._event is not None and not self._event.query()):
            return
        self._next = now + _SECONDS
        seen = self._seen.tolist()
        for one, count, told in zip(self._meters, seen, self._told, strict=True):
            one.add(count - told)
        self._told = seen
        self._seen.copy_(self._counts, non_blocking=True)
        if self._event is not None:
            self._event.record()
