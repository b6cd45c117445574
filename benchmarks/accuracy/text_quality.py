"""Log-likelihood of held-out real text, every token of it a decode step."""

import random
from dataclasses import dataclass
from itertools import islice

from tokenizers import Tokenizer

from accuracy import text
from accuracy.engine import Engine

_OBSERVED = 32
"""First steps that count as a question to policies that want one."""


@dataclass(frozen=True)
class Likelihood:
    """Mean log-likelihood (nats a token) of each of `values` successive stretches of the text."""

    method: str
    length: int
    stretch: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.values) / len(self.values)


def held_out(encoder: Tokenizer, num_tokens: int, seed: int) -> list[int]:
    """The first `num_tokens` tokens of the evaluation text in an order of its own."""
    lines = text.lines(text.EVALUATION_PACKAGES, random.Random(f"text {seed}"))
    ids: list[int] = []
    while len(ids) < num_tokens:
        ids += encoder.encode("".join(islice(lines, 64)), add_special_tokens=False).ids
    return ids[:num_tokens]


def likelihood(
    engine: Engine, method: str, texts: list[list[int]], num_steps: int, stretch: int
) -> Likelihood:
    """Teacher forcing of the last `num_steps` of every text after its others as a prompt."""
    logprobs: list[list[float]] = []
    for ids in texts:
        engine.restart(_OBSERVED)
        (decoded,) = engine.decode(ids[:-num_steps], [ids[-num_steps:]], logprobs=True)
        logprobs.append(decoded.logprobs)
    steps = [sum(step) / len(texts) for step in zip(*logprobs, strict=True)]
    runs = [steps[i : i + stretch] for i in range(0, num_steps, stretch)]
    return Likelihood(method, len(texts[0]), stretch, tuple(sum(run) / len(run) for run in runs))
