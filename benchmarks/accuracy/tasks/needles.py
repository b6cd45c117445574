"""Needles: facts hidden in a haystack, after RULER's definitions (arXiv 2404.06654, section 3)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from accuracy.tasks.base import NOISE, Example, Source, Turn, listed

_QUESTION_TOKENS = 40
_CONVERSATION_TURNS = 5


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
    as fill it: then there is nothing else in it. In a chat so many keys stand in it in all, as
    RULER has it, and no more turns are asked than there are keys for; a conversation has five.
    long_keys: keys are UUIDs, too (in a chat).
    """

    name: str
    conversation: bool = False
    filler: Literal["noise", "text"] = "text"
    distractors: int | None = 0
    long_values: bool = False
    long_keys: bool = False
    values_per_key: int = 1
    keys_per_turn: int = 1

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. Raises ValueError if the facts do not fit into `num_tokens`."""
        if source.chat:
            return self._make_chat(source, num_tokens, num_turns)
        value = source.long_code if self.long_values else source.number
        budget = num_tokens - num_turns * _QUESTION_TOKENS * self.keys_per_turn
        needed = num_turns * self.keys_per_turn + (self.distractors or 0)
        pairs = self._pairs(source.keys(), source, value, fact, needed, budget)
        context = self._context(source, pairs, fact, budget, num_tokens)
        asked = source.rng.sample(list(pairs), num_turns * self.keys_per_turn)
        turns = (asked[i::num_turns] for i in range(num_turns))
        return Example(context, tuple(self._turn(keys, pairs) for keys in turns))

    def _make_chat(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        value = source.long_code if self.long_values else source.number
        noun = "secret uuid" if self.long_values else "secret number"

        def told(key: str, value: str) -> str:
            return f"One of the {noun}s for {key} is: {value}.\n"

        most = max(self.distractors or 0, self.keys_per_turn)
        turns = _CONVERSATION_TURNS if self.conversation else num_turns
        if self.distractors is not None:
            turns = min(turns, most // self.keys_per_turn)
        else:
            most = turns * self.keys_per_turn
        keys = iter(source.long_code, "") if self.long_keys else source.keys()
        budget = num_tokens - turns * _QUESTION_TOKENS * self.keys_per_turn
        pairs = self._pairs(keys, source, value, told, most, budget)
        context = self._context(source, pairs, told, budget, num_tokens)
        asked = source.rng.sample(list(pairs), turns * self.keys_per_turn)
        instruction = (
            f"Somewhere in the text below, {noun}s are given. Read all of it with care and keep "
            f"them in mind, for I am going to ask about {noun}s afterwards."
        )
        groups = (asked[i::turns] for i in range(turns))
        return Example(
            context, tuple(_ask_in_chat(noun, group, pairs) for group in groups), instruction
        )

    def _context(
        self,
        source: Source,
        pairs: dict[str, list[str]],
        told: Callable[[str, str], str],
        budget: int,
        num_tokens: int,
    ) -> str:
        facts = [told(key, v) for key, values in pairs.items() for v in values]
        source.rng.shuffle(facts)
        if sum(map(source.count_tokens, facts)) > budget:
            raise ValueError(f"{self.name}: {len(facts)} facts do not fit into {num_tokens} tokens")
        filler: Iterator[str] = source.lines if self.filler == "text" else cycle(NOISE)
        return source.haystack(facts, budget, iter(()) if self.distractors is None else filler)

    def _pairs(
        self,
        keys: Iterator[str],
        source: Source,
        value: Callable[[], str],
        told: Callable[[str, str], str],
        needed: int,
        budget: int,
    ) -> dict[str, list[str]]:
        """`needed` keys with their values, or as many as fill `budget` tokens."""
        pairs: dict[str, list[str]] = {}
        for key in islice(keys, needed):
            pairs[key] = [value() for _ in range(self.values_per_key)]
        if self.distractors is None:
            used = sum(source.count_tokens(told(k, v)) for k, vs in pairs.items() for v in vs)
            for key in keys:
                number = value()
                used += source.count_tokens(told(key, number))
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


def _ask_in_chat(noun: str, keys: Sequence[str], pairs: dict[str, list[str]]) -> Turn:
    """The question for all values of `keys`, the answer begun as RULER begins it."""
    values = [value for key in keys for value in pairs[key]]
    names = listed(keys)
    one = len(values) == 1
    question = (
        f"What is the {noun} for {names} that the text gives?"
        if one
        else f"What are all the {noun}s for {names} that the text gives?"
    )
    begun = f"The {noun}{'' if one else 's'} for {names} that the text gives "
    begun += "is" if one else "are"
    unordered = len(keys) == 1
    return Turn(question, f" {listed(values)}.", tuple(values), unordered, begun)
