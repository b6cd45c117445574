"""Layers with a recurrent state beside ours: they stay vLLM's, and take blocks of the same pool."""

from pathlib import Path
from typing import Any

import pytest
from decoding import FORCIBLE, assert_same, decode
from engines import engine, random_prompts
from features import metric
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
GATED: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
CALM = {"": 0.06, "embed_tokens.weight": 0.3, "lm_head.weight": 0.15}
"""Weights that do not amplify what two roundings to bfloat16 differ by."""
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


def test_chunks_and_preemption(model: Path, expected: Any) -> None:
    arguments = {"max_num_batched_tokens": 128, "max_model_len": 512, "disable_log_stats": False}
    few = {"num_gpu_blocks_override": 20}
    with engine(model, BOTH, **FORCIBLE, **arguments, **few) as llm:
        assert_same(decode(llm, PROMPTS, STEPS), expected)
        assert metric(llm, "num_preemptions") > 0


def test_gated_delta_nets(tmp_path: Path) -> None:
    """vLLM's op for them takes bfloat16 only, so both are made to say the same."""
    model = save_random_checkpoint(tmp_path / "model", "Qwen3_5", std=CALM, **GATED)
    arguments = FORCIBLE | {"dtype": "bfloat16"}
    with engine(model, **arguments) as llm:
        expected = decode(llm, PROMPTS, STEPS)
    with tailored_ops() as rows, engine(model, BOTH, **arguments) as llm:
        found = decode(llm, PROMPTS, STEPS, expected.tokens)
    assert rows.dense == decode_steps(PROMPTS, STEPS)
    assert expected.divergence(found) < 0.01


def test_a_pool_of_our_own_is_refused(model: Path) -> None:
    with (
        pytest.raises(TailorKVError, match=r'recurrent state; give placement="joint"'),
        engine(model, {"placement": "split"}),
    ):
        pass


def test_other_recurrent_layers_are_refused(model: Path) -> None:
    kinds = ["mamba", "full_attention"] * 3
    with (
        pytest.raises(TailorKVError, match=r"recurrent state.*layers of kind mamba"),
        engine(model, {}, hf_overrides={"layer_types": kinds}),
    ):
        pass
