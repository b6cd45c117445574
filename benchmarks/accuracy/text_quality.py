"""Held-out text, every token of it a decode step: its likelihood, how far from full attention."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from accuracy import text
from accuracy.engine import Engine
from accuracy.reference import Comparison, Recorder, Reference

PROSE, CODE = "prose", "code"
KINDS = (PROSE, CODE)
"""Docstrings, and source files, of the evaluation packages."""

_OBSERVED = 32
"""First steps that count as a question to policies that want one."""
_BLOCK, _RESAMPLES = 50, 2000


@dataclass(frozen=True)
class Likelihood:
    """Mean log-likelihood (nats a token) of each of `values` successive stretches of the text."""

    method: str
    length: int
    stretch: int
    values: tuple[float, ...]
    kind: str = PROSE

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.values) / len(self.values)


@dataclass(frozen=True)
class Divergence:
    """How far a method is from full attention at `steps` decode steps of each text.

    mean: Kullback-Leibler divergence from full attention, over the whole vocabulary, nats a token.
    low, high: its 95% confidence interval, by bootstrap over blocks of successive positions.
    agreement: share of positions where both think the same token likeliest.
    values: mean divergence of each of the successive stretches of `stretch` steps.
    """

    method: str
    kind: str
    length: int
    steps: int
    mean: float
    low: float
    high: float
    agreement: float
    stretch: int
    values: tuple[float, ...]


def held_out(encoder: Tokenizer, num_tokens: int, seed: int, kind: str = PROSE) -> list[int]:
    """The first `num_tokens` tokens of the evaluation text in an order of its own."""
    rng = random.Random(f"text {seed}")
    lines: Iterator[str]
    if kind == CODE:
        lines, size = text.code(text.EVALUATION_PACKAGES, rng), 1
    else:
        lines, size = text.lines(text.EVALUATION_PACKAGES, rng), 64
    ids: list[int] = []
    while len(ids) < num_tokens:
        ids += encoder.encode("".join(islice(lines, size)), add_special_tokens=False).ids
    return ids[:num_tokens]


def references(folder: Path, kind: str, texts: Sequence[list[int]], steps: int) -> list[Reference]:
    """Where full attention's log-probabilities of each text are kept."""
    return [Reference(folder / f"{kind}-{i}.f16", steps) for i, _ in enumerate(texts)]


def likelihood(
    engine: Engine,
    method: str,
    kind: str,
    texts: Sequence[list[int]],
    kept: Sequence[Reference],
    stretch: int,
    record: bool,
) -> tuple[Likelihood, Divergence | None]:
    """Teacher forcing of the end of every text after its beginning as a prompt.

    Args:
        kept: the reference of each text; its `steps` are forced. One token more is, for which the
            prompt itself speaks: it is left out.
        record: this is full attention, and it is written to `kept`. Else the method is compared
            with what is there, if it is complete.
    """
    logprobs: list[list[float]] = []
    comparisons: list[Comparison] = []
    for ids, reference in zip(texts, kept, strict=True):
        begin = len(ids) - reference.steps - 1
        engine.restart(_OBSERVED)
        watch: Recorder | Comparison | None = None
        if record:
            watch = Recorder(reference)
        elif reference.complete:
            watch = Comparison(reference)
            comparisons.append(watch)
        watches = [] if watch is None else [watch]
        (decoded,) = engine.decode(ids[:begin], [ids[begin:]], logprobs=True, watches=watches)
        logprobs.append(decoded.logprobs[1:])
        if isinstance(watch, Recorder):
            watch.finish()
    found = Likelihood(method, len(texts[0]), stretch, _stretches(logprobs, stretch), kind)
    if len(comparisons) < len(texts):
        return found, None
    rows = [comparison.divergences for comparison in comparisons]
    low, high = interval(rows)
    agreed = [same for comparison in comparisons for same in comparison.agreed]
    steps = len(rows[0])
    mean = sum(map(sum, rows)) / (len(rows) * steps)
    agreement = sum(agreed) / len(agreed)
    values = _stretches(rows, stretch)
    length = len(texts[0])
    return found, Divergence(
        method, kind, length, steps, mean, low, high, agreement, stretch, values
    )


def interval(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% confidence interval of the mean over rows [texts][steps], by bootstrap over blocks.

    Neighbouring positions are alike, so blocks of 50 of them are drawn (of a fifth of a shorter
    text), anywhere in any of the texts.
    """
    values = np.array(rows, np.float64)
    texts, steps = values.shape
    block = max(1, min(_BLOCK, steps // 5))
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    means = ((sums[:, block:] - sums[:, :-block]) / block).ravel()
    rng = np.random.default_rng(0)
    drawn = rng.choice(means, (_RESAMPLES, -(-texts * steps // block))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _stretches(rows: Sequence[Sequence[float]], stretch: int) -> tuple[float, ...]:
    steps = [sum(step) / len(rows) for step in zip(*rows, strict=True)]
    runs = [steps[i : i + stretch] for i in range(0, len(steps), stretch)]
    return tuple(sum(run) / len(run) for run in runs)
