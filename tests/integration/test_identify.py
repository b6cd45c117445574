"""Dense layers are found by measurement, through vLLM, and plans come of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import attention_layers, engine, random_prompts
from flat_layers import PERMUTED, PERMUTED_FLAT, flatten_layer, permute_layers
from random_checkpoint import save_random_checkpoint

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.profile import LayerScore, Profile, load_profile, write_profile

ALPHA, QUERIES, FLAT = 0.05, 32, 2
# The last chunk of 64 tokens holds all queries, some of them, one, and as many as there are.
LENGTHS = [500, 458, 449, 480, 32]

Scores = tuple[LayerScore | None, ...]


@contextmanager
def recording(model: Path, longest: int, **arguments: Any) -> Iterator[Any]:
    """An engine of `identify` in this process."""
    from vllm_tailorkv.identify import engine as identify

    options = identify.EngineOptions(
        str(model), arguments={"dtype": "float32", "kv_cache_memory_bytes": 256 << 20, **arguments}
    )
    with identify.open_engine(options, identify.load_model_config(options), longest) as llm:
        yield llm


def scores_of(llm: Any, prompt: list[int], alpha: float = ALPHA, queries: int = QUERIES) -> Scores:
    from vllm_tailorkv.identify.engine import record_scores

    shares: list[float] = []
    scores = record_scores(llm, prompt, alpha=alpha, queries=queries, on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    return scores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_random_checkpoint(tmp_path_factory.mktemp("flat") / "llama", "Llama")
    return flatten_layer(directory, FLAT, sharpen=4.0)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, seed=5)


@pytest.fixture(scope="module")
def whole(model: Path, prompts: list[list[int]]) -> list[Scores]:
    with recording(model, 512) as llm:
        return [scores_of(llm, prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def chunked(model: Path, prompts: list[list[int]]) -> list[Scores]:
    with recording(model, 512, max_num_batched_tokens=64) as llm:
        return [scores_of(llm, prompt) for prompt in prompts]


def expected_scores(model: Path, prompt: list[int]) -> torch.Tensor:
    """[layers, heads], by Hugging Face's model in float64 with all of its attention weights."""
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.inference_mode():
        layers = llama(torch.tensor([prompt]), output_attentions=True).attentions
    kept = max(1, int(ALPHA * len(prompt)))
    newest = torch.stack([layer[0, :, -QUERIES:].double() for layer in layers])
    # Not all of it goes to tokens where heads have sinks.
    return (newest.sum(-1) - newest.topk(kept).values.sum(-1)).mean(-1)


def heads_of(scores: Scores) -> torch.Tensor:
    return torch.tensor([layer.heads for layer in scores if layer is not None]).double()


def test_equals_float64(model: Path, prompts: list[list[int]], whole: list[Scores]) -> None:
    for prompt, scores in zip(prompts, whole, strict=True):
        expected = expected_scores(model, prompt)
        assert (heads_of(scores) - expected).abs().max() < 1e-4
        assert [layer.score for layer in scores if layer] == pytest.approx(
            expected.mean(1).tolist(), abs=1e-4
        )


def test_a_layer_that_cannot_tell_tokens_apart(whole: list[Scores]) -> None:
    for length, scores in zip(LENGTHS, whole, strict=True):
        kept = max(1, int(ALPHA * length))
        visible = range(length - QUERIES + 1, length + 1)
        flat = 1 - sum(min(1, kept / count) for count in visible) / QUERIES
        assert scores[FLAT] is not None
        assert scores[FLAT].score == pytest.approx(flat, abs=1e-4)
        assert all(layer.score < flat for i, layer in enumerate(scores) if layer and i != FLAT)


def test_chunks_make_no_difference(whole: list[Scores], chunked: list[Scores]) -> None:
    for one, many in zip(whole, chunked, strict=True):
        assert (heads_of(one) - heads_of(many)).abs().max() < 1e-5


