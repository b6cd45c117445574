"""The committed retriever still solves what its README says, with full attention."""

import itertools
import random
from pathlib import Path

import pytest
from accuracy.solved import RETRIEVER, count_right, load
from accuracy.tasks import TASKS, Example, Source


@pytest.fixture(scope="module")
def checkpoint():
    return load(RETRIEVER)


@pytest.mark.parametrize("name", ["multikey_1", "copy"])
def test_finds_what_stands_there_and_not_what_does_not(checkpoint, name: str) -> None:
    model, encoder = checkpoint
    lines = itertools.cycle(Path(__file__).read_text().splitlines(keepends=True))
    source = Source(random.Random(0), lines, lambda piece: len(encoder.encode(piece).ids))
    example = TASKS[name].make(source, 1024, 1)
    found, asked = count_right(model, encoder, example)
    assert asked > 0
    assert found >= 0.9 * asked
    # The same question without the context.
    blind, as_many = count_right(model, encoder, Example("", example.turns))
    assert as_many == asked
    assert blind < 0.6 * asked
