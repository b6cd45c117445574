"""The soak's judgements: each finds what it is there to find, and nothing else."""

import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
from soak.checks import (
    GROWTH_BYTES,
    NEARLY_CHOSEN,
    ROUNDING,
    Idle,
    Limits,
    compare,
    judge_answers,
    judge_growth,
    judge_idle,
    judge_memory,
    judge_outcomes,
)
from soak.client import FAILED, FINISHED, HUNG, LEFT, REFUSED, Prompt, Reply
from soak.processes import is_port_free, survivors

AT_REST = Idle(healthy=True, running=0, waiting=0, kv_usage=0)
LIMITS = Limits(exact_below=10, ranked_below=12)


def reply(
    tokens: list[int],
    name: str = "known",
    prompt: int = 4,
    gaps: dict[int, float] | None = None,
    drifts: dict[int, float] | None = None,
) -> Reply:
    gaps, drifts = gaps or {}, drifts or {}
    return Reply(
        Prompt(tuple(range(prompt)), len(tokens), name),
        FINISHED,
        tokens,
        [-1.0 + drifts.get(i, 0.0) for i in range(len(tokens))],
        [gaps.get(i, 1.0) for i in range(len(tokens))],
    )


def judged(reference: Reply, answer: Reply, preemptions: int = 0) -> list[str]:
    return judge_answers(compare({"known": reference}, [answer], LIMITS), preemptions)


def test_equal_answers_are_well() -> None:
    reference = reply([5, 6, 7])
    comparison = compare({"known": reference}, [reply([5, 6, 7])], LIMITS)
    assert (comparison.compared, comparison.equal, comparison.whole) == (1, 1, 1)
    assert (comparison.tokens, comparison.tailored, comparison.drift) == (3, 0, 0)
    assert judge_answers(comparison, 0) == []


def test_a_wrong_token_is_found() -> None:
    assert "1 answers of 1 differ" in judged(reply([5, 6, 7]), reply([5, 6, 8]))[0]
    # Within the budget, preemption is no excuse.
    assert judged(reply([5, 6, 7]), reply([5, 6, 8]), preemptions=9)


def test_an_answer_that_was_cut_short_is_compared() -> None:
    assert judged(reply([5, 6, 7]), reply([5, 6])) == []
    assert judged(reply([5, 6, 7]), reply([5, 8]))


def test_a_token_may_differ_at_a_near_tie_only() -> None:
    answer = reply([5, 8, 9])
    assert judged(reply([5, 6, 7], gaps={1: ROUNDING / 2}), answer) == []
    assert judged(reply([5, 6, 7], gaps={0: 0, 1: ROUNDING * 2, 2: 0}), answer)
    comparison = compare({"known": reply([5, 6, 7], gaps={1: 0})}, [answer], LIMITS)
    assert (comparison.equal, comparison.whole, comparison.tokens) == (1, 0, 1)


def test_a_near_tie_that_did_not_part_them_ends_nothing() -> None:
    assert judged(reply([5, 6, 7], gaps={1: 0}), reply([5, 6, 8]))


def test_a_logprob_that_drifts_is_found() -> None:
    reference = reply([5, 6, 7])
    assert judged(reference, reply([5, 6, 7], drifts={2: ROUNDING / 2})) == []
    assert judged(reference, reply([5, 6, 7], drifts={2: ROUNDING * 2}))


def test_more_is_allowed_where_the_index_leaves_tokens_out() -> None:
    # The fourth token is the first whose context is longer than twelve.
    reference = reply([5, 6, 7, 8], prompt=10)
    for place, tolerance in ((2, ROUNDING), (3, NEARLY_CHOSEN)):
        small, large = {place: tolerance / 2}, {place: tolerance * 2}
        assert judged(reference, reply([5, 6, 7, 8], prompt=10, drifts=small)) == []
        assert judged(reference, reply([5, 6, 7, 8], prompt=10, drifts=large))
        other = [9 if i == place else token for i, token in enumerate(reference.tokens)]
        assert judged(reply([5, 6, 7, 8], prompt=10, gaps=small), reply(other, prompt=10)) == []
        assert judged(reply([5, 6, 7, 8], prompt=10, gaps=large), reply(other, prompt=10))


def test_beyond_the_budget_preemptions_excuse_as_many_answers() -> None:
    # The sixth token is the first whose context is longer than ten.
    reference = reply([1, 2, 3, 4, 5, 6, 7, 8], prompt=5)
    exact = reply([1, 2, 3, 4, 5, 9, 7, 8], prompt=5)
    tailored = reply([1, 2, 3, 4, 5, 6, 9, 8], prompt=5)
    assert judged(reference, tailored, preemptions=0)
    assert judged(reference, tailored, preemptions=1) == []
    assert judged(reference, exact, preemptions=1)
    two = compare({"known": reference}, [tailored, tailored], LIMITS)
    assert two.tailored == 2
    assert judge_answers(two, 1)


def test_the_first_token_is_exact_however_long_the_prompt() -> None:
    assert judged(reply([1, 2], prompt=50), reply([9, 2], prompt=50), preemptions=5)
    assert judged(reply([1, 2], prompt=50), reply([1, 9], prompt=50), preemptions=5) == []


def test_nothing_to_compare_is_a_problem() -> None:
    unknown = replace(reply([1]), prompt=Prompt((1,), 1))
    assert judge_answers(compare({}, [unknown], LIMITS), 0) == ["no answer was compared"]


def test_a_hang_is_found_whatever_is_allowed() -> None:
    hung = Reply(Prompt((1,), 1), HUNG, seconds=120)
    assert judge_outcomes([hung], [FINISHED, LEFT, REFUSED, FAILED, HUNG]) == [
        "1 requests hung for 120 s"
    ]


def test_an_outcome_that_is_not_allowed_is_found() -> None:
    failed = Reply(Prompt((1,), 1), FAILED, detail="500 of all things")
    assert judge_outcomes([failed], [FINISHED]) == ["1 requests failed: 500 of all things"]
    assert judge_outcomes([failed], [FAILED]) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"healthy": False}, "/health is not OK"),
        ({"running": 1}, "1 requests run and 0 wait at rest"),
        ({"waiting": 2}, "0 requests run and 2 wait at rest"),
        ({"kv_usage": 0.01}, "KV cache usage is 0.01 at rest"),
    ],
)
def test_what_is_left_of_requests_is_found(change: dict[str, float], problem: str) -> None:
    assert judge_idle(AT_REST) == []
    assert judge_idle(replace(AT_REST, **change)) == [problem]


def test_a_leak_is_found() -> None:
    assert judge_memory(1 << 30, (1 << 30) + GROWTH_BYTES) == []
    assert judge_memory(1 << 30, 0) == []
    assert judge_memory(1 << 30, (1 << 30) + GROWTH_BYTES + 1) == [
        "memory grew by 32 MiB since the server was warm"
    ]


def test_a_counter_that_stands_still_is_found() -> None:
    assert judge_growth("preemptions", 3, 4) == []
    assert judge_growth("preemptions", 3, 3) == ["preemptions stayed at 3"]


def test_an_orphan_is_found() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as child:
        process = psutil.Process(child.pid)
        assert survivors([process], 0.1) == [process]
        child.kill()
        # Nobody has reaped it yet.
        assert survivors([process], 10) == []


def test_a_port_in_use_is_found() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not is_port_free(port)
    assert is_port_free(port)