def test_windows_and_soft_caps(tmp_path: Path) -> None:
    changes = {"sliding_window": 128, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 0.5}
    gemma = save_random_checkpoint(tmp_path / "model", "Gemma2", **changes)
    prompt = random_prompts([300], seed=6)[0]
    with recording(gemma, 301) as llm:
        scores = scores_of(llm, prompt)
    assert [layer is None for layer in scores] == [True, False, True, False]
    expected = expected_scores(gemma, prompt)[[1, 3]]
    assert (heads_of(scores) - expected).abs().max() < 1e-4


def test_attention_sinks(tmp_path: Path) -> None:
    changes = {"sliding_window": 128, "num_local_experts": 2, "num_experts_per_tok": 2}
    model = save_random_checkpoint(tmp_path / "model", "GptOss", std={"sinks": 4.0}, **changes)
    prompt = random_prompts([300], seed=7)[0]
    with recording(model, 301) as llm:
        scores = scores_of(llm, prompt)
    assert [layer is None for layer in scores] == [True, False, True, False]
    expected = expected_scores(model, prompt)[[1, 3]]
    assert (heads_of(scores) - expected).abs().max() < 1e-4


def identify(model: Path, output: Path, **arguments: Any) -> Profile:
    """What the command does, in this process."""
    from vllm_tailorkv.identify import engine as identify
    from vllm_tailorkv.identify.prompt import build_prompt

    options = identify.EngineOptions(str(model), arguments=arguments)
    config = identify.load_model_config(options)
    prompt = build_prompt(
        identify.encoder(config), file=None, num_tokens=2000, longest=4000, queries=QUERIES
    )
    with identify.open_engine(options, config, len(prompt.token_ids)) as llm:
        scores = scores_of(llm, prompt.token_ids)
        profile = identify.make_profile(
            llm.llm_engine.vllm_config, prompt, scores, alpha=ALPHA, beta=0.2, queries=QUERIES
        )
    write_profile(output, profile)
    assert load_profile(output) == profile
    return profile


def test_designed_layers_and_the_plan_they_make(demo_model: Path, tmp_path: Path) -> None:
    model = permute_layers(demo_model, tmp_path / "model", PERMUTED)
    beside = model / "tailorkv.json"
    # One that does not fit must not be in the way of a new one.
    beside.write_text("{}")
    profile = identify(model, beside)
    assert profile.dense_layers == PERMUTED_FLAT
    assert identify(demo_model, tmp_path / "demo.json").dense_layers == (0, 1)

    arguments = {"dtype": "bfloat16", "kv_cache_memory_bytes": 64 << 20}
    with engine(model, {}, **arguments) as llm:
        kinds = [layer.impl.spec.layout.kind.value for layer in attention_layers(llm).values()]
    assert [i for i, kind in enumerate(kinds) if kind == "dense"] == list(PERMUTED_FLAT)

    content = json.loads(beside.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "num_heads": 8}))
    with (
        pytest.raises(TailorKVError, match="num_heads 8, the model has 4") as caught,
        engine(model, {"profile": str(other)}, **arguments),
    ):
        pass
    assert "\n" not in str(caught.value)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, vLLM's processes included."""
    command = [str(Path(sys.executable).parent / "vllm-tailorkv"), "identify", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "VLLM_"))}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_command(model: Path, tmp_path: Path) -> None:
    picture, profile = tmp_path / "scores.png", tmp_path / "mine.json"
    result = run_command(
        str(model), "--output", str(profile), "--plot", str(picture), "--prompt-tokens", "700"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    written = load_profile(profile)
    assert written.identified is not None
    assert written.identified.prompt.tokens == 700
    assert FLAT in written.dense_layers
    assert "Dense layers:" in result.stdout
    assert f"Profile: {profile}" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run_command(str(tmp_path / "no-model"), "--output", str(tmp_path / "x.json"))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if "vllm-tailorkv: error:" in line]
    assert len(errors) == 1
    assert "no-model" in errors[0]
    assert "Traceback" not in result.stderr
