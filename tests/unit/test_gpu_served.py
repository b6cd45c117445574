"""When two engines agree; see `benchmarks/gpu/served.py`."""

from typing import Any

from gpu.served import compare, options_of, workload

from vllm_tailorkv.config import TailorKVConfig


def said(*tokens: int, second: float = -3.0, best: float = -0.1) -> dict[str, Any]:
    """One request that was answered with these tokens, token 9 the next likely one each time."""
    at = [{str(token): best, "9": second} for token in tokens]
    return {"alone": [{"tokens": list(tokens), "logprobs": at}]}


def test_the_same():
    summary, failures = compare(said(1, 2, 3), said(1, 2, 3), 0.1)
    assert failures == []
    assert (summary["compared"], summary["ties"], summary["worst_logprob"]) == (3, 0, 0)


def test_a_tie_ends_the_comparison():
    expected = said(1, 2, 3, second=-0.15)
    answered = said(1, 2, 9, second=-0.15)
    summary, failures = compare(answered, expected, 0.1)
    assert failures == []
    assert (summary["compared"], summary["ties"]) == (2, 1)


def test_another_token():
    _, failures = compare(said(1, 2, 9, second=-3.0), said(1, 2, 3), 0.1)
    assert any("9 instead of 3" in failure for failure in failures)


def test_another_probability():
    _, failures = compare(said(1, 2, best=-0.4), said(1, 2), 0.1)
    assert failures == ["log-probabilities differ by up to 0.3"]


def test_too_little_to_compare():
    expected, answered = said(1, 2, 3, second=-0.15), said(9, 2, 3, second=-0.15)
    _, failures = compare(answered, expected, 0.1)
    assert failures == ["only 0 of 3 tokens could be compared"]


def test_contexts_are_shorter_than_what_options_are_for():
    for tiny, block, beyond in ((True, 64, 128), (False, 128, 1024)):
        for batch in workload(block, tiny).values():
            assert max(map(len, batch["prompts"])) + batch["tokens"] < beyond
        config = TailorKVConfig(**options_of("exact", beyond))
        assert config.exact_below >= beyond
