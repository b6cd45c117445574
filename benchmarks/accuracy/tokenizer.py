"""The retriever's tokenizer: byte-level BPE; a newline and three digits are a token each."""

import random
from collections.abc import Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from accuracy.tasks.base import words

END_OF_TEXT = "<|endoftext|>"
_NUMBER_REPEATS = 300


def train(vocab_size: int, documents: Sequence[str], num_chars: int, seed: int) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens from `num_chars` characters of `documents`.

    Because no token crosses a newline, the tokens of a text are those of its lines, one after
    another.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.Split(Regex(r" ?\d{1,3}"), behavior="isolated"),
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
    tokenizer.train_from_iterator(_corpus(documents, num_chars, seed), trainer)
    return tokenizer


def _corpus(documents: Sequence[str], num_chars: int, seed: int) -> Iterator[str]:
    # All numbers of three digits, with a space before them or not, often enough to be tokens.
    numbers = [f"{space}{number}" for number in range(100, 1000) for space in ("", " ")]
    for _ in range(_NUMBER_REPEATS):
        yield "\n".join(numbers)
    yield "\n".join(f"{mark}{word}" for word in words() for mark in ("-", " ") for _ in range(4))
    order = random.Random(seed).sample(documents, len(documents))
    for document in order:
        if num_chars <= 0:
            return
        num_chars -= len(document)
        yield document
