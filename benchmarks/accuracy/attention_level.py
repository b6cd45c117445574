"""What selection keeps of the attention, layer by layer, as decode steps go by."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from accuracy.engine import Engine
from accuracy.policies import Policy, context_of
from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.selection import Layer, Selector


@dataclass(frozen=True)
class LayerQuality:
    """Means over steps, requests and heads of one sparse layer.

    recall: share of the oracle's tokens, as many as were selected, that were selected.
    mass: share of the attention on sinks, selected tokens and tail.
    error: norm of the output's error over the norm of the output of full attention.
    of_oracle: the attention that the selected tokens between sinks and tail hold, as a share of
        what as many tokens can hold at most; all query heads weigh the same.
    heads: the same for each KV head.
    kind: of the text.
    """

    method: str
    layer: int
    recall: float
    mass: float
    error: float
    of_oracle: float
    heads: tuple[float, ...]
    kind: str


class Observer:
    """Stands before a selector and compares what it selects with full attention.

    every: steps from one that is looked at to the next.
    """

    def __init__(self, inner: Selector, every: int = 1) -> None:
        self.inner = inner
        self.stateful = getattr(inner, "stateful", False)
        self.every = every
        self.seen: dict[str, list[float]] = defaultdict(list)
        self._kept: list[Tensor] = []
        self._best: list[Tensor] = []
        self._step = 0

    def restart(self, question_tokens: int) -> None:
        """See `Policy.restart`."""
        if isinstance(self.inner, Policy):
            self.inner.restart(question_tokens)

    def __call__(self, query: Tensor, layer: Layer, rows: DecodeRows) -> Tensor:
        """See `Selector`."""
        indices = self.inner(query, layer, rows)
        self._step += 1
        if (self._step - 1) % self.every == 0:
            for row, (length, tail) in enumerate(
                zip(rows.seq_lens.tolist(), rows.tail_start.tolist(), strict=True)
            ):
                table = rows.block_table[row]
                key = context_of(layer.pages.host.key, table, length)
                value = context_of(layer.pages.host.value, table, length)
                self._see(query[row], key, value, indices[row], tail, layer)
        return indices

    def _see(
        self, query: Tensor, key: Tensor, value: Tensor, indices: Tensor, tail: int, layer: Layer
    ) -> None:
        """One row: query [H, d], key and value [Hk, length, d], indices [Hk, k]."""
        sinks = layer.config.sink_tokens
        grouped = query.float().unflatten(0, (key.shape[0], -1))
        scores = torch.einsum("hgd,hnd->hgn", grouped, key) * layer.scale
        if layer.softcap:
            scores = layer.softcap * (scores / layer.softcap).tanh()
        weights = scores.softmax(-1)
        kept = _mask(indices, key.shape[1])
        if tail > sinks:
            among = weights[..., sinks:tail].sum(1)
            counts = kept[:, sinks:tail].sum(-1, keepdim=True)
            order = among.argsort(-1, descending=True)
            ranks = torch.empty_like(order).scatter_(
                -1, order, torch.arange(tail - sinks).expand_as(order)
            )
            best = ranks < counts
            chosen = kept[:, sinks:tail]
            found = (chosen & best).sum().item() / max(1, int(best.sum()))
            self.seen["recall"].append(found)
            self._kept.append((among * chosen).sum(-1))
            self._best.append((among * best).sum(-1))
        kept[:, :sinks] = True
        kept[:, tail:] = True
        partial = weights * kept[:, None]
        mass = partial.sum(-1, keepdim=True)
        # A policy may keep nothing that float32 can tell from zero.
        full, ours = weights @ value, (partial / mass.clamp(min=1e-30)) @ value
        self.seen["mass"].append(mass.mean().item())
        self.seen["error"].append(((ours - full).norm(dim=-1) / full.norm(dim=-1)).mean().item())

    def quality(self, method: str, layer: int, kind: str) -> LayerQuality | None:
        """What was seen; None if nothing was, or nothing was to be selected."""
        if not self._best:
            return None
        means = {name: sum(x) / len(x) for name, x in self.seen.items()}
        kept, best = torch.stack(self._kept).sum(0), torch.stack(self._best).sum(0)
        heads = tuple((kept / best.clamp(min=1e-30)).tolist())
        share = float(kept.sum() / best.sum().clamp(min=1e-30))
        return LayerQuality(method, layer, **means, of_oracle=share, heads=heads, kind=kind)


def _mask(indices: Tensor, length: int) -> Tensor:
    """int32 [Hk, k], -1 for none, to bool [Hk, length]."""
    mask = torch.zeros(indices.shape[0], length + 1, dtype=torch.bool)
    # -1 is the place beyond the end.
    mask.scatter_(1, indices.long().remainder(length + 1), True)
    return mask[:, :length]


@contextmanager
def observed(engine: Engine, method: str, kind: str, every: int) -> Iterator[list[LayerQuality]]:
    """Fills the list, when the block ends, with what the sparse layers did in it.

    every: steps from one that is looked at to the next.
    """
    qualities: list[LayerQuality] = []
    observers = [Observer(impl.selector, every) for impl in engine.sparse_impls]
    for impl, observer in zip(engine.sparse_impls, observers, strict=True):
        impl.selector = observer
    try:
        yield qualities
    finally:
        for impl, observer in zip(engine.sparse_impls, observers, strict=True):
            impl.selector = observer.inner
            quality = observer.quality(method, engine.impls.index(impl), kind)
            if quality is not None:
                qualities.append(quality)
