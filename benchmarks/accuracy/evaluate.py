"""Runs tasks through an engine, for every method that the engine can serve."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tokenizers import Tokenizer

from accuracy import text
from accuracy.answers import acceptable
from accuracy.engine import Decoded, Engine
from accuracy.fitting import adds_up, fitted
from accuracy.methods import Method
from accuracy.prompts import COMPLETION, Form
from accuracy.scripts import FREE, free_runs
from accuracy.tasks import TASKS, Example, Source

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
    """One task at one length: examples as tokens, made once for all methods.

    ends: tokens that end an answer.
    """

    task: str
    length: int
    answers: str
    contexts: tuple["Tokens", ...]
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Tokens:
    """An example as tokens: a script for each request.

    size: tokens of the context and, of all requests, the longest question with its answer.
    question_tokens: of the (first) question of each script.
    asked: for each turn, the right tokens by their place in the scripts, one after the other, where
        references stand.
    """

    example: Example
    size: int
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
    form: Form = COMPLETION,
) -> Cell:
    """`samples` contexts of `length` tokens with `turns` questions each.

    Raises:
        ValueError: the task does not fit into `length` tokens.
    """
    exact = not form.chat and adds_up(encoder)
    lengths: dict[str, int] = {}

    def count(piece: str) -> int:
        if piece not in lengths:
            lengths[piece] = len(_encode(encoder, piece))
        return lengths[piece]

    def make(sample: int, asked: int) -> Tokens:
        rng = random.Random(f"{seed} {task} {length} {sample}")
        source = Source(rng, text.lines(text.EVALUATION_PACKAGES, rng), count, form.chat)
        return _tokens(encoder, task, TASKS[task].make(source, asked, turns), answers, form)

    contexts = tuple(
        make(sample, length) if exact else fitted(partial(make, sample), length)
        for sample in range(samples)
    )
    return Cell(task, length, answers, contexts, form.ends)


def _tokens(encoder: Tokenizer, task: str, example: Example, answers: str, form: Form) -> Tokens:
    """Questions as forced tokens, answers as free or forced ones; one conversation, or one each."""
    conversation = TASKS[task].conversation
    prompt = form.prompt(example, conversation)
    parts, sizes, lengths, asked, begin = [], [], [], [], 0
    for turn, written in zip(example.turns, prompt.questions, strict=True):
        question, begun = _encode(encoder, written), _encode(encoder, turn.begun)
        answer = encoder.encode(turn.answer, add_special_tokens=False)
        begin += len(question) + len(begun)
        lengths.append(len(question))
        asked.append({begin + i: right for i, right in acceptable(turn, answer).items()})
        free = [FREE] * (len(answer.ids) + form.room)
        part = free if answers == WRITTEN else answer.ids
        parts.append(question + begun + part)
        sizes.append(len(question) + len(begun) + len(answer.ids))
        begin += len(part)
    if conversation:
        parts, lengths = [[token for part in parts for token in part]], lengths[:1]
        sizes = [sum(sizes)]
    context = _encode(encoder, prompt.context)
    size = len(context) + max(sizes)
    return Tokens(example, size, context, tuple(parts), tuple(lengths), tuple(asked))


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
            given = cell.answers == GIVEN
            outputs += engine.decode(tokens.context, batch, logprobs=given, ends=cell.ends)
        if cell.answers == GIVEN:
            likeliest = [token for output in outputs for token in output.likeliest]
            values += [
                sum(likeliest[place] in right for place, right in asked.items()) / len(asked)
                for asked in tokens.asked
            ]
            continue
        written: list[str] = []
        for script, output in zip(scripts, outputs, strict=True):
            written += map(decode, free_runs(script, output.ids, cell.ends))
        values += [
            turn.score(answer) for turn, answer in zip(tokens.example.turns, written, strict=True)
        ]
    return Score(method.name, cell.task, cell.length, cell.answers, tuple(values))


def _encode(encoder: Tokenizer, piece: str) -> list[int]:
    ids: list[int] = encoder.encode(piece, add_special_tokens=False).ids
    return ids
