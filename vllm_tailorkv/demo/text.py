"""Long prompts of real text with facts hidden in them, made from files every machine has.

The text is Python's own standard library and the licence texts that come with installed packages
and the operating system. Nothing is generated except the needles. Given the same files and the
same seed, every function here returns the same text.
"""

import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vllm_tailorkv.errors import TailorKVError

END_OF_TEXT = "<|endoftext|>"

_SYSTEM_LICENCES = Path("/usr/share/common-licenses")
_LICENCE_PREFIXES = ("licen", "copying", "notice")
# Longer lines are data tables and minified prose; a haystack is cut at a line's end, so its
# length would be off by as much as its longest line.
_MAX_LINE_CHARS = 240
_TRAINING_CHARS = 2_000_000

_CONSONANTS = "bdfgjklmnprstvzqx"
_VOWELS = "aeiou"
_FIRST_DEPTH, _LAST_DEPTH = 0.02, 0.98


@dataclass(frozen=True)
class Needle:
    """A fact no text contains by chance: a made-up name and its number."""

    name: str
    code: str

    @property
    def sentence(self) -> str:
        """The fact as a line of its own, so that it is tokenised the same way everywhere."""
        return f"The secret code of {self.name} is {self.code}.\n"

    @property
    def question(self) -> str:
        """A quotation of the fact up to the number, to be appended to a haystack."""
        return f"\nThe secret code of {self.name} is"

    def is_answered_by(self, completion: str) -> bool:
        """Whether `completion`, what a model wrote after the question, gives this number."""
        return completion.strip().startswith(f"{self.code}.")


@dataclass(frozen=True)
class PlacedNeedle:
    """A needle and the index of its first token in the haystack."""

    needle: Needle
    token_offset: int


@dataclass(frozen=True)
class Haystack:
    """Text of `num_tokens` tokens, `needles` in the order in which they stand in it."""

    text: str
    num_tokens: int
    needles: tuple[PlacedNeedle, ...]


def make_needles(count: int, seed: int) -> list[Needle]:
    """`count` needles whose names all differ. Raises ValueError if `count` is negative."""
    if count < 0:
        raise ValueError(f"cannot make {count} needles")
    rng = random.Random(f"needles {seed}")
    names: set[str] = set()
    needles: list[Needle] = []
    while len(needles) < count:
        syllables = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(4)]
        name = ("".join(syllables) + rng.choice(_CONSONANTS)).capitalize()
        if name in names:
            continue
        names.add(name)
        needles.append(Needle(name, str(rng.randrange(100_000, 1_000_000))))
    return needles


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, trained on this machine's text.

    A newline and a digit are always tokens of their own. Hence the token count of a text is the sum
    over its lines, and a number is read and written digit by digit.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_documents_up_to(_TRAINING_CHARS), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise TailorKVError(
            f"this machine's text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}"
        )
    return tokenizer


def build_haystack(
    tokenizer: Tokenizer, num_tokens: int, needles: Sequence[Needle], seed: int
) -> Haystack:
    """Real text with `needles` spread evenly from near its start to near its end.

    The result has at most `num_tokens` tokens, and less than a line fewer. `seed` chooses the
    order of the source files. Raises TailorKVError if the needles take more than half of
    `num_tokens`, or if this machine has too little text.
    """
    text, used, offsets = hide(tokenizer, num_tokens, [needle.sentence for needle in needles], seed)
    return Haystack(text, used, tuple(map(PlacedNeedle, needles, offsets)))


def hide(
    tokenizer: Tokenizer,
    num_tokens: int,
    sentences: Sequence[str],
    seed: int,
    prose_first: bool = False,
) -> tuple[str, int, list[int]]:
    """Real text with `sentences`, whole lines each, spread evenly from near its start to its end.

    Args:
        tokenizer: counts tokens.
        num_tokens: length of the result.
        sentences: what to hide.
        seed: chooses the order of the source files.
        prose_first: licences before code; else they are mixed.

    Returns:
        The text; its number of tokens, counted line by line, at most `num_tokens` and less than a
        line fewer; for every sentence the index of its first token.

    Raises:
        TailorKVError: the sentences take more than half, or this machine has too little text.
    """
    sentence_tokens = [len(tokenizer.encode(sentence).ids) for sentence in sentences]
    budget = num_tokens - sum(sentence_tokens)
    if budget < num_tokens // 2:
        raise TailorKVError(f"{len(sentences)} needles do not fit into {num_tokens} tokens")
    spread = (_LAST_DEPTH - _FIRST_DEPTH) / max(len(sentences) - 1, 1)

    pieces: list[str] = []
    offsets: list[int] = []
    used = 0
    pending = sum(sentence_tokens)

    def place_next() -> None:
        nonlocal used, pending
        size = sentence_tokens[len(offsets)]
        pieces.append(sentences[len(offsets)])
        offsets.append(used)
        used += size
        pending -= size

    for line, line_tokens in _shuffled_lines(tokenizer, seed, prose_first):
        while pending and used >= (_FIRST_DEPTH + len(offsets) * spread) * num_tokens:
            place_next()
        if used + line_tokens + pending > num_tokens:
            break
        pieces.append(line)
        used += line_tokens
    else:
        raise TailorKVError(f"this machine has only {used} tokens of text, not {num_tokens}")
    while pending:
        place_next()
    return "".join(pieces), used, offsets


def _shuffled_lines(
    tokenizer: Tokenizer, seed: int, prose_first: bool
) -> Iterator[tuple[str, int]]:
    """Every line of every source file, with its number of tokens."""
    documents = list(_documents())
    random.Random(f"haystack {seed}").shuffle(documents)
    if prose_first:
        documents.sort(key=lambda document: document.is_code)
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        for line, encoding in zip(lines, tokenizer.encode_batch(lines), strict=True):
            yield line, len(encoding.ids)


def _documents_up_to(num_chars: int) -> Iterator[str]:
    """Source files in a fixed order that mixes code and prose, until `num_chars` are reached."""
    documents = list(_documents())
    random.Random("training").shuffle(documents)
    for document in documents:
        if num_chars <= 0:
            return
        num_chars -= len(document.text)
        yield document.text


class _Document(NamedTuple):
    text: str
    is_code: bool


@cache
def _documents() -> tuple[_Document, ...]:
    """The text of every usable source file, no two the same, each ending in a newline."""
    texts: dict[str, bool] = {}
    for path in _source_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        text = "".join(f"{line}\n" for line in text.splitlines())
        if text and max(map(len, text.splitlines())) <= _MAX_LINE_CHARS:
            texts.setdefault(text, path.suffix == ".py")
    return tuple(_Document(text, is_code) for text, is_code in texts.items())


def _source_files() -> Iterator[Path]:
    """Modules of the standard library, then licence texts, in an order that does not vary."""
    paths = sysconfig.get_paths()
    yield from sorted(Path(paths["stdlib"]).glob("*.py"))
    licences = (
        path
        for path in Path(paths["purelib"]).glob("*.dist-info/**/*")
        if path.name.lower().startswith(_LICENCE_PREFIXES) and path.is_file()
    )
    yield from sorted(licences)
    if _SYSTEM_LICENCES.is_dir():
        yield from sorted(path for path in _SYSTEM_LICENCES.iterdir() if path.is_file())
