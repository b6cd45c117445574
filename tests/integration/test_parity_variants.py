"""Tokens that no tailored op has part in equal vLLM's own, whatever the engine's options."""

from pathlib import Path

import pytest
import speculation
from decoding import FORCIBLE, decode
from engines import PROMPT_LENGTHS, Expected, engine, greedy, random_prompts

PRECISION = {"bfloat16": (0.25, 5e-4), "float16": (0.03, 1e-5)}
"""How far a log-probability, and the mean KL divergence, may be off; a third of it was measured."""


def test_chunked_prefill(random_llama: Path, expected: Expected) -> None:
    with engine(random_llama, {}, max_num_batched_tokens=32, max_num_seqs=16) as llm:
        assert greedy(llm, expected.prompts) == expected.tokens


def test_forced_preemption(random_llama: Path, expected: Expected) -> None:
    arguments = {
        "num_gpu_blocks_override": 5,
        "max_model_len": 256,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    with engine(random_llama, {}, **arguments) as llm:
        assert greedy(llm, expected.prompts) == expected.tokens
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions(random_llama: Path, dtype: str) -> None:
    """Said the same tokens, both find the next ones as probable, up to their precision."""
    prompts = random_prompts(PROMPT_LENGTHS)
    with engine(random_llama, dtype=dtype, **FORCIBLE) as llm:
        expected = decode(llm, prompts, 12)
    with engine(random_llama, {}, dtype=dtype, **FORCIBLE) as llm:
        actual = decode(llm, prompts, 12, forced=expected.tokens)
    error, divergence = PRECISION[dtype]
    assert actual.error(expected) < error
    assert actual.divergence(expected) < divergence


def test_full_attention_below(random_llama: Path) -> None:
    prompts = random_prompts([500, 700], seed=5)
    with engine(random_llama) as llm:
        expected = greedy(llm, prompts)
    with engine(random_llama, {"full_attention_below": 1024}) as llm:
        assert greedy(llm, prompts) == expected


def test_speculative_rows_are_exact(random_llama: Path) -> None:
    """Beyond any budget: each step of these prompts has a draft, and two tokens are the budget."""
    case = speculation.CASES["always"]
    with engine(random_llama) as llm:
        expected = greedy(llm, case.prompts, speculation.STEPS)
    result = speculation.run(random_llama, "always")
    assert result.tokens == expected
    assert result.drafted > 0
    assert result.tailored == 0
