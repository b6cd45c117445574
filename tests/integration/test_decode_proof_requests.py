"""Decode steps of the tailored ops equal vLLM's own, whatever a request asks for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from decoding import FORCIBLE, Decoded, assert_same, generate, greedy_params, read
from engines import engine
from features import FEATURES, PROMPTS, STEPS, Arrival, drive
from tailored import DENSE_EXACT, SPARSE_ALL, decode_steps, own_layers, tailored_ops


@pytest.fixture(scope="module", params=[DENSE_EXACT, SPARSE_ALL], ids=["dense_exact", "sparse_all"])
def tailored(
    request: pytest.FixtureRequest, random_llama: Path, answers: dict[str, Decoded]
) -> Iterator[Any]:
    with engine(random_llama, request.param, **FORCIBLE) as llm:
        yield llm


@pytest.mark.parametrize("name", FEATURES)
def test_feature(tailored: Any, answers: dict[str, Decoded], name: str) -> None:
    with tailored_ops() as rows:
        mine = FEATURES[name](tailored)
    assert_same(mine, answers[name])
    # Not equal: `processed` runs plain requests too, and a request that stops may be a step ahead.
    assert rows.total >= mine.steps * own_layers(tailored)


def test_the_expected_tokens_vary(answers: dict[str, Decoded]) -> None:
    for name in ("plain", "samples", "adapted"):
        assert len({tuple(tokens) for tokens in answers[name].tokens}) >= 5
        assert len({token for tokens in answers[name].tokens for token in tokens}) > 40


def test_prefix_cache_hits(tailored: Any, answers: dict[str, Decoded]) -> None:
    tailored.reset_prefix_cache()
    expected = answers["plain"]
    with tailored_ops():
        assert_same(FEATURES["plain"](tailored), expected)
    longer = [[*one, *said[:9]] for one, said in zip(PROMPTS, expected.tokens, strict=True)]
    with tailored_ops() as rows:
        outputs = generate(tailored, longer, greedy_params(STEPS - 9))
    # All but the block in progress; blocks that decode steps completed are among them.
    assert [output.num_cached_tokens for output in outputs] == [
        (len(prompt) - 1) // 128 * 128 for prompt in longer
    ]
    rest = [tokens[9:] for tokens in expected.tokens], [row[9:] for row in expected.logprobs]
    assert_same(read(outputs), Decoded(*rest))
    assert rows.total == decode_steps(longer, STEPS - 9) * own_layers(tailored)


@pytest.mark.parametrize("exact_below", [0, 300])
def test_rows_of_all_lengths_in_one_batch(
    tailored: Any, answers: dict[str, Decoded], exact_below: int
) -> None:
    """Requests come while others decode: prompts and rows of both ops share steps."""
    tailored.reset_prefix_cache()
    arrivals = [Arrival(prompt, 3 * i) for i, prompt in enumerate(reversed(PROMPTS))]
    with tailored_ops(exact_below) as rows:
        outputs = drive(tailored, arrivals)
    assert_same(read([outputs[i] for i in reversed(range(len(PROMPTS)))]), answers["plain"])
    steps = decode_steps(PROMPTS, STEPS, exact_below)
    assert rows.total == steps * own_layers(tailored)
    assert steps == (5 if exact_below == 0 else 3) * (STEPS - 1)


def test_aborts(tailored: Any, answers: dict[str, Decoded]) -> None:
    """Requests that leave in mid-stream take nothing along and leave nothing behind."""
    tailored.reset_prefix_cache()
    stay = [Arrival(prompt, 0) for prompt in PROMPTS]
    leave = [Arrival(prompt[7:], i, leaves=6 + i) for i, prompt in enumerate(PROMPTS)]
    with tailored_ops() as rows:
        outputs = drive(tailored, [*stay, *leave, Arrival(PROMPTS[0], 2, leaves=2)])
    assert_same(read([outputs[i] for i in range(len(stay))]), answers["plain"])
    assert rows.total > answers["plain"].steps * own_layers(tailored)
    scheduler = tailored.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.kv_cache_manager.usage == 0
