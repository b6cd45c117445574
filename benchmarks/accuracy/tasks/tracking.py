"""Following references: RULER's variable tracking, and long chains of links."""

import string
from dataclasses import dataclass
from itertools import cycle, islice, pairwise

from accuracy.tasks.base import NOISE, Example, Source, Turn

_QUESTION_TOKENS = 50
_ASSIGNED = (
    "Assignments to variables are scattered over the text below. Some set a variable to a number, "
    "others to what another variable holds. Keep track of which variable holds what.\n\n"
    "An example. From LET QWZAB = 31007, LET ERTCD = QWZAB and LET UIOEF = ERTCD follows: the 3 "
    "variables that hold 31007, directly or through others, are QWZAB, ERTCD, and UIOEF.\n\n"
    "Now the text:"
)


@dataclass(frozen=True)
class VariableTracking:
    """A number goes to a first name and from each name to the next; which names have it?

    RULER's assignments, told in the order in which they are followed. In a chat they are of one
    chain, in noise, with names of five letters.
    """

    name: str = "variable_tracking"
    conversation: bool = False
    hops: int = 4

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`."""
        if source.chat:
            return self._make_chat(source, num_tokens)
        keys = source.keys()
        chains = [list(islice(keys, self.hops + 1)) for _ in range(num_turns)]
        numbers = [source.number() for _ in chains]
        # Chains are woven into each other, each in its own order.
        queues = [
            [f"Give {a} to {b}.\n" for a, b in pairwise([number, *chain])]
            for chain, number in zip(chains, numbers, strict=True)
        ]
        facts = []
        while any(queues):
            facts.append(source.rng.choice([queue for queue in queues if queue]).pop(0))
        context = source.haystack(facts, num_tokens - _QUESTION_TOKENS * num_turns, source.lines)
        return Example(context, tuple(map(_trace, numbers, chains)))

    def _make_chat(self, source: Source, num_tokens: int) -> Example:
        letters = string.ascii_uppercase
        chain = ["".join(source.rng.choices(letters, k=5)) for _ in range(self.hops + 1)]
        number = str(source.rng.randrange(10_000, 100_000))
        facts = [f"LET {b} = {a}\n" for a, b in pairwise([number, *chain])]
        context = source.haystack(facts, num_tokens - 4 * _QUESTION_TOKENS, cycle(NOISE))
        question = f"Which variables hold {number}, directly or through others? Name all of them."
        begun = f"The {len(chain)} variables that hold {number}, directly or through others, are"
        turn = Turn(question, f" {', '.join(chain)}.", tuple(chain), unordered=True, begun=begun)
        return Example(context, (turn,), _ASSIGNED)


def _trace(number: str, chain: list[str]) -> Turn:
    answer = f" {', '.join(chain)}.\n"
    return Turn(f"\nAll that got {number}:", answer, tuple(chain), unordered=True)


@dataclass(frozen=True)
class Chain:
    """A path through links scattered over the text; every step of the long answer looks back."""

    name: str = "long_generation"
    conversation: bool = False
    steps: int = 40

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`. `steps` are fewer where `num_tokens` is small."""
        steps = max(3, min(self.steps, num_tokens // (40 * num_turns)))
        keys = source.keys()
        paths = [list(islice(keys, steps + 1)) for _ in range(num_turns)]
        facts = [link(a, b) for path in paths for a, b in pairwise(path)]
        reserved = sum(map(source.count_tokens, facts)) + 20 * num_turns
        source.rng.shuffle(facts)
        context = source.haystack(facts, num_tokens - reserved, source.lines)
        if source.chat:
            return Example(context, tuple(map(_follow_in_chat, paths)), _LINKED)
        return Example(context, tuple(map(_follow, paths)))


_LINKED = (
    "The text below holds signposts, each in a line of its own, as in `From here go to there.` "
    "Remember them: you are to follow them afterwards."
)


def link(here: str, there: str) -> str:
    """The line that leads from `here` to `there`."""
    return f"From {here} go to {there}.\n"


def _follow(path: list[str]) -> Turn:
    """Begun with the first link, so that only what stands in the context is to be found."""
    start, *rest = path
    answer = "".join(link(a, b) for a, b in zip(path, rest, strict=False))
    begun = f"From {start} go to"
    return Turn(f"\nThe path:\n{begun}", answer.removeprefix(begun), tuple(rest))


def _follow_in_chat(path: list[str]) -> Turn:
    start, *rest = path
    answer = "".join(link(a, b) for a, b in pairwise(path))
    begun = f"From {start} go to"
    question = (
        f"Start at {start} and follow the signposts until there is none. "
        "Copy each of them in the order of the way, one a line."
    )
    return Turn(question, answer.removeprefix(begun), tuple(rest), begun=begun)
