"""Needles: facts hidden in a haystack, after RULER's definitions (arXiv 2404.06654, section 3)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from accuracy.tasks.base import Example, Source, Turn

_NOISE = (
    "The grass is green and the sky is blue.\n",
    "The sun is yellow and the night is long.\n",
    "Here we go and there we come back again.\n",
)
_QUESTION_TOKENS = 40


def fact(key: str, value: str) -> str:
    """The line that tells the number of `key`."""
    return f"The number of {key} is {value}.\n"


def ask(key: str, value: str) -> Turn:
    """The question for one number, begun as its fact is."""
    return Turn(f"\nThe number of {key} is", f" {value}.\n", (value,))


@dataclass(frozen=True)
class Needles:
    """`keys_per_turn` keys are asked in a turn; each key has `values_per_key` values.

    `distractors` further keys of the same form stand in the haystack, or, if it is None, as many
    as fill it: then there is nothing else in it.
    """

    name: str
    conversation: bool = False
    filler: Literal["noise", "text"] = "text"
    distractors: int | None = 0
    long_values: bool = False
    values_per_key: int = 1
    keys_per_turn: int = 1

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. Raises ValueError if the facts do not fit into `num_tokens`."""
        value = source.long_code if self.long_values else source.number
        budget = num_tokens - num_turns * _QUESTION_TOKENS * self.keys_per_turn
        pairs = self._pairs(source, value, budget, num_turns)
        facts = [fact(key, v) for key, values in pairs.items() for v in values]
        source.rng.shuffle(facts)
        if sum(map(source.count_tokens, facts)) > budget:
            raise ValueError(f"{self.name}: {len(facts)} facts do not fit into {num_tokens} tokens")
        filler: Iterator[str] = source.lines if self.filler == "text" else cycle(_NOISE)
        context = source.haystack(facts, budget, iter(()) if self.distractors is None else filler)
        asked = source.rng.sample(list(pairs), num_turns * self.keys_per_turn)
        turns = (asked[i::num_turns] for i in range(num_turns))
        return Example(context, tuple(self._turn(keys, pairs) for keys in turns))

    def _pairs(
        self, source: Source, value: Callable[[], str], budget: int, num_turns: int
    ) -> dict[str, list[str]]:
        needed = num_turns * self.keys_per_turn
        pairs: dict[str, list[str]] = {}
        keys = source.keys()
        for key in islice(keys, needed + (self.distractors or 0)):
            pairs[key] = [value() for _ in range(self.values_per_key)]
        if self.distractors is None:
            used = sum(source.count_tokens(fact(k, v)) for k, vs in pairs.items() for v in vs)
            for key in keys:
                number = value()
                used += source.count_tokens(fact(key, number))
                if used > budget:
                    break
                pairs[key] = [number]
        return pairs

    def _turn(self, keys: list[str], pairs: dict[str, list[str]]) -> Turn:
        if self.keys_per_turn == 1 and self.values_per_key == 1:
            return ask(keys[0], pairs[keys[0]][0])
        values = [value for key in keys for value in pairs[key]]
        if self.keys_per_turn == 1:
            answer = f" {', '.join(values)}.\n"
            return Turn(f"\nAll numbers of {keys[0]} are", answer, tuple(values), unordered=True)
        answer = "".join(fact(key, pairs[key][0]) for key in keys)
        return Turn(f"\nThe numbers of {', '.join(keys)}:\n", answer, tuple(values))
