"""Tokens within the budget equal vLLM's own, whatever the engine's options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import speculation
import torch
from engines import PROMPT_LENGTHS, Expected, engine, greedy, random_prompts


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
def test_half_precisions(random_llama: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where vLLM would take AMX, which rounds otherwise, both take the op whose pages ours are.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    prompts = random_prompts(PROMPT_LENGTHS)
    with engine(random_llama, dtype=dtype) as llm:
        expected = greedy(llm, prompts)
    with engine(random_llama, {}, dtype=dtype) as llm:
        assert greedy(llm, prompts) == expected


def test_full_attention_below(random_llama: Path) -> None:
    prompts = random_prompts([500, 700], seed=5)
    with engine(random_llama) as llm:
        expected = greedy(llm, prompts)
    with engine(random_llama, {"full_attention_below": 1024}) as llm:
        assert greedy(llm, prompts) == expected


def test_speculative_rows_are_exact(random_llama: Path) -> None:
    # In a process of its own: after speculation, vLLM's CPU worker cannot start again in the
    # same process (it trips over modules that speculation has imported).
    script = Path(speculation.__file__)
    result = subprocess.run(
        [sys.executable, str(script), str(random_llama)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected, tokens = json.loads(result.stdout.splitlines()[-1])
    assert tokens == expected
