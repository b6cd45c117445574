"""The model drafts for itself: what it says is what full attention says, whatever the drafts."""

from pathlib import Path
from typing import Any

import pytest
import speculation
from engines import engine, greedy

from vllm_tailorkv.attention.carried import DRAFTER
from vllm_tailorkv.errors import TailorKVError

STEPS = speculation.STEPS


@pytest.fixture(scope="module")
def expected(random_llama: Path) -> dict[str, list[list[int]]]:
    """Full attention, by vLLM's own backend."""
    with engine(random_llama) as llm:
        return {
            name: greedy(llm, speculation.CASES[name].prompts, STEPS) for name in ("right", "wrong")
        }


def test_drafts_that_are_right(random_llama: Path, expected: dict[str, list[list[int]]]) -> None:
    """All tokens are selected, so every draft is accepted that is followed by a token."""
    result = speculation.run(random_llama, "right", DRAFTER)
    assert result.tokens == expected["right"]
    # Rounds of three drafts and a token; fewer drafts where a block or the answer ends.
    rounds = -(-STEPS // 4)
    assert result.accepted >= len(result.tokens) * (STEPS - 1 - rounds - 2)
    assert result.drafted <= result.accepted + len(result.tokens) * 3
    assert result.tailored > 0


def test_drafts_that_are_wrong(random_llama: Path, expected: dict[str, list[list[int]]]) -> None:
    """K and V, codes and indexes of rejected drafts leave nothing behind; nor do preemptions."""
    result = speculation.run(random_llama, "wrong", DRAFTER)
    assert result.tokens == expected["wrong"]
    assert result.accepted < result.drafted / 2
    assert result.preempted > 0
    assert result.tailored > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA"),
    ],
)
def test_what_it_does_not_draft_with_is_refused(
    arguments: dict[str, Any], message: str, random_llama: Path
) -> None:
    config = {"model": DRAFTER, "num_speculative_tokens": 3}
    refused = pytest.raises(TailorKVError, match=message)
    with refused, engine(random_llama, {}, speculative_config=config, **arguments):
        pass


def test_another_backend_is_refused(random_llama: Path) -> None:
    config = {"model": DRAFTER, "num_speculative_tokens": 3}
    refused = pytest.raises(TailorKVError, match="--attention-backend tailorkv")
    with refused, engine(random_llama, speculative_config=config):
        pass
