"""Engines in this process, for tests and harnesses."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import VOCABULARY

PROMPT_LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 150, 180]
"""Prompts whose continuation by twelve tokens stays within the token budget of `fast`."""


@contextmanager
def engine(model: Path, options: dict[str, Any] | None = None, **arguments: Any) -> Iterator[Any]:
    """An `LLM` in this process.

    Args:
        options: those of tailorkv; None for vLLM's own backend. The preset is `fast` and short
            contexts are not attended in full unless the options say so: what is tested would not
            run.
    """
    from vllm import LLM

    values = {
        "dtype": "float32",
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if options is not None:
        values["attention_backend"] = "tailorkv"
        small = {"preset": "fast", "full_attention_below": 0}
        values["additional_config"] = {"tailorkv": small | options}
    llm = LLM(model=str(model), **(values | arguments))
    try:
        yield llm
    finally:
        # Now, not when the caller's variable goes: it takes vLLM's process groups along.
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def greedy(llm: Any, prompts: list[list[int]], max_tokens: int = 12) -> list[list[int]]:
    """Greedy continuations of token prompts, all in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


def sample(llm: Any, prompt: list[int]) -> list[list[int]]:
    """Four samples of one prompt, with a fixed seed."""
    from vllm import SamplingParams

    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    return [list(one.token_ids) for one in output.outputs]


def token_logprobs(llm: Any, prompt: list[int]) -> list[dict[int, float]]:
    """The best tokens and their logprobs at every position of a prompt and four more."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2)
    output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return [{token: entry.logprob for token, entry in one.items()} for one in positions]


@dataclass(frozen=True)
class Expected:
    """What vLLM's own backend gives, from an engine that is closed by now.

    Engines in one process share vLLM's process groups: two must never live at once.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    samples: list[list[int]]
    logprobs: list[dict[int, float]]


def expected_of(model: Path) -> Expected:
    """Run vLLM's own backend."""
    prompts = random_prompts(PROMPT_LENGTHS)
    with engine(model) as llm:
        return Expected(
            prompts, greedy(llm, prompts), sample(llm, prompts[-2]), token_logprobs(llm, prompts[5])
        )


LONG_LENGTHS = [200, 255, 256, 257, 700, 1500]
"""Prompts beyond the token budget of `fast`."""

LONG_OPTIONS: dict[str, dict[str, Any]] = {
    "channels": {"index": "channels", "profile": {"dense_layers": [0]}},
    "onebit": {
        "index": "onebit",
        "bits": 1,
        "query_reduce": "mean",
        "profile": {"dense_layers": [0, 1]},
    },
}


@dataclass(frozen=True)
class LongCase:
    """Options, long prompts, and their tokens with the joint placement."""

    options: dict[str, Any]
    prompts: list[list[int]]
    tokens: list[list[int]]


def long_case(model: Path, name: str) -> LongCase:
    """Run tailorkv once with the options of that name."""
    prompts = random_prompts(LONG_LENGTHS, seed=1)
    with engine(model, LONG_OPTIONS[name]) as llm:
        return LongCase(LONG_OPTIONS[name], prompts, greedy(llm, prompts, 80))


def attention_layers(llm: Any) -> dict[str, Any]:
    """The attention layers of an engine in this process, by name."""
    from vllm.model_executor.layers.attention import Attention

    found: dict[str, Any] = {}

    def collect(worker: Any) -> None:
        context = worker.model_runner.compilation_config.static_forward_context
        found.update({name: one for name, one in context.items() if isinstance(one, Attention)})

    llm.collective_rpc(collect)
    return found
