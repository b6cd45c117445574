"""What the retriever is trained on: sequences of tasks and their answers, of exercises, of text."""

import random
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from accuracy import text
from accuracy.answers import acceptable
from accuracy.exercises import MIN_ECHO, echo
from accuracy.tasks import TASKS, Source

# How often a task or exercise is drawn, relative to the others; what teaches most is drawn most.
TASK_WEIGHTS = {
    "plain_text": 2.0,
    "echo": 4.0,
    "single_2": 1.0,
    "single_3": 1.0,
    "multikey_1": 1.0,
    "multikey_2": 3.0,
    "multikey_3": 3.0,
    "multivalue": 2.0,
    "multiquery": 2.0,
    "variable_tracking": 3.0,
    "common_words": 2.0,
    "frequent_words": 3.0,
    "question_answering": 3.0,
    "copy": 3.0,
    "long_generation": 3.0,
}
# Tokens that a turn and its facts need at the most, so that a short sequence can hold them.
TOKENS_PER_TURN = {
    "single_2": 72,
    "single_3": 90,
    "multikey_1": 110,
    "multikey_2": 72,
    "multikey_3": 90,
    "multivalue": 160,
    "multiquery": 280,
    "variable_tracking": 200,
    "common_words": 250,
    "frequent_words": 128,
    "question_answering": 110,
    "copy": 128,
    "long_generation": 128,
}
TEXT_LOSS_WEIGHT = 0.1
# At the shortest length only this is taught: tokens, said again. What else is to be looked up grows
# from it.
SHORTEST = 128
_PLAIN, _ECHO = "plain_text", "echo"
# An answer is short and all of a sequence is counted for it, so its tokens weigh more.
_COUNTING = {"common_words": 3.0, "frequent_words": 8.0}


@dataclass
class Batch:
    """`ids`, `positions` and the weight of predicting each token, all `[batch, tokens]`.

    right: `[batch, tokens, most]`, tokens that are right in the place of each, filled up with -1.
    """

    ids: Tensor
    positions: Tensor
    weights: Tensor
    right: Tensor

    def to(self, device: str) -> "Batch":
        """The same on `device`."""
        return Batch(*(t.to(device) for t in (self.ids, self.positions, self.weights, self.right)))


@dataclass(frozen=True)
class Item:
    """A token of a sequence, the weight of predicting it, and others as right in its place."""

    id: int
    weight: float
    others: frozenset[int] = frozenset()

    def right(self, most: int) -> list[int]:
        """Right tokens, filled up with -1."""
        tokens = sorted(self.others | {self.id})
        return tokens + [-1] * (most - len(tokens))


class Data:
    """Training sequences: a task's context and as many turns as fit, or text alone."""

    def __init__(
        self, encoder: Tokenizer, max_position: int, draws: dict[str, float], seed: int
    ) -> None:
        self._encoder = encoder
        self._max_position = max_position
        self._draws = draws
        self._rng = random.Random(seed)
        self._lengths: dict[str, int] = {}
        lines = text.lines(text.TRAINING_PACKAGES, self._rng)
        self._source = Source(self._rng, lines, self._count)

    def batch(self, batch_size: int, num_tokens: int) -> Batch:
        """`batch_size` sequences of exactly `num_tokens` tokens, cut or filled up with text."""
        rows = [self._sequence(num_tokens) for _ in range(batch_size)]
        ids = torch.tensor([[item.id for item in row] for row in rows])
        weights = torch.tensor([[item.weight for item in row] for row in rows])
        most = max(len(item.others) for row in rows for item in row) + 1
        right = torch.tensor([[item.right(most) for item in row] for row in rows])
        positions = torch.stack([self._positions(num_tokens) for _ in rows])
        return Batch(ids, positions, weights, right)

    def _sequence(self, num_tokens: int) -> list[Item]:
        name = self._rng.choices(list(self._draws), list(self._draws.values()))[0]
        if num_tokens == SHORTEST:
            name = _ECHO
        row: list[Item] = []
        while len(row) < num_tokens:
            row += self._part(name, num_tokens - len(row))
        return row[:num_tokens]

    def _part(self, name: str, left: int) -> list[Item]:
        """Part of a sequence, of about `left` tokens or fewer."""
        if name == _ECHO and left >= MIN_ECHO:
            told = echo(self._rng, self._encoder.get_vocab_size(), left)
            return [Item(token, float(known)) for token, known in told]
        if name == _PLAIN or left < SHORTEST:
            return self._items("".join(islice(self._source.lines, 8)), TEXT_LOSS_WEIGHT)
        # Half the tokens are questions: answers are what teaches to look back. What is counted
        # stands alone, or else a mean over the text tells nothing.
        most = left if name in _COUNTING else max(SHORTEST, left // 2)
        return self._task(name, self._rng.choice((left, most)))

    def _task(self, name: str, num_tokens: int) -> list[Item]:
        most = num_tokens // TOKENS_PER_TURN[name]
        if most == 0:
            return self._items(next(self._source.lines), TEXT_LOSS_WEIGHT)
        # A first question is harder than one that follows others of its kind.
        turns = self._rng.randint(1, min(most, self._rng.choice((2, most))))
        example = TASKS[name].make(self._source, num_tokens, turns)
        guessed = name.startswith("multikey") or name in _COUNTING
        row = self._items(example.context, 0.0 if guessed else 0.3 * TEXT_LOSS_WEIGHT)
        weight = _COUNTING.get(name, 1.0)
        for turn in example.turns:
            row += self._items(turn.question, 0.0)
            answer = self._encoder.encode(turn.answer)
            right = acceptable(turn, answer)
            row += [Item(i, weight, right.get(n, frozenset())) for n, i in enumerate(answer.ids)]
        return row

    def _items(self, piece: str, weight: float) -> list[Item]:
        return [Item(i, weight) for i in self._encode(piece)]

    def _positions(self, num_tokens: int) -> Tensor:
        """Positions of a much longer text: contiguous runs with gaps between them (PoSE)."""
        if num_tokens == SHORTEST:
            return torch.arange(num_tokens)
        runs = self._rng.choice((1, 2, 3, 4))
        cuts = sorted(self._rng.sample(range(1, num_tokens), runs))
        span = num_tokens * (self._max_position / num_tokens) ** self._rng.random()
        gaps = sorted(self._rng.random() for _ in range(runs))
        positions = torch.arange(num_tokens)
        previous = 0.0
        for cut, gap in zip(cuts, gaps, strict=True):
            positions[cut:] += int((gap - previous) * (span - num_tokens))
            previous = gap
        return positions

    def _encode(self, piece: str) -> list[int]:
        ids: list[int] = self._encoder.encode(piece).ids
        return ids

    def _count(self, piece: str) -> int:
        if piece not in self._lengths:
            self._lengths[piece] = len(self._encode(piece))
        return self._lengths[piece]
