"""Runs tasks through an engine, for every method that the engine can serve."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from accuracy import text
from accuracy.answers import acceptable
from accuracy.engine import FREE, Decoded, Engine
from accuracy.methods import Method
from accuracy.tasks import TASKS, Example, Source

_SPARE_TOKENS = 4
"""Tokens that an answer may be longer than the right one."""


WRITTEN, GIVEN = "written", "given"
ANSWERS = (WRITTEN, GIVEN)
"""Who writes an answer.

WRITTEN: the model, and what it wrote must hold the references (RULER's string match). GIVEN: the
right answer is forced, token by token, and the share of its references' tokens counts in whose
place the model would have written a right one. So a model that loses its way in a list still tells
which look-ups a method served.
"""


@dataclass(frozen=True)
class Cell:
    """One task at one length: examples as tokens, made once for all methods."""

    task: str
    length: int
    answers: str
    contexts: tuple["Tokens", ...]


@dataclass(frozen=True)
class Tokens:
    """An example as tokens: a script for each request.

    question_tokens: of the (first) question of each script.
    asked: for each turn, the right tokens by their place in the scripts, one after the other, where
        references stand.
    """

    example: Example
    context: list[int]
    scripts: tuple[list[int], ...]
    question_tokens: tuple[int, ...]
    asked: tuple[dict[int, frozenset[int]], ...]


@dataclass(frozen=True)
class Score:
    """What a method reached in a cell; one value a question."""

    method: str
    task: str
    length: int
    answers: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return sum(self.values) / len(self.values)


def make_cell(
    encoder: Tokenizer,
    task: str,
    length: int,
    samples: int,
    turns: int,
    seed: int,
    answers: str,
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
        contexts.append(_tokens(encoder, task, example, answers))
    return Cell(task, length, answers, tuple(contexts))


def _tokens(encoder: Tokenizer, task: str, example: Example, answers: str) -> Tokens:
    """Questions as forced tokens, answers as free or forced ones; one conversation, or one each."""
    parts, lengths, asked, begin = [], [], [], 0
    for turn in example.turns:
        question = _encode(encoder, turn.question)
        answer = encoder.encode(turn.answer, add_special_tokens=False)
        begin += len(question)
        lengths.append(len(question))
        asked.append({begin + i: right for i, right in acceptable(turn, answer).items()})
        free = [FREE] * (len(answer.ids) + _SPARE_TOKENS)
        parts.append(question + (free if answers == WRITTEN else answer.ids))
        begin += len(parts[-1]) - len(question)
    if TASKS[task].conversation:
        parts, lengths = [[token for part in parts for token in part]], lengths[:1]
    context = _encode(encoder, example.context)
    return Tokens(example, context, tuple(parts), tuple(lengths), tuple(asked))


def run_cell(
    engine: Engine, method: Method, cell: Cell, decode: Callable[[list[int]], str]
) -> Score:
    """Asks every question of a cell. The engine serves `method` already."""
    values: list[float] = []
    for tokens in cell.contexts:
        scripts = list(tokens.scripts)
        together = 1 if engine.one_at_a_time else len(scripts)
        outputs: list[Decoded] = []
        for first in range(0, len(scripts), together):
            engine.restart(tokens.question_tokens[first])
            batch = scripts[first : first + together]
            outputs += engine.decode(tokens.context, batch, logprobs=cell.answers == GIVEN)
        if cell.answers == GIVEN:
            likeliest = [token for output in outputs for token in output.likeliest]
            values += [
                sum(likeliest[place] in right for place, right in asked.items()) / len(asked)
                for asked in tokens.asked
            ]
            continue
        written: list[str] = []
        for script, output in zip(scripts, outputs, strict=True):
            written += _answers(script, output.ids, decode)
        values += [
            turn.score(answer) for turn, answer in zip(tokens.example.turns, written, strict=True)
        ]
    return Score(method.name, cell.task, cell.length, cell.answers, tuple(values))


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
