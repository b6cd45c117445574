"""The paper's prediction: score with the query made of the layer before's attention input."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from accuracy.engine import Engine
from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.selection import Layer, Selector, retrieve


class _Inputs:
    """What the attention of every layer was last given."""

    def __init__(self, attentions: Sequence[Any]) -> None:
        self.attentions = attentions
        self.hidden: list[Tensor | None] = [None] * len(attentions)
        self.positions: Tensor | None = None
        for depth, attention in enumerate(attentions):
            attention.register_forward_pre_hook(self._keep(depth), with_kwargs=True)

    def _keep(self, depth: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            positions, hidden = args if args else (kwargs["positions"], kwargs["hidden_states"])
            self.positions, self.hidden[depth] = positions, hidden

        return hook

    def predicted(self, depth: int) -> Tensor | None:
        """The query of layer `depth` as the input of the one before tells it: [T, H * d]."""
        before = self.hidden[depth - 1] if depth > 0 else None
        if before is None:
            return None
        attention = self.attentions[depth]
        qkv, _ = attention.qkv_proj(before)
        q, k, _ = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        q, _ = attention.rotary_emb(self.positions, q, k)
        return q


def previous_query_selectors(engine: Engine) -> Sequence[Selector]:
    """One selector a sparse layer. The first layer, if sparse, uses its own query.

    Raises ValueError for models whose layers are not built as Llama's are.
    """
    layers = getattr(getattr(engine.runner.model, "model", None), "layers", None)
    attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in layers or ()]
    if not attentions or not all(
        hasattr(a, "qkv_proj") and hasattr(a, "q_size") for a in attentions
    ):
        raise ValueError("previous_query knows models that are built as Llama is; leave it out")
    inputs = _Inputs(attentions)
    depths = {id(attention.attn.impl): depth for depth, attention in enumerate(attentions)}
    return [_selector(inputs, depths[id(impl)]) for impl in engine.sparse_impls]


def _selector(inputs: _Inputs, depth: int) -> Selector:
    def select(query: Tensor, layer: Layer, rows: DecodeRows) -> Tensor:
        predicted = inputs.predicted(depth)
        if predicted is not None:
            query = predicted[rows.tokens].view_as(query)
        return retrieve(query, layer, rows)

    return select
