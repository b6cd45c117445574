"""Requests that use what vLLM offers beyond plain greedy decoding, each the same for any engine."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decoding import FORCIBLE, Decoded, generate, greedy_params, read
from engines import engine, random_prompts

# Each starts a block within the steps below.
LENGTHS = [120, 250, 380, 500, 890]
STEPS = 16
PROMPTS = random_prompts(LENGTHS, seed=11)


def plain(llm: Any) -> Decoded:
    return read(generate(llm, PROMPTS, greedy_params(STEPS)))


def samples(llm: Any) -> Decoded:
    """Several samples of each prompt, a seed for each."""
    params = [greedy_params(STEPS, temperature=1.0, n=3, seed=5 + i) for i in range(2)]
    return read(generate(llm, PROMPTS[2:4], params))


def prompt_logprobs(llm: Any) -> Decoded:
    return read(generate(llm, PROMPTS, greedy_params(STEPS, prompt_logprobs=0)))


def structured(llm: Any) -> Decoded:
    """A choice, a regular expression and JSON, in one batch."""
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    forms = [{"choice": ["a needle", "some hay"]}, {"regex": "[a-f]{6}[0-9]{6}"}, {"json": schema}]
    params = [
        greedy_params(STEPS, ignore_eos=False, structured_outputs=StructuredOutputsParams(**form))
        for form in forms
    ]
    found = read(generate(llm, PROMPTS[1:4], params))
    tokenizer = llm.get_tokenizer()
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found.tokens]
    assert texts[0] in forms[0]["choice"]
    assert re.fullmatch(forms[1]["regex"], texts[1])
    assert re.match(r'\s*{\s*"a"\s*:', texts[2])
    return found


def processed(llm: Any) -> Decoded:
    """Logits biased, forbidden, penalized, and forced by a processor of our own, in one batch."""
    said = read(generate(llm, PROMPTS, greedy_params(STEPS))).tokens
    words = [llm.get_tokenizer().decode([token]) for token in said[1]]
    changes = [
        {"logit_bias": {7: 4.0, 9: -50.0}},
        {"bad_words": [word for word in words if word.isascii() and word.isalnum()]},
        {"stop_token_ids": said[2][2:4], "min_tokens": 8},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"extra_args": {"forced": [40, 41, 42, 43]}},
    ]
    params = [greedy_params(STEPS, **change) for change in changes]
    found = read(generate(llm, PROMPTS, params))
    assert all(mine != usually for mine, usually in zip(found.tokens, said, strict=True))
    return found


FEATURES: dict[str, Callable[[Any], Decoded]] = {
    "plain": plain,
    "samples": samples,
    "prompt_logprobs": prompt_logprobs,
    "structured": structured,
    "processed": processed,
}


def save_random_adapter(directory: Path, layers: int = 4) -> Path:
    """A LoRA adapter of the random Llama's attention, as peft saves one."""
    from safetensors.torch import save_file

    rank, hidden = 4, 256
    outputs = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, width in outputs.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, size in (("lora_A", (rank, hidden)), ("lora_B", (width, rank))):
                tensors[f"{place}.{part}.weight"] = torch.randn(size, generator=generator) * 0.08
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8 * rank,
        "target_modules": list(outputs),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


LORA = {"enable_lora": True, "max_lora_rank": 8}
"""Arguments of engines that take the adapter."""


def adapted(llm: Any, adapter: Path) -> Decoded:
    """Requests with and without an adapter, in one batch."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("random", 1, str(adapter))
    requests = [request, None, request, None, request]
    return read(generate(llm, PROMPTS, greedy_params(STEPS), lora_request=requests))


@dataclass(frozen=True)
class Arrival:
    """A request that comes in mid-stream.

    Args:
        step: the engine's step before which it comes.
        priority: less is sooner.
        leaves: the step before which it is aborted.
    """

    prompt: list[int]
    step: int
    priority: int = 0
    leaves: int | None = None


def drive(llm: Any, arrivals: list[Arrival]) -> dict[int, Any]:
    """Step an engine until all is said: finished outputs by arrival, in the order of finishing."""
    stepper, finished, step = llm.llm_engine, {}, 0
    last = max(arrival.step for arrival in arrivals)
    while step <= last or stepper.has_unfinished_requests():
        for i, arrival in enumerate(arrivals):
            if arrival.step == step:
                inputs = {"prompt_token_ids": arrival.prompt}
                params = greedy_params(STEPS)
                stepper.add_request(str(i), inputs, params, priority=arrival.priority)
            if arrival.leaves == step:
                stepper.abort_request([str(i)])
        for output in stepper.step():
            if output.finished:
                finished[int(output.request_id)] = output
        step += 1
    return finished


def metric(llm: Any, name: str) -> float:
    """A counter of an engine with statistics."""
    return {one.name: one for one in llm.get_metrics()}[f"vllm:{name}"].value


def answers_of(model: Path, adapter: Path) -> dict[str, Decoded]:
    """What vLLM's own backend says, by feature; its engines are closed by now."""
    with engine(model, **FORCIBLE) as llm:
        answers = {name: feature(llm) for name, feature in FEATURES.items()}
    # Another engine: with adapters, vLLM fails at log-probabilities of prompts on a CPU.
    with engine(model, **LORA) as llm:
        return answers | {"adapted": adapted(llm, adapter)}
