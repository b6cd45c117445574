"""What the retriever is trained on: what counts as right can be told from what stands before."""

import random
from pathlib import Path

import pytest
import torch
from accuracy.exercises import MIN_ECHO, echo
from accuracy.sequences import SHORTEST, TASK_WEIGHTS, Data
from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[2] / "benchmarks/accuracy/retriever/tokenizer.json"
ENCODER = Tokenizer.from_file(str(TOKENIZER))
VOCAB_SIZE = ENCODER.get_vocab_size()


@pytest.mark.parametrize("num_tokens", [MIN_ECHO, 100, 2000])
@pytest.mark.parametrize("seed", range(6))
def test_echo_counts_what_can_be_told(num_tokens: int, seed: int) -> None:
    row = echo(random.Random(seed), VOCAB_SIZE, num_tokens)
    ids = [token for token, _ in row]
    told = next((n for n, (_, known) in enumerate(row) if known), len(row))
    assert all(1 <= token < VOCAB_SIZE for token in ids)
    assert told < len(row) or num_tokens < 2000
    for place in (n for n, (_, known) in enumerate(row) if known):
        # Some tokens before it stand once among those first told, and this one follows there.
        assert any(
            _followers(ids[:told], ids[place - size : place]) == [ids[place]]
            for size in range(1, place)
        )


def _followers(ids: list[int], phrase: list[int]) -> list[int]:
    size = len(phrase)
    return [ids[n + size] for n in range(len(ids) - size) if ids[n : n + size] == phrase]


@pytest.mark.usefixtures("small_text")
@pytest.mark.parametrize("name", TASK_WEIGHTS)
def test_sequences_fill_a_batch(name: str) -> None:
    data = Data(ENCODER, 32768, {name: 1.0}, seed=1)
    for batch_size, num_tokens in ((3, SHORTEST), (2, 512)):
        batch = data.batch(batch_size, num_tokens)
        assert batch.ids.shape == batch.positions.shape == batch.weights.shape
        assert batch.ids.shape == (batch_size, num_tokens)
        assert (batch.positions.diff(dim=1) > 0).all()
        assert (batch.positions < 32768).all()
        # The token that stands there is right, whatever else is.
        assert (batch.right == batch.ids[..., None]).any(-1).all()
        assert (batch.weights > 0).any()
    assert (batch.weights >= 1).any() == (name != "plain_text")


@pytest.mark.usefixtures("small_text")
def test_same_seed_same_sequences() -> None:
    one, same, other = (
        Data(ENCODER, 32768, TASK_WEIGHTS, seed).batch(4, 256) for seed in (1, 1, 2)
    )
    assert torch.equal(one.ids, same.ids)
    assert torch.equal(one.positions, same.positions)
    assert not torch.equal(one.ids, other.ids)
