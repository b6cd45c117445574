"""Decode steps of the tailored ops against vLLM's own in float32, over models and head shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from decoding import FORCIBLE, Decoded, assert_same, decode
from engines import engine, random_prompts
from random_checkpoint import save_random_checkpoint
from tailored import (
    DENSE_4BIT,
    DENSE_EXACT,
    SPARSE_ALL,
    SPARSE_ALL_CHANNELS,
    Rows,
    decode_steps,
    own_layers,
    tailored_ops,
    unwritten_codes,
)

LENGTHS = [130, 257, 300, 511, 900]
STEPS = 16


def shape(queries: int, keys: int, size: int) -> dict[str, int]:
    """Heads of Q, of K and V, and their size: some models know none but the quotient."""
    return {
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": size,
        "hidden_size": queries * size,
    }


@dataclass(frozen=True)
class Model:
    """A random model, and what its 4-bit codes may cost.

    Args:
        divergence: nats a step that 4 bits may be off: twice what was measured. With codes that
            were never written it was 1.1 (Gemma2) to 5.8.
        std: widths of its weights, where they are not those of `calm`.
    """

    architecture: str
    changes: dict[str, Any]
    divergence: float
    std: dict[str, float]


# The bias outweighs K itself, and is turned by the position.
QWEN2 = {"k_proj.bias": 3.0}
GRANITE = {
    "embedding_multiplier": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.15,
    "logits_scaling": 2.0,
    "tie_word_embeddings": False,
}
# A soft cap that scores reach, and embeddings that do not outweigh all that layers add to them.
GEMMA2 = {"sliding_window": 128, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 256}
GEMMA2_STD = {"embed_tokens.weight": 0.01, "model.norm.weight": 10.0}

MODELS = {
    "llama-64-gqa4": Model("Llama", shape(8, 2, 64), 0.025, {}),
    "llama-96-gqa8": Model("Llama", shape(8, 1, 96), 0.012, {}),
    "qwen2-80-gqa1": Model("Qwen2", shape(6, 6, 80), 0.22, QWEN2),
    "qwen2-128-gqa7": Model("Qwen2", shape(7, 1, 128), 0.24, QWEN2),
    "gemma2-256-gqa4": Model("Gemma2", shape(4, 1, 256) | GEMMA2, 0.0007, GEMMA2_STD),
    "granite-128-gqa8": Model("Granite", shape(8, 1, 128) | GRANITE, 0.065, {}),
}


def calm(width: int) -> dict[str, float]:
    """Weights that pass errors on, but do not amplify them.

    With those of other tests a random model is chaotic, and 4 bits look much like garbage.
    """
    return {"": width**-0.5, "embed_tokens.weight": 0.3, "lm_head.weight": 0.15}


@dataclass(frozen=True)
class Case:
    """A model, prompts, and what vLLM's own backend says to them."""

    model: Path
    divergence: float
    prompts: list[list[int]]
    expected: Decoded

    def tailored(self, options: dict[str, Any], kind: str, forced: bool = False) -> Decoded:
        """What our backend says, all decode steps by one of the tailored ops."""
        tokens = self.expected.tokens if forced else None
        with tailored_ops() as rows, engine(self.model, options, **FORCIBLE) as llm:
            decoded = decode(llm, self.prompts, STEPS, tokens)
            steps = decode_steps(self.prompts, STEPS) * own_layers(llm)
        assert rows == Rows(**{kind: steps})
        return decoded


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = MODELS[request.param]
    path = save_random_checkpoint(
        tmp_path_factory.mktemp("models") / request.param,
        model.architecture,
        std=calm(model.changes["hidden_size"]) | model.std,
        **model.changes,
    )
    prompts = random_prompts(LENGTHS, seed=4)
    with engine(path, **FORCIBLE) as llm:
        expected = decode(llm, prompts, STEPS)
    assert len({token for tokens in expected.tokens for token in tokens}) > 15
    return Case(path, model.divergence, prompts, expected)


def test_dense_without_codes(case: Case) -> None:
    assert_same(case.tailored(DENSE_EXACT, "dense"), case.expected)


@pytest.mark.parametrize("options", [SPARSE_ALL, SPARSE_ALL_CHANNELS], ids=["onebit", "channels"])
def test_sparse_with_everything_selected(case: Case, options: dict[str, Any]) -> None:
    assert_same(case.tailored(options, "sparse"), case.expected)


def test_dense_at_4_bits(case: Case) -> None:
    """All say vLLM's tokens, so that steps compare; the distributions are those of the model."""
    decoded = case.tailored(DENSE_4BIT, "dense", forced=True)
    assert decoded.tokens == case.expected.tokens
    assert case.expected.divergence(decoded) < case.divergence


# The model that 4 bits and garbage harm least.
@pytest.mark.parametrize("case", ["gemma2-256-gqa4"], indirect=True)
def test_garbage_would_be_noticed(case: Case) -> None:
    with unwritten_codes():
        decoded = case.tailored(DENSE_4BIT, "dense", forced=True)
    assert case.expected.divergence(decoded) > 0.9
