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

from vllm_tailorkv.demo.text import Needle, hide, make_needles

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

    def find(self, reply: str) -> int | None:
        """Where `reply` has a right answer, not as part of a longer word or number."""
        for answer in self.answers:
            # "1,234" is one number, "1234." is one that ends a sentence.
            pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(answer)}(?!\w)(?![.,]\d)"
            if found := re.search(pattern, reply, re.IGNORECASE):
                return found.start()
        return None


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

    def message(self, question: Question) -> str:
        """The text and the question, as a user's message."""
        return f"{self.text}\n\n{question.prompt}"


@dataclass(frozen=True)
class _Fact:
    """Something that stands in a file of Python's library, as `quote`."""

    file: str
    quote: str
    prompt: str
    answers: tuple[str, ...]


_FACTS = (
    _Fact(
        "random.py",
        "The period is 2**19937-1",
        "What is the period of the Mersenne Twister core generator?",
        ("2**19937-1", "2**19937", "2^19937-1", "2^19937", "2^{19937}"),
    ),
    _Fact(
        "pprint.py",
        "Fred L. Drake, Jr.",
        "Who is the author of the module pprint?",
        ("Fred L. Drake", "Fred Drake"),
    ),
    _Fact(
        "LICENSE.txt",
        "successor of a language called ABC",
        "Python was created as a successor of a language. What is that language called?",
        ("ABC",),
    ),
    _Fact(
        "fractions.py",
        "Originally contributed by Sjoerd Mullender",
        "Who originally contributed the module fractions?",
        ("Sjoerd Mullender",),
    ),
    _Fact(
        "getopt.py",
        "Long option support added by Lars Wirzenius",
        "In the module getopt, long option support was added by whom?",
        ("Lars Wirzenius",),
    ),
    _Fact(
        "optparse.py",
        "Originally distributed as Optik",
        "The module optparse was originally distributed as what?",
        ("Optik",),
    ),
    _Fact(
        "webbrowser.py",
        "Maintained by Georg Brandl",
        "By whom is the module webbrowser maintained?",
        ("Georg Brandl",),
    ),
    _Fact(
        "ast.py",
        "Copyright 2008 by Armin Ronacher",
        "In the module ast, the copyright of 2008 is by whom?",
        ("Armin Ronacher",),
    ),
)

# No two alike: a small model finds one among eight of a kind no better than by chance.
_SUBJECTS = (
    "the number of the blue locker",
    "the phone extension of the bakery",
    "the weight of the old bell in grams",
    "the code of the garden gate",
    "the price of the violin in crowns",
    "the serial number of the telescope",
    "the population of Ostervik",
    "the height of the radio mast in millimetres",
)

_FREE = (
    Question("in a sentence", "In one sentence: what is this text about?"),
    Question("explain a license", "Explain in two sentences what a software license is."),
)


def ask_for(needle: Needle) -> Question:
    """The question for the code of a made-up name."""
    return Question(
        title=needle.name,
        prompt=f"What is the secret code of {needle.name}?",
        answers=(needle.code,),
        passage=needle.sentence,
    )


def make_questions(count: int, seed: int) -> list[Question]:
    """`count` questions for numbers that no text contains by chance, no two alike at first.

    Raises:
        ValueError: `count` is negative.
    """
    needles = make_needles(count, seed)
    unlike = [
        Question(
            title=subject,
            prompt=f"What is {subject}?",
            answers=(needle.code,),
            passage=f"{subject.capitalize()} is {needle.code}.\n",
        )
        for subject, needle in zip(_SUBJECTS, needles, strict=False)
    ]
    return unlike + [ask_for(needle) for needle in needles[len(unlike) :]]


def build_text(tokenizer: Tokenizer, num_tokens: int, num_needles: int, seed: int) -> LongText:
    """Real text with needles and passages spread evenly over it, and the questions on them.

    Facts are asked as far as their passages take at most a quarter of the text. The text has about
    `num_tokens` tokens: lines are counted one by one, and a tokenizer may join their ends.

    Raises:
        TailorKVError: the needles do not fit, or this machine has too little text.
    """
    questions = make_questions(num_needles, seed)
    room = num_tokens * _PASSAGES_SHARE
    for question in _facts():
        room -= len(tokenizer.encode(question.passage).ids)
        if room < 0:
            break
        questions.append(question)
    random.Random(f"questions {seed}").shuffle(questions)
    text, _, _ = hide(
        tokenizer, num_tokens, [question.passage for question in questions], seed, prose_first=True
    )
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
            lines = (library / fact.file).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        found = [number for number, line in enumerate(lines) if fact.quote in line]
        if not found:
            continue
        around = lines[max(found[0] - _LINES_AROUND, 0) : found[0] + _LINES_AROUND]
        passage = "\n".join([f"# From Python's {fact.file}:", *around, ""])
        yield Question(fact.file, fact.prompt, fact.answers, passage)
