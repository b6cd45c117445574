"""What a task is: a long context and questions over it whose answers stand in it."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol
from uuid import UUID

from accuracy import text

NOISE = (
    "The grass is green and the sky is blue.\n",
    "The sun is yellow and the night is long.\n",
    "Here we go and there we come back again.\n",
)
"""RULER's noise, in our words: sentences that say nothing."""
_NUM_WORDS = 2048
_MIN_WORD_CHARS, _MAX_WORD_CHARS = 4, 9


@dataclass(frozen=True)
class Turn:
    """One question. `answer` is a full right answer; every one of `references` must be in it.

    unordered: any order of the references is right; `answer` has them in the order given.
    begun: what the answer begins with; it is given to the model, and `answer` goes on from there.
    """

    question: str
    answer: str
    references: tuple[str, ...]
    unordered: bool = False
    begun: str = ""

    def score(self, completion: str) -> float:
        """Share of the references found in `completion` as whole words (RULER's string match)."""
        found = (
            re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", completion) is not None
            for reference in self.references
        )
        return sum(found) / len(self.references)


@dataclass(frozen=True)
class Example:
    """A context and the questions over it.

    instruction: what a chat model is told before the context.
    """

    context: str
    turns: tuple[Turn, ...]
    instruction: str = ""


@dataclass(frozen=True)
class Source:
    """What tasks draw from: randomness, lines of real text, and the length of a text in tokens.

    Lengths are sums over lines. They are exact where a newline is a token of its own; else they
    are near, and `fitting` makes up for it.

    chat: questions are put to a chat model, by RULER's definitions; else a text is to be gone on
        with, as the retriever was trained to.
    """

    rng: random.Random
    lines: Iterator[str]
    count_tokens: Callable[[str], int]
    chat: bool = False

    def number(self) -> str:
        """Seven digits in a chat; else six, no group of three beginning with zero."""
        if self.chat:
            return str(self.rng.randrange(1_000_000, 10_000_000))
        return f"{self.rng.randrange(100, 1000)}{self.rng.randrange(100, 1000)}"

    def long_code(self) -> str:
        """A UUID in a chat; else a value in its manner, four groups of digits."""
        if self.chat:
            return str(UUID(int=self.rng.getrandbits(128), version=4))
        return "-".join(str(self.rng.randrange(100, 1000)) for _ in range(4))

    def keys(self) -> Iterator[str]:
        """Different names without end: of two words in a chat, else of one or two."""
        seen: set[str] = set()
        while True:
            size = 2 if self.chat else self.rng.choice((1, 2))
            key = "-".join(self.rng.choices(words(), k=size))
            if key not in seen:
                seen.add(key)
                yield key

    def haystack(self, facts: Sequence[str], num_tokens: int, filler: Iterator[str]) -> str:
        """`facts` in order at random depths of `filler`; at most `num_tokens` tokens in all."""
        budget = num_tokens - sum(map(self.count_tokens, facts))
        pieces: list[str] = []
        for line in filler:
            budget -= self.count_tokens(line)
            if budget < 0:
                break
            pieces.append(line)
        depths = sorted(self.rng.randrange(len(pieces) + 1) for _ in facts)
        for depth, fact in reversed(list(zip(depths, facts, strict=True))):
            pieces.insert(depth, fact)
        return "".join(pieces)


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b, and c`."""
    if len(items) < 3:
        return " and ".join(items)
    return f"{', '.join(items[:-1])}, and {items[-1]}"


class Task(Protocol):
    """Makes examples of about `num_tokens` tokens, context and turns together."""

    @property
    def name(self) -> str:
        """Its name on the command line."""
        ...

    @property
    def conversation(self) -> bool:
        """The turns are one conversation, the model's own answers part of it; else each is new."""
        ...

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """An example; the same for the same state of `source`."""
        ...


@cache
def words() -> tuple[str, ...]:
    """The 2048 most frequent lower-case words of the evaluation text."""
    counts: Counter[str] = Counter()
    for _, document in text.documents(text.EVALUATION_PACKAGES):
        counts.update(re.findall(r"\b[a-z]+\b", document))
    usual = (w for w, _ in counts.most_common() if _MIN_WORD_CHARS <= len(w) <= _MAX_WORD_CHARS)
    return tuple(sorted(word for word, _ in zip(usual, range(_NUM_WORDS), strict=False)))
