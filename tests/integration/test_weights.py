"""Quantized weights: they are vLLM's kernels'; K and V are those of their model.

Those kernels round to bfloat16, after which greedy tokens of two right backends part at a tie. So
both are made to say the same, and what they think of it is compared.
"""

from pathlib import Path

import pytest
from decoding import FORCIBLE, decode
from engines import engine, random_prompts
from quantized_checkpoint import KINDS, save_quantized_checkpoint
from random_checkpoint import save_random_checkpoint
from tailored import BOTH_EXACT, decode_steps, own_layers, tailored_ops

PROMPTS = random_prompts([130, 257, 380], seed=21)
STEPS = 12


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that do not amplify what two roundings to bfloat16 differ by."""
    std = {"": 0.06, "embed_tokens.weight": 0.3, "lm_head.weight": 0.15}
    return save_random_checkpoint(tmp_path_factory.mktemp("models") / "calm", "Llama", std=std)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights(kind: str, calm: Path, tmp_path: Path) -> None:
    model = save_quantized_checkpoint(calm, tmp_path / kind, kind)
    arguments = FORCIBLE | {"dtype": "bfloat16"}
    with engine(model, **arguments) as llm:
        expected = decode(llm, PROMPTS, STEPS)
    with tailored_ops() as rows, engine(model, BOTH_EXACT, **arguments) as llm:
        found = decode(llm, PROMPTS, STEPS, expected.tokens)
        assert rows.total == decode_steps(PROMPTS, STEPS) * own_layers(llm)
    assert len({token for tokens in expected.tokens for token in tokens}) > 20
    assert expected.divergence(found) < 0.01
