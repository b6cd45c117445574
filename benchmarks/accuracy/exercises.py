"""Exercises: what tasks need, alone and dense, so that training finds it in minutes."""

import random

_ALPHABETS = (4, 8, 16, 64, 2000)
_MIN_PIECE, _MAX_PIECE = 8, 64
MIN_ECHO = 2 * _MIN_PIECE


def echo(rng: random.Random, vocab_size: int, num_tokens: int) -> list[tuple[int, bool]]:
    """Random tokens, then pieces of them again; with each, whether those before it tell it.

    Few different tokens make phrases that stand more than once: only a longer look back tells how
    a piece goes on. At least `MIN_ECHO` tokens are needed.
    """
    alphabet = rng.sample(range(1, vocab_size), min(vocab_size - 1, rng.choice(_ALPHABETS)))
    size = rng.randint(_MIN_PIECE, num_tokens // 2)
    told = rng.choices(alphabet, k=size)
    row = [(token, False) for token in told]
    spelled = "".join(map(chr, told))
    while len(row) < 2 * size:
        first = rng.randrange(size)
        piece = spelled[first : first + rng.randint(_MIN_PIECE, _MAX_PIECE)]
        # So many tokens tell which piece it is.
        telling = (n for n in range(1, len(piece)) if _is_single(piece[:n], spelled))
        known = next(telling, len(piece))
        row += [(ord(char), n >= known) for n, char in enumerate(piece)]
    return row


def _is_single(part: str, whole: str) -> bool:
    return whole.find(part, whole.find(part) + 1) < 0
