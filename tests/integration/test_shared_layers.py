"""Layers that read K and V of an earlier one: log-probabilities equal vLLM's."""

from pathlib import Path
from typing import Any

import pytest
from decoding import FORCIBLE, assert_same, decode
from engines import engine, random_prompts
from random_checkpoint import VOCABULARY, save_random_checkpoint
from tailored import BOTH_EXACT, decode_steps, own_layers, tailored_ops

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 64,
    # The last two: one of either kind.
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Gemma3n": SHAPE
    | {"laurel_rank": 16, "altup_num_inputs": 2, "activation_sparsity_pattern": None},
    # Heads of layers with full attention are wider and fewer.
    "Gemma4": SHAPE | {"global_head_dim": 128, "num_global_key_value_heads": 1},
}
# Else embeddings outweigh all that layers add to them, and tokens repeat.
STD = {"embed_tokens.weight": 0.01, "correct_output_scale": 0.5, "model.norm.weight": 10.0}
DENSE = BOTH_EXACT | {"profile": {"dense_layers": [3]}}
"""A dense layer, a dense one that reads its K and V, and a sparse one."""
PROMPTS = random_prompts([130, 257, 380], seed=21)
STEPS = 24


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_layers(architecture: str, tmp_path: Path) -> None:
    changes = ARCHITECTURES[architecture]
    model = save_random_checkpoint(tmp_path / "model", architecture, std=STD, **changes)
    with engine(model, **FORCIBLE) as llm:
        expected = decode(llm, PROMPTS, STEPS)
    assert len({token for tokens in expected.tokens for token in tokens}) > 40
    for options in (DENSE | {"guard_share": 1.0}, DENSE | {"placement": "split"}):
        with tailored_ops() as rows, engine(model, options, **FORCIBLE) as llm:
            assert_same(decode(llm, PROMPTS, STEPS), expected)
            assert own_layers(llm) == 3
        steps = decode_steps(PROMPTS, STEPS)
        # The guard asks a sparse layer once more which tokens it has read.
        asked = steps * len({"guard_share"} & options.keys())
        assert (rows.dense, rows.sparse) == (2 * steps, steps + asked)
