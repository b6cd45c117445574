"""Runs tasks through an engine, for every method that the engine can serve."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from accuracy import text
from accuracy.engine import FREE, Engine
from accuracy.methods import Method
from accuracy.tasks import TASKS, Example, Source

_SPARE_TOKENS = 4
"""Tokens that an answer may be longer than the right one."""


@dataclass(frozen=True)
class Cell:
    """One task at one length: examples as tokens, made once for all methods."""

    task: str
    length: int
    contexts: tuple["Tokens", ...]


@dataclass(frozen=True)
class Tokens:
    """An example as tokens: a script and the questions' lengths for each request."""

    example: Example
    context: list[int]
    scripts: tuple[list[int], ...]


@dataclass(frozen=True)
class Score:
    """What a method reached in a cell; one value a question."""

    method: str
    task: str
    length: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return sum(self.values) / len(self.values)


def make_cell(
    encoder: Tokenizer, task: str, length: int, samples: int, turns: int, seed: int
) -> Cell:
    """`samples` contexts of `length` tokens with `turns` questions each."""
    contexts = []
    for sample in range(samples):
        rng = random.Random(f"{seed} {task} {length} {sample}")
        source = Source(
            rng,
            text.lines(text.EVALUATION_PACKAGES, rng),
            lambda piece: len(_encode(encoder, piece)),
        )
        example = TASKS[task].make(source, length, turns)
        contexts.append(
            Tokens(
                example, _encode(encoder, example.context), tuple(_scripts(encoder, task, example))
            )
        )
    return Cell(task, length, tuple(contexts))


def _scripts(encoder: Tokenizer, task: str, example: Example) -> Iterator[list[int]]:
    """Questions as forced tokens, answers as free ones; one conversation, or one each."""
    parts = []
    for turn in example.turns:
        answer = len(_encode(encoder, turn.answer)) + _SPARE_TOKENS
        parts.append(_encode(encoder, turn.question) + [FREE] * answer)
    if TASKS[task].conversation:
        yield [token for part in parts for token in part]
    else:
        yield from parts


def run_cell(
    engine: Engine, method: Method, cell: Cell, decode: Callable[[list[int]], str]
) -> Score:
    """Asks every question of a cell. The engine serves `method` already."""
    values: list[float] = []
    for tokens in cell.contexts:
        scripts_of = list(tokens.scripts)
        batches = [[s] for s in scripts_of] if engine.one_at_a_time else [scripts_of]
        written: list[str] = []
        for scripts in batches:
            engine.restart(scripts[0].index(FREE))
            for script, output in zip(scripts, engine.decode(tokens.context, scripts), strict=True):
                written += _answers(script, output.ids, decode)
        values += [
            turn.score(answer) for turn, answer in zip(tokens.example.turns, written, strict=True)
        ]
    return Score(method.name, cell.task, cell.length, tuple(values))


def _answers(script: list[int], ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The free runs of a script, as text."""
    runs: list[list[int]] = []
    previous = None
    for wanted, token in zip(script, ids, strict=True):
        if wanted == FREE:
            if previous != FREE:
                runs.append([])
            runs[-1].append(token)
        previous = wanted
    return [decode(run) for run in runs]


def _encode(encoder: Tokenizer, piece: str) -> list[int]:
    ids: list[int] = encoder.encode(piece, add_special_tokens=False).ids
    return ids
