"""gpt-oss: learned logits of each head in the softmax, sliding windows in every other layer."""

from pathlib import Path
from typing import Any

import pytest
from engines import attention_layers, engine, greedy, random_prompts
from random_checkpoint import save_random_checkpoint
from tailored import SPARSE_ALL, Rows, decode_steps, tailored_ops

EXACT = SPARSE_ALL | {"profile": {"dense_layers": [1]}, "residual_tokens": 1024}
"""Of the two layers that are ours one is dense and one sparse, and every token is read."""
PROMPTS = random_prompts([1, 100, 129, 300, 900], seed=8)
STEPS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sinks that outweigh all tokens of some heads, and are nothing beside those of others.

    Every token takes both experts: a choice between them could turn on a last bit.
    """
    return save_random_checkpoint(
        tmp_path_factory.mktemp("models") / "gpt-oss",
        "GptOss",
        std={"sinks": 4.0},
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=128,
    )


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with engine(model) as llm:
        tokens = greedy(llm, PROMPTS, STEPS)
    assert len({token for one in tokens for token in one}) > 30
    return tokens


def without_sinks(llm: Any) -> None:
    for layer in attention_layers(llm).values():
        if layer.impl.__class__.__name__ == "TailorKVImpl":
            layer.impl.sinks = None


def test_short_contexts(model: Path, expected: list[list[int]]) -> None:
    """Attended in full, prompts and decode steps; without sinks tokens would be others."""
    with engine(model, {"full_attention_below": 2048}) as llm:
        assert greedy(llm, PROMPTS, STEPS) == expected
        without_sinks(llm)
        assert greedy(llm, PROMPTS, STEPS) != expected


def test_tailored_ops(model: Path, expected: list[list[int]]) -> None:
    with tailored_ops() as rows, engine(model, EXACT, max_num_batched_tokens=256) as llm:
        assert greedy(llm, PROMPTS, STEPS) == expected
        steps = decode_steps(PROMPTS, STEPS)
        assert rows == Rows(dense=steps, sparse=steps)
