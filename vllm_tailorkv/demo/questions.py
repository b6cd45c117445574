"""Questions for a real chat model, and a long real text in which their answers stand.

Two kinds have one right answer, by which a reply is judged: the codes of needles, and facts about
Python's standard library, each of which stands in a passage of its source. A third kind has none:
what the backends reply is only shown side by side.
"""

import bisect
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from vllm_tailorkv.demo.text import Needle, hide

_INTRODUCTION = "Here is a long text. A question about it follows at the end.\n\n"
_END = "\nThe text ends here. "
_LINES_AROUND = 6
# What passages may take of the text at most; the needles and the rest of it need room, too.
_PASSAGES_SHARE = 0.25


@dataclass(frozen=True)
class Question:
    """A question on a text.

    Args:
        title: a few words, for tables.
        prompt: the question as the model gets it.
        answers: right ones; a reply is right that has any of them. None: it is not judged.
        passage: whole lines from which the answer can be told; empty if it needs the whole text.
    """

    title: str
    prompt: str
    answers: tuple[str, ...] = ()
    passage: str = ""

    @property
    def is_judged(self) -> bool:
        """Whether there is a right answer."""
        return bool(self.answers)

    def is_answered_by(self, reply: str) -> bool:
        """Whether `reply` has a right answer, not as part of a longer word or number."""
        return any(
            re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE)
            for answer in self.answers
        )


@dataclass(frozen=True)
class PlacedQuestion:
    """A question and the index of its passage's first token; None if it has no passage."""

    question: Question
    token_offset: int | None


@dataclass(frozen=True)
class LongText:
    """Text of `num_tokens` tokens and questions on it, those with a passage in its order."""

    text: str
    num_tokens: int
    questions: tuple[PlacedQuestion, ...]

    @property
    def opening(self) -> str:
        """What every message begins with, so that a server reads it once."""
        return f"{_INTRODUCTION}{self.text}"

    def message(self, question: Question) -> str:
        """The text and the question, as a user's message."""
        return f"{self.opening}{_END}{question.prompt}"


@dataclass(frozen=True)
class _Fact:
    """Something that stands in a module's source, as `quote`."""

    module: str
    quote: str
    prompt: str
    answers: tuple[str, ...]


_FACTS = (
    _Fact(
        "pprint",
        "Fred L. Drake, Jr.",
        "Who is the author of the module pprint?",
        ("Fred L. Drake", "Fred Drake"),
    ),
    _Fact(
        "random",
        "The period is 2**19937-1",
        "What is the period of the Mersenne Twister core generator?",
        ("2**19937-1", "2**19937", "2^19937", "2^19937-1", "2^{19937}"),
    ),
    _Fact(
        "fractions",
        "Originally contributed by Sjoerd Mullender",
        "Who originally contributed the module fractions?",
        ("Sjoerd Mullender",),
    ),
    _Fact(
        "optparse",
        "Originally distributed as Optik",
        "Under what name was the module optparse originally distributed?",
        ("Optik",),
    ),
    _Fact(
        "getopt",
        "Long option support added by Lars Wirzenius",
        "Who added long option support to the module getopt?",
        ("Lars Wirzenius",),
    ),
    _Fact(
        "quopri",
        "MAXLINESIZE = 76",
        "What number is MAXLINESIZE in the module quopri?",
        ("76",),
    ),
    _Fact(
        "webbrowser",
        "Maintained by Georg Brandl",
        "Who maintains the module webbrowser?",
        ("Georg Brandl",),
    ),
    _Fact(
        "ast",
        "Copyright 2008 by Armin Ronacher",
        "Who holds the copyright of the module ast?",
        ("Armin Ronacher",),
    ),
)

_FREE = (
    Question("in a sentence", "In one sentence: what is this text about?"),
    Question("explain a license", "Explain in two sentences what a software license is."),
)


def ask_for(needle: Needle) -> Question:
    """The question for a needle's code."""
    return Question(
        title=needle.name,
        prompt=f"What is the secret code of {needle.name}? Answer with the number.",
        answers=(needle.code,),
        passage=needle.sentence,
    )


def build_text(tokenizer: Tokenizer, num_tokens: int, needles: list[Needle], seed: int) -> LongText:
    """Real text with needles and passages spread evenly over it, and the questions on them.

    Facts are asked as far as their passages take at most a quarter of the text. The text has about
    `num_tokens` tokens: lines are counted one by one, and a tokenizer may join their ends.

    Raises:
        ValueError: the needles do not fit, or this machine has too little text.
    """
    questions = [ask_for(needle) for needle in needles]
    room = num_tokens * _PASSAGES_SHARE
    for question in _facts():
        room -= len(tokenizer.encode(question.passage).ids)
        if room < 0:
            break
        questions.append(question)
    random.Random(f"questions {seed}").shuffle(questions)
    text, _, _ = hide(tokenizer, num_tokens, [question.passage for question in questions], seed)
    starts = [start for start, _ in tokenizer.encode(text).offsets]
    placed = [
        PlacedQuestion(question, bisect.bisect_left(starts, text.index(question.passage)))
        for question in questions
    ]
    placed += [PlacedQuestion(question, None) for question in _FREE]
    return LongText(text, len(starts), tuple(placed))


def _facts() -> Iterator[Question]:
    """A question for each fact that the source of this Python states."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for fact in _FACTS:
        try:
            lines = (library / f"{fact.module}.py").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        found = [number for number, line in enumerate(lines) if fact.quote in line]
        if not found:
            continue
        around = lines[max(found[0] - _LINES_AROUND, 0) : found[0] + _LINES_AROUND]
        passage = "\n".join([f"# From Python's module {fact.module}:", *around, ""])
        yield Question(f"{fact.module}: {fact.prompt}", fact.prompt, fact.answers, passage)
