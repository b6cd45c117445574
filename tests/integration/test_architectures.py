"""Decoders of many architectures: tokens equal vLLM's, by its op and by the tailored ones.

`test_decode_proof.py` has other architectures, and the head sizes.
"""

from pathlib import Path
from typing import Any

import pytest
from engines import engine, greedy, random_prompts
from random_checkpoint import save_random_checkpoint
from tailored import BOTH_EXACT, decode_steps, own_layers, tailored_ops

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Qwen3": {},
    "Phi3": {},
    "Gemma3": {
        "sliding_window": 128,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        # Else embeddings outweigh all that layers add to them, and tokens repeat.
        "std": {"embed_tokens.weight": 0.01, "model.norm.weight": 10.0},
    },
}
BUDGET = 192
PROMPTS = random_prompts([1, 100, 129, 170, 300, 900])
STEPS = 40


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(architecture: str, tmp_path: Path) -> None:
    """Short contexts by vLLM's op and others by the tailored ops, whose choice leaves none out."""
    model = save_random_checkpoint(tmp_path / "model", architecture, **ARCHITECTURES[architecture])
    with engine(model) as llm:
        expected = greedy(llm, PROMPTS, STEPS)
    assert len({token for tokens in expected for token in tokens}) > 30
    with (
        tailored_ops(exact_below=BUDGET) as rows,
        engine(model, BOTH_EXACT | {"placement": "split"}) as llm,
    ):
        assert greedy(llm, PROMPTS, STEPS) == expected
        assert rows.total == decode_steps(PROMPTS, STEPS, BUDGET) * own_layers(llm) > 0
