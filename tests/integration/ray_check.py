"""Workers that Ray starts, under both of vLLM's executors for it.

Not among the tests: Ray is 80 MB, and its engines take minutes.

    pip install -r requirements/ray.txt
    python -m pytest tests/integration/ray_check.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray_engine
from engines import LONG_OPTIONS, engine, greedy, random_prompts

PROMPTS = random_prompts([100, 300, 500], seed=31)
"""Within the budget, and beyond it; every token is a candidate."""
STEPS = 24
OPTIONS = LONG_OPTIONS["onebit"]
DENSE = OPTIONS["profile"]["dense_layers"]
PARALLEL: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2, "enforce_eager": True},
    # Stages need vLLM's warm-up.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "compilation_config": {"mode": 1, "backend": "eager"},
    },
}


@pytest.fixture(scope="module")
def expected(random_llama: Path) -> list[list[int]]:
    """What one worker says."""
    with engine(random_llama, OPTIONS) as llm:
        return greedy(llm, PROMPTS, STEPS)


def under_ray(model: Path, folder: Path, executor: str, parallel: str) -> dict[str, Any]:
    """What an engine of two workers says, and they know."""
    profile = folder / "profile.json"
    shape = {"num_layers": 4, "num_kv_heads": 2, "head_size": 64, "dense_layers": DENSE}
    profile.write_text(
        json.dumps({"schema_version": 1, "architecture": "LlamaForCausalLM", **shape})
    )
    small = {"preset": "fast", "full_attention_below": 0, **OPTIONS, "profile": str(profile)}
    arguments = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 64 << 20,
        "attention_backend": "tailorkv",
        "additional_config": {"tailorkv": small},
        **PARALLEL[parallel],
    }
    asked = {
        "executor": executor,
        "workers": 2,
        "prompts": PROMPTS,
        "steps": STEPS,
        "engine": arguments,
    }
    output = folder / "found.json"
    log = folder / "log"
    with log.open("wb") as file:
        subprocess.run(
            [sys.executable, ray_engine.__file__, json.dumps(asked), str(output)],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=ray_engine.LIMIT_SECONDS + 5,
            check=False,
        )
    assert output.exists(), log.read_text()[-4000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("executor", ray_engine.EXECUTORS)
def test_ray(
    random_llama: Path, tmp_path: Path, expected: list[list[int]], executor: str, parallel: str
) -> None:
    found = under_ray(random_llama, tmp_path, executor, parallel)
    assert found["tokens"] == expected

    # Ray's workers have the plan, of which the file was gone before they started.
    workers = found["workers"]
    assert len({worker["actor"] for worker in workers} - {None}) == 2
    kinds = {name: kind for worker in workers for name, kind in worker["kinds"].items()}
    dense = [name for name, kind in sorted(kinds.items()) if kind == "dense"]
    assert dense == [f"model.layers.{i}.self_attn.attn" for i in DENSE]
    assert len(kinds) == 4
    for worker in workers:
        assert {name: worker["options"][name] for name in ("bits", "query_reduce")} == {
            "bits": OPTIONS["bits"],
            "query_reduce": OPTIONS["query_reduce"],
        }

    # A worker that was killed ends the request, and not by waiting.
    assert "EngineDeadError" in found["end"]["error"]
    assert found["end"]["seconds"] < 60
