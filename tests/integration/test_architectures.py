"""Decoders of many architectures: equal tokens within the budget, sound ones beyond it."""

from pathlib import Path
from typing import Any

import pytest
from engines import attention_layers, engine, greedy, random_prompts
from random_checkpoint import save_random_checkpoint

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Phi3": {},
    "Granite": {},
    "Gemma2": {
        # Soft caps on the scores, and every other layer a sliding window.
        "sliding_window": 128,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
    },
    "Gemma3": {
        "sliding_window": 128,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
}
SHORT, LONG = [1, 100, 129, 170], [300, 900]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(architecture: str, tmp_path: Path) -> None:
    model = save_random_checkpoint(tmp_path / "model", architecture, **ARCHITECTURES[architecture])
    short, long = random_prompts(SHORT), random_prompts(LONG, seed=2)
    with engine(model) as llm:
        expected, full = greedy(llm, short), greedy(llm, long, 40)
    # Enough tokens that a random model, which attends everywhere, keeps most of its mind.
    options = {"bits": 4, "topk_tokens": 64, "profile": {"dense_layers": [0]}}
    with engine(model, options) as llm:
        ours = [layer.impl.__class__.__name__ for layer in attention_layers(llm).values()]
        assert "TailorKVImpl" in ours
        # Prompts are exact, and so is the first token of each.
        tokens = greedy(llm, long, 40)
        assert [row[0] for row in tokens] == [row[0] for row in full]
        assert all(len(row) == 40 for row in tokens)
    with engine(model, {"full_attention_below": 256, "placement": "split"}) as llm:
        assert greedy(llm, short) == expected


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 4, 80), (8, 1, 128), (2, 1, 256)])
def test_head_shapes(heads: int, kv_heads: int, head_dim: int, tmp_path: Path) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    model = save_random_checkpoint(tmp_path / "model", "Llama", **shape)
    prompts = random_prompts([*SHORT, *LONG])
    with engine(model) as llm:
        expected = greedy(llm, prompts, 8)
    for index in ("channels", "onebit"):
        with engine(model, {"index": index}) as llm:
            tokens = greedy(llm, prompts, 8)
        assert tokens[: len(SHORT)] == expected[: len(SHORT)]
        assert [row[0] for row in tokens] == [row[0] for row in expected]
