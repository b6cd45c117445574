"""Layers with a recurrent state beside ours: they stay vLLM's, and take blocks of the same pool."""

from pathlib import Path
from typing import Any

import pytest
from decoding import FORCIBLE, assert_same, decode
from engines import engine, random_prompts
from random_checkpoint import save_random_checkpoint
from tailored import BOTH_EXACT, SPARSE_ALL, decode_steps, own_layers, tailored_ops

from vllm_tailorkv.errors import TailorKVError

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["conv", "full_attention"] * 3,
    "conv_dim": 256,
    "conv_L_cache": 3,
    "block_dim": 256,
    "block_ff_dim": 256,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
BOTH = BOTH_EXACT | {"profile": {"dense_layers": [1, 3]}}
PROMPTS = random_prompts([70, 130, 257, 380], seed=21)
STEPS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short convolutions, whose state is their last inputs."""
    return save_random_checkpoint(tmp_path_factory.mktemp("models") / "model", "Lfm2", **SHAPE)


@pytest.fixture(scope="module")
def expected(model: Path) -> Any:
    """What vLLM's own backend says."""
    with engine(model, **FORCIBLE) as llm:
        return decode(llm, PROMPTS, STEPS)


@pytest.mark.parametrize("options", [SPARSE_ALL, BOTH], ids=["sparse", "both"])
def test_recurrent_layers(model: Path, expected: Any, options: dict[str, Any]) -> None:
    """Pages of either kind of ours, and states, come in one size."""
    with tailored_ops() as rows, engine(model, options, **FORCIBLE) as llm:
        assert_same(decode(llm, PROMPTS, STEPS), expected)
        assert rows.total == decode_steps(PROMPTS, STEPS) * own_layers(llm)
    assert (rows.dense > 0) == (options is BOTH)


def test_chunks(model: Path, expected: Any) -> None:
    """vLLM's own backend says something else with chunks than without; ours says what it says."""
    chunks = {"max_num_batched_tokens": 128}
    with engine(model, **FORCIBLE, **chunks) as llm:
        chunked = decode(llm, PROMPTS, STEPS)
    assert chunked.tokens != expected.tokens, "docs/LIMITS.md tells of a difference"
    with engine(model, BOTH, **FORCIBLE, **chunks) as llm:
        assert_same(decode(llm, PROMPTS, STEPS), chunked)


def test_a_pool_of_our_own_is_refused(model: Path) -> None:
    with (
        pytest.raises(TailorKVError, match=r'recurrent state; give placement="joint"'),
        engine(model, {"placement": "split"}),
    ):
        pass


def test_other_recurrent_layers_are_refused(model: Path) -> None:
    kinds = ["linear_attention", "full_attention"] * 3
    with (
        pytest.raises(TailorKVError, match=r"recurrent state.*layers of kind linear_attention"),
        engine(model, {}, hf_overrides={"layer_types": kinds}),
    ):
        pass
