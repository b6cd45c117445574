"""Counting: RULER's common and frequent words."""

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from accuracy.tasks.base import Example, Source, Turn, listed, words

_RULER_REPEATS = 3
_NUM_CODED = 2000


@dataclass(frozen=True)
class CommonWords:
    """A list in which `common` words stand ten times as often as all others.

    In a chat the list is numbered and a short example with its answer goes before it, as in RULER;
    other words stand there three times where the list is long enough.
    """

    name: str = "common_words"
    conversation: bool = False
    common: int = 10
    ratio: int = 10

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. One list, hence one turn."""
        del num_turns
        if source.chat:
            return self._make_chat(source, num_tokens)
        pool = source.rng.sample(words(), len(words()))
        common, others = pool[: self.common], pool[self.common :]
        per_word = source.count_tokens(" ".join(pool)) / len(pool) + 1
        slots = int((num_tokens - 8 * self.common - 20) / per_word)
        rare_repeats = max(1, slots // (8 * self.common * self.ratio))
        entries = common * (rare_repeats * self.ratio)
        rare = others[: max(0, slots - len(entries)) // rare_repeats]
        entries += rare * rare_repeats
        source.rng.shuffle(entries)
        rows = [entries[i : i + 10] for i in range(0, len(entries), 10)]
        context = "".join(f"{', '.join(row)}\n" for row in rows)
        return Example(context, (_ask("common", common),))

    def _make_chat(self, source: Source, num_tokens: int) -> Example:
        pool = source.rng.sample(words(), len(words()))
        shown, common, others = pool[:20], pool[20 : 20 + self.common], pool[20 + self.common :]
        per_word = source.count_tokens(_numbered(pool)) / len(pool)
        slots = int((num_tokens - 10 * self.common - 300) / per_word)
        # As often as in RULER, but not so often that they alone fill the list.
        most = slots // (2 * self.common * self.ratio)
        repeats = max(1, min(_RULER_REPEATS, most), slots // len(others))
        entries = common * (repeats * self.ratio)
        rare = others[: max(0, slots - len(entries)) // repeats]
        entries += rare * repeats
        source.rng.shuffle(entries)
        example = shown[:10] * 3 + shown[10:]
        source.rng.shuffle(example)
        instruction = (
            "Here is a numbered list of words. Ten of them stand in it more often than the others."
            f"\n\nAn example:\n{_numbered(example)}\nThe ten words that stand in the list most "
            f"often: {listed(shown[:10])}.\n\nNow another list. Keep in mind which words stand in "
            "it most often."
        )
        question = "Which ten words stand in the list above most often?"
        begun = "The ten words that stand in the list most often:"
        answer = f" {listed(common)}."
        turn = Turn(question, answer, tuple(common), unordered=True, begun=begun)
        return Example(_numbered(entries) + "\n", (turn,), instruction)


@dataclass(frozen=True)
class FrequentWords:
    """Words whose frequencies fall as a power of their rank; the three drawn most often are asked.

    They are words of few tokens, so that tokens can be counted. In a chat they are made up, and
    what is most frequent of all is dots, which do not count, as in RULER.
    """

    name: str = "frequent_words"
    conversation: bool = False
    alpha: float = 2.0
    asked: int = 3

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. One text, hence one turn."""
        del num_turns
        if source.chat:
            return self._make_chat(source, num_tokens)
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

    def _make_chat(self, source: Source, num_tokens: int) -> Example:
        letters = string.ascii_lowercase
        coded = ["".join(source.rng.choices(letters, k=6)) for _ in range(_NUM_CODED)]
        weights = [1 / (rank + 1) ** self.alpha for rank in range(len(coded) + 1)]
        # The first words are most of the text.
        first = (_DOTS, *coded[:50])
        costs = [
            w * source.count_tokens(f" {word}") for w, word in zip(weights, first, strict=False)
        ]
        per_word = sum(costs) / sum(weights[: len(first)])
        total = int((num_tokens - 200) / per_word)
        # Expected counts instead of drawn ones, so that the ranks are what they ought to be.
        counts = [int(total * weight / sum(weights)) for weight in weights]
        drawn = [w for w, n in zip((_DOTS, *coded), counts, strict=True) for _ in range(n)]
        drawn += coded[sum(map(bool, counts)) :][: max(0, total - len(drawn))]
        source.rng.shuffle(drawn)
        top = coded[: self.asked]
        question = (
            "Which three coded words stand in the text above most often? Do not count the dots, "
            "and do not explain."
        )
        begun = "The three coded words that stand in the text most often are:"
        turn = Turn(question, f" {listed(top)}.", tuple(top), unordered=True, begun=begun)
        return Example(" ".join(drawn) + "\n", (turn,), _CODED)


_DOTS = "......"
_CODED = "The text below is written in coded words. Keep track of how often each of them appears."


def _ask(which: str, found: Iterable[str]) -> Turn:
    references = tuple(found)
    answer = f" {', '.join(references)}.\n"
    return Turn(f"\nThe most {which} words:", answer, references, unordered=True)


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
