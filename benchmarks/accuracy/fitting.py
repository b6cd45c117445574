"""Examples of the length asked for, whatever the tokenizer does at the seams of a text."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from tokenizers import Tokenizer

TOLERANCE = 0.02
_TRIES = 12


class Sized(Protocol):
    """Has a length in tokens."""

    @property
    def size(self) -> int:
        """Tokens."""
        ...


T = TypeVar("T", bound=Sized)


def fitted(make: Callable[[int], T], length: int) -> T:
    """What `make` returns for the length that leads to `length` tokens or up to 2% fewer.

    Where it moves in larger steps than that, the longest one found that is no longer than `length`.

    Raises:
        ValueError: everything that `make` returned is longer.
    """
    asked, best = length, None
    for _ in range(_TRIES):
        made = make(asked)
        if made.size <= length and (best is None or made.size > best.size):
            best = made
        if (1 - TOLERANCE) * length <= made.size <= length:
            break
        asked += round((1 - TOLERANCE / 2) * length) - made.size
    if best is None:
        raise ValueError(f"{length} tokens are too few; take a larger length")
    return best


def adds_up(encoder: Tokenizer) -> bool:
    """A newline is a token of its own, so that the tokens of a text are those of its lines."""
    pieces = ("One line.\n", "The next, (with) marks:\n", "  123\n", "-----\n", "a\n", "The end.\n")
    whole = encoder.encode("".join(pieces), add_special_tokens=False).ids
    parts = [encoder.encode(piece, add_special_tokens=False).ids for piece in pieces]
    return bool(whole == [token for part in parts for token in part])
