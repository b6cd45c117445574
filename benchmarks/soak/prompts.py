"""What the server is asked: prompts whose answers are known, others, and bodies that are wrong."""

import json
import random
from dataclasses import dataclass
from typing import Any

from random_checkpoint import VOCABULARY

from soak.client import Prompt

MAX_MODEL_LEN = 2048
BLOCK_SIZE = 128
CHUNK = 256
"""Tokens of a step, at most."""

_FIRST_TOKEN = 2

_KNOWN_LENGTHS = (3, 60, 127, 128, 150, 200, 300, 450, 700, 1100, 1700)
"""Within the token budget of `fast`, around a block's end, beyond the budget, near the limit."""

_KNOWN_ANSWER = 24
# Prompt and answer of what fills the cache: beyond the budget and within it.
_LONG_FILLING, _SHORT_FILLING = (5 * BLOCK_SIZE - 20, 96), (BLOCK_SIZE - 18, 64)
_KNOWN_FILLINGS = 3
_TURNS, _TURN_TOKENS, _TURN_ANSWER = 4, 100, 16
_COMMON_TOKENS = 2 * BLOCK_SIZE + 20


@dataclass(frozen=True)
class Malformed:
    """A body that must be refused, and where it goes."""

    what: str
    content: bytes
    path: str = "/v1/completions"


class Prompts:
    """Random prompts, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.known = [self._known(n, _KNOWN_ANSWER) for n in _KNOWN_LENGTHS]
        self.known_fillings = [
            self._known(*filling, f"filling_{filling[0]}_{number}")
            for filling in (_LONG_FILLING, _SHORT_FILLING)
            for number in range(_KNOWN_FILLINGS)
        ]
        self.common = self.tokens(_COMMON_TOKENS)

    def tokens(self, length: int) -> tuple[int, ...]:
        """Random ones."""
        return tuple(self._random.choices(range(_FIRST_TOKEN, VOCABULARY), k=length))

    def mixed(self, count: int) -> list[Prompt]:
        """Half of known answer; of the others half within the budget, some near the limit."""
        others = count // 2
        prompts = [self._random.choice(self.known) for _ in range(count - others)]
        for _ in range(others):
            shortest, longest = self._random.choices(
                [(1, 180), (193, 700), (701, 1900)], [50, 35, 15]
            )[0]
            length = self._random.randint(shortest, longest)
            prompts.append(Prompt(self.tokens(length), self._random.randint(1, 64)))
        self._random.shuffle(prompts)
        return prompts

    def every_length(self) -> list[Prompt]:
        """One for each number of tokens that a step can have."""
        return [Prompt(self.tokens(length), 1) for length in range(1, CHUNK + 1)]

    def long_answers(self, count: int) -> list[Prompt]:
        """Prompts of all lengths whose answers take long."""
        lengths = [self._random.choice((100, 400, 900)) for _ in range(count)]
        return [Prompt(self.tokens(length), 800) for length in lengths]

    def filling(self, num_blocks: int) -> list[Prompt]:
        """As many as fill the cache when they are read; each needs one more block to be answered.

        Half of the blocks are of long prompts, and half of prompts of one block.
        """
        long = [_LONG_FILLING] * (num_blocks // (2 * _blocks(_LONG_FILLING[0])))
        short = [_SHORT_FILLING] * (num_blocks // (2 * _blocks(_SHORT_FILLING[0])))
        others = [Prompt(self.tokens(length), answer) for length, answer in long + short]
        prompts = [*self.known_fillings, *others]
        self._random.shuffle(prompts)
        return prompts

    def conversation(self, number: int) -> "Conversation":
        """One of those that all begin alike; the same for the same number."""
        return Conversation(number, self.common)

    def too_long(self) -> list[Prompt]:
        """Prompts beyond the limit: by a token, and by far."""
        lengths = (MAX_MODEL_LEN + 1, MAX_MODEL_LEN + 200, 4 * MAX_MODEL_LEN)
        return [Prompt(self.tokens(length), 1) for length in lengths]

    def _known(self, length: int, answer: int, name: str | None = None) -> Prompt:
        return Prompt(self.tokens(length), answer, name or f"prompt_{length}")


class Conversation:
    """Turns of a user, each after all that was said before."""

    def __init__(self, number: int, common: tuple[int, ...]) -> None:
        self._number = number
        self._random = random.Random(number)
        self._said = list(common)
        self._turn = 0

    @property
    def is_over(self) -> bool:
        """There are no more turns."""
        return self._turn == _TURNS

    def ask(self) -> Prompt:
        """What the user says next."""
        self._said += self._random.choices(range(_FIRST_TOKEN, VOCABULARY), k=_TURN_TOKENS)
        self._turn += 1
        name = f"conversation_{self._number}_{self._turn}"
        return Prompt(tuple(self._said), _TURN_ANSWER, name)

    def hear(self, answer: list[int]) -> None:
        """What the model says to it."""
        self._said += answer


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def malformed(model: str) -> list[Malformed]:
    """Bodies that no server should take."""
    good: dict[str, Any] = {"model": model, "prompt": [5, 6, 7], "max_tokens": 2}

    def changed(what: str, **changes: Any) -> Malformed:
        return Malformed(what, json.dumps(good | changes).encode())

    chat = {"model": model, "messages": "hello", "max_tokens": 2}
    return [
        Malformed("JSON that is cut short", b'{"model": "'),
        Malformed("bytes that are no text", b"\xff\xfe\x00"),
        Malformed("an empty body", b""),
        Malformed("a list", b"[]"),
        Malformed("messages that are no list", json.dumps(chat).encode(), "/v1/chat/completions"),
        Malformed("an unknown path", b"{}", "/v1/nothing"),
        changed("an unknown model", model="nobody"),
        changed("no prompt", prompt=None),
        changed("an empty prompt", prompt=[]),
        changed("a prompt of the wrong type", prompt={"text": 1}),
        changed("a token beyond the vocabulary", prompt=[VOCABULARY + 7]),
        changed("a negative token", prompt=[-1]),
        changed("a negative max_tokens", max_tokens=-1),
        changed("max_tokens of the wrong type", max_tokens="many"),
        changed("max_tokens beyond the limit", max_tokens=10 * MAX_MODEL_LEN),
        changed("a negative temperature", temperature=-1),
        changed("a top_p of two", top_p=2),
        changed("no answers", n=0),
        changed("too many logprobs", logprobs=100_000),
    ]
