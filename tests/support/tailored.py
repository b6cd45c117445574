"""How tests make the tailored ops serve short contexts, and see that they did.

All that is known of the way there is in this file: contexts up to `TailorKVConfig.exact_below`
are left to vLLM's op, and the layers call three ops of `vllm_tailorkv.kernels.ops` by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from engines import attention_layers

BEYOND = 1024
"""More tokens than any context that these options are meant for."""

SMALL_BUDGET = {"sink_tokens": 0, "recent_tokens": 1, "topk_tokens": 1}
EVERY_LAYER = {"profile": {"dense_layers": [0, 1, 2, 3]}}
NO_LAYER: dict[str, Any] = {"profile": {"dense_layers": []}}

DENSE_EXACT = SMALL_BUDGET | EVERY_LAYER | {"residual_tokens": BEYOND}
"""Every layer dense, and its codes never read."""
DENSE_4BIT = SMALL_BUDGET | EVERY_LAYER | {"bits": 4, "residual_tokens": 16}
"""Every layer dense, and most of the context read as codes."""
SPARSE_ALL = NO_LAYER | {"topk_tokens": BEYOND, "recent_tokens": 16}
"""Every layer sparse and everything selected: what its index proposes is ranked again, all kept."""
SPARSE_ALL_CHANNELS = SPARSE_ALL | {"index": "channels", "rerank_factor": 1}
"""The same with the other index and without a second ranking."""
BOTH_EXACT = SPARSE_ALL | {"profile": {"dense_layers": [0, 2]}, "residual_tokens": BEYOND}
"""Layers of both kinds in turns, all of them exact."""


@dataclass
class Rows:
    """Rows that each of the tailored ops has served, one for every layer and decode step."""

    dense: int = 0
    sparse: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.sparse


@contextmanager
def tailored_ops(exact_below: int = 0) -> Iterator[Rows]:
    """Have the tailored ops serve all decode steps beyond so many tokens; count their rows.

    Without this, `topk_tokens` beyond the context would leave the context to vLLM's op.
    """
    from vllm_tailorkv.attention import impl
    from vllm_tailorkv.config import MOST_TOKENS, TailorKVConfig

    rows = Rows()

    def counting(kind: str, original: Callable[..., None]) -> Callable[..., None]:
        def op(output: Any, query: Any, *rest: Any, **named: Any) -> None:
            before = getattr(rows, kind)
            original(output, query, *rest, **named)
            # Once, also where one of them is made of the other.
            setattr(rows, kind, before + len(query))

        return op

    with pytest.MonkeyPatch.context() as patch:

        def below(config: TailorKVConfig) -> int:
            # Where drafts are judged, all stays exact.
            return MOST_TOKENS if config.full_attention_below == MOST_TOKENS else exact_below

        patch.setattr(TailorKVConfig, "exact_below", property(below))
        for kind, name in [
            ("dense", "quantized_decode_attention"),
            ("sparse", "retrieve_attention"),
            # Where a test puts another selector in place of ours.
            ("sparse", "sparse_decode_attention"),
        ]:
            patch.setattr(impl.ops, name, counting(kind, getattr(impl.ops, name)))
        yield rows


@contextmanager
def unwritten_codes() -> Iterator[None]:
    """Leave what layers derive from K and V unwritten: what reads it reads garbage."""
    from vllm_tailorkv.attention import impl

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl.ops, "quantize_groups", lambda *arguments: None)
        yield


def own_layers(llm: Any) -> int:
    """How many layers are ours; those with a sliding window are not."""
    layers = attention_layers(llm).values()
    return [layer.impl.__class__.__name__ for layer in layers].count("TailorKVImpl")


def decode_steps(prompts: list[list[int]], max_tokens: int, exact_below: int = 0) -> int:
    """Decode steps beyond so many tokens; a request's first token is its prompt's."""
    contexts = [len(prompt) + step for prompt in prompts for step in range(1, max_tokens)]
    return sum(context > exact_below for context in contexts)
