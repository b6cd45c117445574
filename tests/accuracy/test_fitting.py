"""Lengths are right where tokens do not add up."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from accuracy.fitting import adds_up, fitted
from tokenizers import Tokenizer, models

TOKENIZER = Path(__file__).parents[2] / "benchmarks/accuracy/retriever/tokenizer.json"


@dataclass(frozen=True)
class Made:
    size: int


@pytest.mark.parametrize("factor", [0.6, 0.97, 1.0, 1.5])
@pytest.mark.parametrize("overhead", [0, 300])
def test_length_is_found(factor: float, overhead: int) -> None:
    made = fitted(lambda asked: Made(int(asked * factor) + overhead), 4000)
    assert 3920 <= made.size <= 4000


def test_large_steps_stay_below() -> None:
    """A fact of 150 tokens is in it or is not."""
    made = fitted(lambda asked: Made(asked // 150 * 150 + 20), 2000)
    assert 1820 <= made.size <= 2000


def test_what_is_never_short_enough_is_refused() -> None:
    with pytest.raises(ValueError, match="100 tokens are too few"):
        fitted(lambda asked: Made(max(asked, 120)), 100)


def test_whose_tokens_add_up() -> None:
    assert adds_up(Tokenizer.from_file(str(TOKENIZER)))
    vocabulary = {chr(code): code for code in range(128)}
    assert adds_up(Tokenizer(models.BPE(vocabulary, [])))
    merged = Tokenizer(models.BPE({**vocabulary, "\nT": 128}, [("\n", "T")]))
    assert not adds_up(merged)
