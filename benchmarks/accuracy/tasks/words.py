"""Counting: RULER's common and frequent words."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from accuracy.tasks.base import Example, Source, Turn, words


@dataclass(frozen=True)
class CommonWords:
    """A list in which `common` words stand ten times as often as all others."""

    name: str = "common_words"
    conversation: bool = False
    common: int = 10
    ratio: int = 10

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. One list, hence one turn."""
        del num_turns
        pool = source.rng.sample(words(), len(words()))
        common, others = pool[: self.common], pool[self.common :]
        per_word = source.count_tokens(" ".join(pool)) / len(pool) + 1
        slots = int((num_tokens - 8 * self.common - 20) / per_word)
        rare_repeats = max(1, slots // (8 * self.common * self.ratio))
        listed = common * (rare_repeats * self.ratio)
        rare = others[: max(0, slots - len(listed)) // rare_repeats]
        listed += rare * rare_repeats
        source.rng.shuffle(listed)
        rows = [listed[i : i + 10] for i in range(0, len(listed), 10)]
        context = "".join(f"{', '.join(row)}\n" for row in rows)
        return Example(context, (_ask("common", common),))


@dataclass(frozen=True)
class FrequentWords:
    """Words whose frequencies fall as a power of their rank; the three drawn most often are asked.

    They are words of few tokens, so that tokens can be counted.
    """

    name: str = "frequent_words"
    conversation: bool = False
    alpha: float = 2.0
    asked: int = 3

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. One text, hence one turn."""
        del num_turns
        shuffled = source.rng.sample(words(), len(words()))
        pool = sorted(shuffled, key=lambda word: source.count_tokens(f" {word}"))[:200]
        source.rng.shuffle(pool)
        weights = [1 / (rank + 1) ** self.alpha for rank in range(len(pool))]
        # The first words are most of the text: their own lengths count.
        costs = [
            weight * source.count_tokens(f" {w}") for w, weight in zip(pool, weights, strict=True)
        ]
        per_word = 1.05 * sum(costs) / sum(weights) + 0.1
        drawn = source.rng.choices(pool, weights, k=int((num_tokens - 40) / per_word))
        rows = [drawn[i : i + 10] for i in range(0, len(drawn), 10)]
        context = "".join(f"{' '.join(row)}\n" for row in rows)
        top = (word for word, _ in Counter(drawn).most_common(self.asked))
        return Example(context, (_ask("frequent", top),))


def _ask(which: str, found: Iterable[str]) -> Turn:
    references = tuple(found)
    answer = f" {', '.join(references)}.\n"
    return Turn(f"\nThe most {which} words:", answer, references, unordered=True)
