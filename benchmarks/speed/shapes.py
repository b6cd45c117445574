"""The shapes of models, the kinds of layers, and the settings they are timed with."""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_tailorkv.config import TailorKVConfig, load_config
from vllm_tailorkv.layout import DerivedKind, PageLayout
from vllm_tailorkv.plan import page_layout

DTYPE = torch.bfloat16
BLOCK_SIZE = 128
_DEFAULTS = TailorKVConfig()
SINKS, RECENT = _DEFAULTS.sink_tokens, _DEFAULTS.recent_tokens
RESIDUAL, CHANNELS = _DEFAULTS.residual_tokens, _DEFAULTS.critical_channels
MIN_CONTEXT = 512
"""Below it, too few tokens lie between the sinks and the newest ones to select from."""


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer."""

    heads: int
    kv_heads: int
    head_size: int


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-3.2-1b": Shape(32, 8, 64),
    "qwen2.5-7b": Shape(28, 4, 128),
    "qwen2.5-0.5b": Shape(14, 2, 64),
    "mha-7b": Shape(32, 32, 128),
}


@dataclass(frozen=True)
class Case:
    """One kind of layer.

    selected: tokens between sinks and tail that a sparse layer reads.
    rerank: candidates ranked again for every token kept.
    query_reduce: `mean` query of a KV head's heads, or `max` of their scores.
    """

    layer: str
    kind: DerivedKind
    bits: int
    selected: int = 0
    rerank: float = 1
    query_reduce: str = "mean"

    @property
    def candidates(self) -> int:
        """Tokens that the index proposes."""
        return int(self.selected * self.rerank)

    @property
    def config(self) -> TailorKVConfig:
        """The options of a model with such a layer."""
        options: dict[str, Any] = {"bits": self.bits, "index": self.index or "onebit"}
        if self.layer == "sparse":
            options |= {
                "topk_tokens": self.selected,
                "rerank_factor": self.rerank,
                "query_reduce": self.query_reduce,
            }
        return load_config(options)

    @property
    def index(self) -> str | None:
        """The index of a sparse layer."""
        return self.kind.value if self.layer == "sparse" else None

    def layout(self, shape: Shape) -> PageLayout:
        """Of the pages of such a layer."""
        return page_layout(
            self.config,
            self.kind,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            block_size=BLOCK_SIZE,
            kv_itemsize=DTYPE.itemsize,
        )


CASES = (
    Case("sparse", DerivedKind.ONEBIT, 1, 448, 2.25, "max"),  # preset default
    Case("sparse", DerivedKind.ONEBIT, 1, 128, 4, "max"),  # preset fast
    Case("sparse", DerivedKind.ONEBIT, 1, 448, 4),
    Case("sparse", DerivedKind.CHANNELS, 1, 448, 2, "max"),
    Case("sparse", DerivedKind.CHANNELS, 1, 128, 4),
    Case("sparse", DerivedKind.CHANNELS, 1, 128),  # preset paper
    Case("dense", DerivedKind.DENSE, 1),
    Case("dense", DerivedKind.DENSE, 2),
    Case("dense", DerivedKind.DENSE, 4),
)
