"""What selection keeps of the attention, layer by layer, as decode steps go by."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from accuracy.engine import Engine
from accuracy.policies import Oracle, Policy, context_of
from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.selection import Layer, Selector


@dataclass(frozen=True)
class LayerQuality:
    """Means over steps, requests and heads of one sparse layer.

    recall: share of the true top-k, as the oracle has it, that was selected.
    mass: share of the attention on sinks, selected tokens and tail.
    error: norm of the output's error over the norm of the output of full attention.
    """

    method: str
    layer: int
    recall: float
    mass: float
    error: float


class _Observer:
    """Stands before a selector and compares what it selects with full attention."""

    def __init__(self, inner: Selector) -> None:
        self.inner = inner
        self.stateful = getattr(inner, "stateful", False)
        self.oracle = Oracle()
        self.seen: dict[str, list[float]] = defaultdict(list)

    def restart(self, question_tokens: int) -> None:
        """See `Policy.restart`."""
        self.oracle.restart(question_tokens)
        if isinstance(self.inner, Policy):
            self.inner.restart(question_tokens)

    def __call__(self, query: Tensor, layer: Layer, rows: DecodeRows) -> Tensor:
        """See `Selector`."""
        indices = self.inner(query, layer, rows)
        truth = self.oracle(query, layer, rows)
        host, config = layer.pages.host, layer.config
        for row, (length, tail) in enumerate(
            zip(rows.seq_lens.tolist(), rows.boundary.tolist(), strict=True)
        ):
            key = context_of(host.key, rows.block_table[row], length)
            value = context_of(host.value, rows.block_table[row], length)
            grouped = query[row].float().unflatten(0, (key.shape[0], -1))
            weights = (torch.einsum("hgd,hnd->hgn", grouped, key) * layer.scale).softmax(-1)
            kept, best = (_mask(chosen[row], length) for chosen in (indices, truth))
            self.seen["recall"].append((kept & best).sum().item() / max(1, best.sum().item()))
            kept[:, : config.sink_tokens] = True
            kept[:, tail:] = True
            partial = weights * kept[:, None]
            mass = partial.sum(-1, keepdim=True)
            # A policy may keep nothing that float32 can tell from zero.
            full, ours = weights @ value, (partial / mass.clamp(min=1e-30)) @ value
            self.seen["mass"].append(mass.mean().item())
            self.seen["error"].append(
                ((ours - full).norm(dim=-1) / full.norm(dim=-1)).mean().item()
            )
        return indices


def _mask(indices: Tensor, length: int) -> Tensor:
    """int32 [Hk, k], -1 for none, to bool [Hk, length]."""
    mask = torch.zeros(indices.shape[0], length + 1, dtype=torch.bool)
    # -1 is the place beyond the end.
    mask.scatter_(1, indices.long().remainder(length + 1), True)
    return mask[:, :length]


@contextmanager
def observed(engine: Engine, method: str) -> Iterator[list[LayerQuality]]:
    """Fills the list, when the block ends, with what the sparse layers did in it."""
    qualities: list[LayerQuality] = []
    observers = [_Observer(impl.selector) for impl in engine.sparse_impls]
    for impl, observer in zip(engine.sparse_impls, observers, strict=True):
        impl.selector = observer
    try:
        yield qualities
    finally:
        for impl, observer in zip(engine.sparse_impls, observers, strict=True):
            impl.selector = observer.inner
            if observer.seen:
                means = {name: sum(x) / len(x) for name, x in observer.seen.items()}
                qualities.append(LayerQuality(method, engine.impls.index(impl), **means))
