"""Other ways to select tokens, in plain torch, in the place of ours and at the same budget.

Each follows the published definition of its method as far as selection goes; the tokens selected
are then attended exactly by the same op as ours. They serve comparison only.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.selection import Layer
from vllm_tailorkv.kernels import ops


def context_of(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a row: cache [NB, Hk, bs, d] to float32 [Hk, length, d]."""
    blocks = block_table[: -(-length // cache.shape[2])].long()
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()


def as_indices(chosen: list[Tensor]) -> Tensor:
    """Positions of each row, int [Hk, n] in any order, to int32 [R, Hk, k], ascending, then -1.

    Negative positions stand for none.
    """
    none = torch.iinfo(torch.int32).max
    widest = max(1, *(positions.shape[1] for positions in chosen))
    result = torch.full((len(chosen), chosen[0].shape[0], widest), none, dtype=torch.int32)
    for row, positions in enumerate(chosen):
        result[row, :, : positions.shape[1]] = positions.int()
    result[result < 0] = none
    result = result.sort(-1).values
    return result.masked_fill(result == none, -1)


class Policy:
    """One layer's policy. Subclasses choose among the middle tokens of one row at a time.

    The middle of a row is read from the pages once for as long as it stays the same.
    """

    stateful: ClassVar[bool] = False
    """It remembers what it saw of a request: requests come one at a time, each announced."""

    scale: float
    """Factor on q.k before the softmax."""

    elsewhere: Tensor
    """Log of what the heads of the row pay to sinks and tail: [Hk, G]."""

    def __init__(self) -> None:
        self.restart(1)

    def restart(self, question_tokens: int) -> None:
        """New requests begin, whose first steps are a question of so many tokens."""
        del question_tokens
        self._middles: dict[tuple[int, ...], tuple[Tensor, Any]] = {}

    def __call__(self, query: Tensor, layer: Layer, rows: DecodeRows) -> Tensor:
        """See `Selector`."""
        self.scale = layer.scale
        sinks = layer.config.sink_tokens
        mass = torch.empty(query.shape[:2])
        ops.log_mass(
            mass,
            query,
            layer.pages.host.key,
            rows.block_table,
            rows.seq_lens,
            rows.tail_start,
            sink_tokens=sinks,
            scale=layer.scale,
        )
        chosen, middles = [], {}
        for row, end in enumerate(rows.tail_start.tolist()):
            place = self._place(layer, rows.block_table[row], end)
            middle = self._middles.get(place)
            if middle is None:
                key = context_of(layer.pages.host.key, rows.block_table[row], end)[:, sinks:]
                middle = key, self.prepare(key)
            middles[place] = middle
            key, prepared = middle
            grouped = query[row].float().unflatten(0, (key.shape[0], -1))
            self.elsewhere = mass[row].unflatten(0, (key.shape[0], -1))
            count = min(layer.config.topk_tokens, key.shape[1])
            positions = self.choose(grouped, key, count, prepared)
            none = positions >= key.shape[1]
            chosen.append((positions + sinks).masked_fill(none, -1))
        self._middles = middles
        return as_indices(chosen)

    @staticmethod
    def _place(layer: Layer, block_table: Tensor, end: int) -> tuple[int, ...]:
        blocks = -(-end // layer.pages.host.key.shape[2])
        return (end, *block_table[:blocks].tolist())

    def prepare(self, key: Tensor) -> Any:
        """What `choose` needs of key [Hk, n, d] whatever the query."""

    def choose(self, query: Tensor, key: Tensor, count: int, prepared: Any) -> Tensor:
        """`count` of n tokens: query [Hk, G, d], key [Hk, n, d] to int [Hk, count].

        `prepared` is what `prepare` made of this key. Positions from n on stand for none.
        """
        raise NotImplementedError

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Attention on these tokens, of all, summed over the heads of a KV head: [Hk, n]."""
        scores = torch.einsum("hgd,hnd->hgn", query, key) * self.scale
        total = torch.logaddexp(scores.logsumexp(-1), self.elsewhere)
        return (scores - total[..., None]).exp().sum(1)


class Oracle(Policy):
    """The tokens that truly weigh most: what a budget allows."""

    def choose(self, query: Tensor, key: Tensor, count: int, prepared: Any) -> Tensor:
        """See `Policy.choose`."""
        return self.weights(query, key).topk(count, dim=-1).indices


class StreamingLLM(Policy):
    """Sinks and a longer recent window, nothing between (arXiv 2309.17453)."""

    def choose(self, query: Tensor, key: Tensor, count: int, prepared: Any) -> Tensor:
        """See `Policy.choose`."""
        return torch.arange(key.shape[1] - count, key.shape[1]).expand(key.shape[0], -1)


class Quest(Policy):
    """Whole pages by the upper bound that their extremes of K allow (arXiv 2406.10774)."""

    page = 16

    def prepare(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The extremes of each channel in each page: twice [Hk, pages, d]."""
        padding = -key.shape[1] % self.page
        low = torch.nn.functional.pad(key, (0, 0, 0, padding), value=float("inf"))
        high = torch.nn.functional.pad(key, (0, 0, 0, padding), value=float("-inf"))
        low = low.unflatten(1, (-1, self.page)).amin(2)
        return low, high.unflatten(1, (-1, self.page)).amax(2)

    def choose(self, query: Tensor, key: Tensor, count: int, prepared: Any) -> Tensor:
        """See `Policy.choose`."""
        low, high = prepared
        bound = torch.maximum(query[:, :, None] * low[:, None], query[:, :, None] * high[:, None])
        bound = (bound.sum(-1) * self.scale).amax(1)
        pages = bound.topk(min(max(1, count // self.page), bound.shape[1]), dim=-1).indices
        # The last page may be a part: what lies beyond the length is none.
        return (pages[..., None] * self.page + torch.arange(self.page)).flatten(1)


class SnapKV(Policy):
    """What the question's tokens looked at is kept, the rest is dropped (arXiv 2404.14469).

    The steps of the question see everything; the choice made after them stays.
    """

    stateful = True
    pooling = 7

    def restart(self, question_tokens: int) -> None:
        """See `Policy.restart`."""
        super().restart(question_tokens)
        self._left, self._votes, self._kept = question_tokens, None, None

    _votes: Tensor | None
    _kept: Tensor | None

    def choose(self, query: Tensor, key: Tensor, count: int, prepared: Any) -> Tensor:
        """See `Policy.choose`."""
        heads, length, _ = key.shape
        if self._left > 0:
            self._left -= 1
            votes = self.weights(query, key)
            if self._votes is not None:
                votes[:, : self._votes.shape[1]] += self._votes
            self._votes = votes
            return torch.arange(length).expand(heads, -1)
        if self._kept is None:
            assert self._votes is not None
            pooled = torch.nn.functional.max_pool1d(
                self._votes[None], self.pooling, stride=1, padding=self.pooling // 2
            )[0]
            self._kept = pooled.topk(min(count, pooled.shape[1]), dim=-1).indices
        return self._kept


class DoubleSparsity(Policy):
    """Scores by a few channels of K that were chosen once and for all (arXiv 2408.07092).

    They are those with the largest mean `|q * k|` over the first `calibration` steps seen.
    """

    share = 1 / 16
    calibration = 16

    def __init__(self) -> None:
        super().__init__()
        self._total: Tensor | None = None
        self._steps = 0

    def choose(self, query: Tensor, key: Tensor, count: int, prepared: Any) -> Tensor:
        """See `Policy.choose`."""
        if self._steps < self.calibration:
            weight = (query.abs().sum(1)[:, None] * key.abs()).mean(1)
            self._total = weight if self._total is None else self._total + weight
            self._steps += 1
        assert self._total is not None
        channels = max(1, round(key.shape[-1] * self.share))
        kept = self._total.topk(channels, dim=-1).indices
        narrow_key = key.gather(2, kept[:, None].expand(-1, key.shape[1], -1))
        narrow_query = query.gather(2, kept[:, None].expand(-1, query.shape[1], -1))
        scores = torch.einsum("hgd,hnd->hgn", narrow_query, narrow_key) * self.scale
        return scores.softmax(-1).sum(1).topk(count, dim=-1).indices


POLICIES: dict[str, Callable[[], Policy]] = {
    "oracle": Oracle,
    "quest": Quest,
    "streaming_llm": StreamingLLM,
    "snapkv": SnapKV,
    "double_sparsity": DoubleSparsity,
}
