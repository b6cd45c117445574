"""Decoded tokens with their log-probabilities, for comparisons of engines."""

from dataclasses import dataclass
from typing import Any

import torch
from engines import VOCABULARY
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

TOLERANCE = 1e-3
"""How far a log-probability may be off where nothing is approximate; up to 2e-4 was measured."""


class Forced(LogitsProcessor):
    """Makes a request say the tokens of its extra argument `forced`; logprobs stay the model's."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def added(params: Any, prompt: Any, output: list[int]) -> Any:
            forced = (params.extra_args or {}).get("forced")
            return None if forced is None else (forced, output)

        process_dict_updates(self.requests, batch_update, added)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (forced, output) in self.requests.items():
            if len(output) < len(forced):
                logits[row] = -torch.inf
                logits[row, forced[len(output)]] = 0
        return logits


FORCIBLE: dict[str, Any] = {"max_logprobs": -1, "logits_processors": [Forced]}
"""Arguments of engines that `decode` is used with."""


@dataclass(frozen=True)
class Decoded:
    """What requests said, and with each token the log-probabilities that were asked for.

    logprobs: float64 [tokens, n] of each request, tokens of the prompt first if asked for.
    """

    tokens: list[list[int]]
    logprobs: list[torch.Tensor]

    @property
    def steps(self) -> int:
        """Decode steps: a request's first token is its prompt's."""
        return sum(len(tokens) - 1 for tokens in self.tokens)

    def error(self, other: "Decoded") -> float:
        """The largest difference of a log-probability."""
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)

    def divergence(self, other: "Decoded") -> float:
        """The mean over decode steps of KL(self || other), if all log-probabilities are there."""
        mine, theirs = (torch.cat([row[1:] for row in one.logprobs]) for one in (self, other))
        return float((mine.exp() * (mine - theirs)).sum(1).mean())


def assert_same(mine: Decoded, theirs: Decoded) -> None:
    """Equal tokens, and log-probabilities within the tolerance."""
    assert mine.tokens == theirs.tokens
    assert mine.error(theirs) < TOLERANCE


def _row(entries: Any, token: int) -> list[float]:
    """All log-probabilities of a position where there are all, else that of its token."""
    wanted = range(VOCABULARY) if len(entries) == VOCABULARY else [token]
    return [entries[one].logprob for one in wanted]


def read(outputs: list[Any]) -> Decoded:
    """What vLLM's outputs hold."""
    tokens, logprobs = [], []
    for output in outputs:
        for said in output.outputs:
            pairs = list(zip(said.logprobs, said.token_ids, strict=True))
            if output.prompt_logprobs is not None:
                pairs = [
                    *zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True),
                    *pairs,
                ]
            tokens.append(list(said.token_ids))
            logprobs.append(torch.tensor([_row(*pair) for pair in pairs], dtype=torch.float64))
    return Decoded(tokens, logprobs)


def generate(llm: Any, prompts: list[list[int]], params: Any, **arguments: Any) -> list[Any]:
    """vLLM's outputs for token prompts, all in one batch."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False, **arguments)


def greedy_params(max_tokens: int, **changes: Any) -> Any:
    """Greedy parameters, with the log-probability of each token said."""
    from vllm import SamplingParams

    values = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0}
    return SamplingParams(**(values | changes))


def decode(
    llm: Any, prompts: list[list[int]], max_tokens: int, forced: list[list[int]] | None = None
) -> Decoded:
    """Decode greedily, all prompts in one batch, with the log-probabilities of every token.

    Args:
        forced: what is said instead of the most probable tokens.
    """
    extra = [{}] * len(prompts) if forced is None else [{"forced": one} for one in forced]
    params = [greedy_params(max_tokens, logprobs=-1, extra_args=one) for one in extra]
    return read(generate(llm, prompts, params))
