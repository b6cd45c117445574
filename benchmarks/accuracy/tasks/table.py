"""A table in the context, rows of which are to be written as JSON."""

import re
from dataclasses import dataclass
from itertools import islice

from accuracy.tasks.base import Example, Source, Turn

FIELDS = ("name", "team", "badge", "desk", "phone")
_ROW_TOKENS = 40
_TABLED = (
    "Somewhere in the text below stands a table of people. Remember it: you are to write parts of "
    "it as JSON afterwards."
)


@dataclass(frozen=True)
class JsonTurn(Turn):
    """The references are the fields of the rows asked, row by row; each must be in its place."""

    def score(self, completion: str) -> float:
        """Share of the fields that stand under their names in the object of their row.

        What goes before the first object with a field is not read. An object may lack its end.
        """
        bodies = map(_FIELD.findall, (self.begun + completion).split("{")[1:])
        objects = [dict(fields) for fields in bodies if fields]
        right = 0
        for place, reference in enumerate(self.references):
            row, field = divmod(place, len(FIELDS))
            right += len(objects) > row and objects[row].get(FIELDS[field]) == reference
        return right / len(self.references)


_FIELD = re.compile(r'"(\w+)"\s*:\s*"?([\w.-]+(?: [\w.-]+)*)"?')


@dataclass(frozen=True)
class TableToJson:
    """`rows` people in a table amid real text; a turn asks for `rows_per_turn` of them, in order.

    rows: fewer where `num_tokens` is small.
    """

    name: str = "table_to_json"
    conversation: bool = False
    rows: int = 20
    rows_per_turn: int = 2

    def make(self, source: Source, num_tokens: int, num_turns: int) -> Example:
        """See `Task.make`."""
        asked = num_turns * self.rows_per_turn
        rows = max(asked, min(self.rows, num_tokens // (3 * _ROW_TOKENS)))
        names = list(islice(source.keys(), 2 * rows))
        people = [
            (name, team, source.number(), source.number(), source.number())
            for name, team in zip(names[:rows], names[rows:], strict=True)
        ]
        lines = [FIELDS, tuple("---" for _ in FIELDS), *people]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        order = source.rng.sample(people, asked)
        groups = [order[i::num_turns] for i in range(num_turns)]
        turns = tuple(_ask(source.chat, group) for group in groups)
        reserved = 40 + max(source.count_tokens(turn.answer) for turn in turns)
        context = source.haystack([table], num_tokens - reserved, source.lines)
        return Example(context, turns, _TABLED)


def _ask(chat: bool, people: list[tuple[str, ...]]) -> JsonTurn:
    rows = (
        ", ".join(f'"{field}": "{value}"' for field, value in zip(FIELDS, person, strict=True))
        for person in people
    )
    answer = ",\n".join(f"{{{row}}}" for row in rows)
    begun = '[{"name":'
    references = tuple(value for person in people for value in person)
    names = " and ".join(person[0] for person in people)
    answer = f"[{answer}]".removeprefix(begun)
    if chat:
        question = (
            f"Write the rows of {names} as a JSON list of objects with the fields "
            f"{', '.join(FIELDS)}, all of them strings. Write nothing else."
        )
        return JsonTurn(question, answer, references, begun=begun)
    return JsonTurn(f"\nThe rows of {names} as JSON:\n", answer + "\n", references, begun=begun)
