"""Decode steps of the tailored ops equal vLLM's own, whatever the scheduler does with them."""

from pathlib import Path
from typing import Any

import pytest
import speculation
from decoding import Decoded, assert_same, read
from engines import engine, greedy
from features import LORA, PROMPTS, STEPS, Arrival, adapted, drive, metric, plain
from tailored import DENSE_EXACT, SPARSE_ALL, decode_steps, own_layers, tailored_ops

SCARCE = {"num_gpu_blocks_override": 11, "max_model_len": 1024, "disable_log_stats": False}
"""Room for the longest request and little more."""


@pytest.fixture(params=[DENSE_EXACT, SPARSE_ALL], ids=["dense_exact", "sparse_all"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def test_chunked_prefill(
    options: dict[str, Any], random_llama: Path, answers: dict[str, Decoded]
) -> None:
    """Chunks of a prompt share steps with others' decode rows, and cross groups and blocks."""
    arguments = {"max_num_batched_tokens": 75, "max_num_seqs": 8}
    with tailored_ops() as rows, engine(random_llama, options, **arguments) as llm:
        assert_same(plain(llm), answers["plain"])
        assert rows.total == decode_steps(PROMPTS, STEPS) * own_layers(llm)


@pytest.mark.parametrize("caching", [False, True])
def test_preemption(
    options: dict[str, Any], caching: bool, random_llama: Path, answers: dict[str, Decoded]
) -> None:
    arguments = SCARCE | {"enable_prefix_caching": caching}
    with tailored_ops() as rows, engine(random_llama, options, **arguments) as llm:
        assert_same(plain(llm), answers["plain"])
        assert metric(llm, "num_preemptions") > 0
        # A resumed request reads what it has said like a prompt.
        assert 0 < rows.total <= decode_steps(PROMPTS, STEPS) * own_layers(llm)


def test_priorities(
    options: dict[str, Any], random_llama: Path, answers: dict[str, Decoded]
) -> None:
    """One that came later and matters more takes the blocks of others, which resume after it."""
    arrivals = [Arrival(prompt, 0, priority=9) for prompt in PROMPTS[1:4]]
    arrivals.append(Arrival(PROMPTS[0], 2, priority=1))
    arguments = SCARCE | {"scheduling_policy": "priority"}
    with tailored_ops() as rows, engine(random_llama, options, **arguments) as llm:
        outputs = drive(llm, arrivals)
        assert metric(llm, "num_preemptions") > 0
        assert rows.total > 0
    assert list(outputs).index(3) < len(arrivals) - 1
    expected = answers["plain"]
    said = read([outputs[i] for i in (3, 0, 1, 2)])
    assert_same(said, Decoded(expected.tokens[:4], expected.logprobs[:4]))


def test_adapters(
    options: dict[str, Any], adapter: Path, random_llama: Path, answers: dict[str, Decoded]
) -> None:
    with tailored_ops() as rows, engine(random_llama, options, **LORA) as llm:
        said = adapted(llm, adapter)
        assert rows.total == said.steps * own_layers(llm)
    # In such a batch vLLM itself, on a CPU, changes what requests without an adapter say.
    assert_same(said, answers["adapted"])
    assert said.tokens[0] != answers["plain"].tokens[0]


def test_speculation(random_llama: Path) -> None:
    """Drafted rows are vLLM's and others ours, in layers of both kinds."""
    case = speculation.CASES["sometimes"]
    with engine(random_llama) as llm:
        expected = greedy(llm, case.prompts, speculation.STEPS)
    result = speculation.run(random_llama, "sometimes")
    assert result.tokens == expected
    assert result.drafted > 0
    assert result.tailored > 0
