"""Engines in this process and tiny random checkpoints, for tests and harnesses."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320
PROMPT_LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 150, 180]
"""Prompts whose continuation by twelve tokens stays within the token budget of `fast`."""


def tiny_config(architecture: str, **changes: Any) -> Any:
    """A configuration of some architecture with two to four tiny layers."""
    import transformers

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    } | changes
    name = "Gemma3Text" if architecture == "Gemma3" else architecture
    return getattr(transformers, f"{name}Config")(**values)


def save_random_checkpoint(
    directory: Path, architecture: str, *, std: dict[str, float] | None = None, **changes: Any
) -> Path:
    """A checkpoint with random weights and a tokenizer of single bytes.

    Args:
        std: standard deviations by the end of a parameter's name, the longest that fits; 0
            leaves it as its model makes it.
        changes: those to `tiny_config`.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    # Wide enough that greedy tokens vary.
    widths = {"": 0.08, "norm.weight": 0.0} | (std or {})
    for name, parameter in model.named_parameters():
        end = max((end for end in widths if name.endswith(end)), key=len)
        if widths[end]:
            torch.nn.init.normal_(parameter, std=widths[end])
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet]
    names += [f"<extra_{i}>" for i in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory)
    return directory


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
