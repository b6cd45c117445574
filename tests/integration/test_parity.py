"""Up to the token budget, tokens equal those of vLLM's own backend, in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Expected, engine, greedy, sample, token_logprobs


@pytest.fixture(scope="module")
def tailored(random_llama: Path, expected: Expected) -> Iterator[Any]:
    with engine(random_llama, {}, max_num_seqs=16) as llm:
        yield llm


def test_the_expected_tokens_vary(expected: Expected) -> None:
    assert len({token for tokens in expected.tokens for token in tokens}) > 20


def test_one_batch_of_ragged_prompts(tailored: Any, expected: Expected) -> None:
    assert greedy(tailored, expected.prompts) == expected.tokens


def test_prefix_cache_hits(tailored: Any, expected: Expected) -> None:
    assert greedy(tailored, expected.prompts) == expected.tokens
    pairs = zip(expected.prompts, expected.tokens, strict=True)
    longer = [[*prompt, *tokens[:6]] for prompt, tokens in pairs]
    assert greedy(tailored, longer, 6) == [tokens[6:] for tokens in expected.tokens]


def test_one_at_a_time(tailored: Any, expected: Expected) -> None:
    tailored.reset_prefix_cache()
    assert [greedy(tailored, [prompt])[0] for prompt in expected.prompts] == expected.tokens


def test_several_samples_of_one_prompt(tailored: Any, expected: Expected) -> None:
    samples = sample(tailored, expected.prompts[-2])
    assert samples == expected.samples
    assert len({tuple(tokens) for tokens in samples}) > 1


def test_logprobs(tailored: Any, expected: Expected) -> None:
    ours = token_logprobs(tailored, expected.prompts[5])
    for mine, theirs in zip(ours, expected.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
