"""What a phase must have left behind. Every judgement is a list of problems, empty if all is well.

Answers: on CPUs the composition of a batch changes the last bits of a float32 model, so answers are
compared with a reference up to its first near tie, a place where the two best tokens are closer
than `NEAR_TIE`; up to there, tokens are the same and their logprobs agree within `DRIFT`. Both are
a hundred times what was measured without preemption. A request that was preempted reads its own
answer again as a prompt, exactly, where tailored decode had written it before; beyond the token
budget its later tokens may then differ. So as many tailored answers may differ as there were
preemptions, and no other.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from soak.client import HUNG, Reply

NEAR_TIE = 1e-3
DRIFT = 1e-3
GROWTH_BYTES = 64 << 20
"""A leak of one page of this model a request passes it within a round; an allocator's does not."""


@dataclass(frozen=True)
class Idle:
    """What a server without requests says of itself."""

    healthy: bool
    running: float
    waiting: float
    kv_usage: float

    @property
    def at_rest(self) -> bool:
        """Healthy, and nothing is left of any request."""
        return self == Idle(True, 0, 0, 0)


@dataclass(frozen=True)
class Comparison:
    """Answers against their references.

    Args:
        compared: answers of which at least one token was compared.
        equal: of them, up to the reference's first near tie.
        whole: of the equal ones, to their last token.
        tokens: compared.
        tailored: compared answers with decode steps beyond the token budget.
        drift: largest difference between the logprobs of tokens before a mistake.
        wrong_exact, wrong_tailored: names of references that answers differ from.
    """

    compared: int
    equal: int
    whole: int
    tokens: int
    tailored: int
    drift: float
    wrong_exact: list[str]
    wrong_tailored: list[str]


def judge_outcomes(replies: Sequence[Reply], allowed: Collection[str]) -> list[str]:
    """Every request ended, as it should."""
    problems = []
    for outcome, count in Counter(reply.outcome for reply in replies).items():
        if outcome == HUNG:
            longest = max(r.seconds for r in replies if r.outcome == HUNG)
            problems.append(f"{count} requests hung for {longest:.0f} s")
        elif outcome not in allowed:
            detail = next(r.detail for r in replies if r.outcome == outcome)
            problems.append(f"{count} requests {outcome}: {detail[:200]}")
    return problems


def judge_idle(idle: Idle) -> list[str]:
    """The server is healthy and holds nothing."""
    problems = [] if idle.healthy else ["/health is not OK"]
    if idle.running or idle.waiting:
        problems.append(f"{idle.running:g} requests run and {idle.waiting:g} wait at rest")
    if idle.kv_usage:
        problems.append(f"KV cache usage is {idle.kv_usage:g} at rest")
    return problems


def judge_memory(before: int, now: int) -> list[str]:
    """Memory has not grown since the server was warm."""
    if now - before <= GROWTH_BYTES:
        return []
    return [f"memory grew by {(now - before) >> 20} MiB since the server was warm"]


def judge_growth(name: str, before: float, now: float) -> list[str]:
    """A counter has counted."""
    return [] if now > before else [f"{name} stayed at {now:g}"]


def judge_answers(comparison: Comparison, preemptions: float) -> list[str]:
    """No answer is wrong, save tailored ones of requests that may have been preempted."""
    problems = []
    wrong = comparison.wrong_exact
    if len(comparison.wrong_tailored) > preemptions:
        wrong = wrong + comparison.wrong_tailored
    if wrong:
        problems.append(
            f"{len(wrong)} answers of {comparison.compared} differ from an undisturbed run, "
            f"with {preemptions:g} preemptions: {', '.join(sorted(set(wrong)))}"
        )
    if comparison.compared == 0:
        problems.append("no answer was compared")
    return problems


def compare(
    references: Mapping[str, Reply], replies: Sequence[Reply], exact_below: int
) -> Comparison:
    """Compare what came of answers, cut short or not.

    Args:
        exact_below: contexts of so many tokens are attended in full.
    """
    equal = whole = tokens = tailored = compared = 0
    drift = 0.0
    wrong: dict[bool, list[str]] = {False: [], True: []}
    for reply in replies:
        if reply.prompt.name is None:
            continue
        reference = references[reply.prompt.name]
        length = min(_comparable(reference), len(reply.tokens))
        if length == 0:
            continue

        def is_tailored(place: int, prompt: int = len(reply.prompt.tokens)) -> bool:
            # The first token comes of the prompt, which is always read exactly.
            return place > 0 and prompt + place > exact_below

        compared += 1
        tokens += length
        tailored += is_tailored(length - 1)
        mistake, drifts = _first_mistake(reference, reply, length)
        drift = max([drift, *drifts])
        if mistake is not None:
            wrong[is_tailored(mistake)].append(reply.prompt.name)
        else:
            equal += 1
            whole += reply.tokens == reference.tokens[: len(reply.tokens)]
    return Comparison(compared, equal, whole, tokens, tailored, drift, wrong[False], wrong[True])


def _comparable(reference: Reply) -> int:
    """Tokens before the first near tie."""
    ties = (place for place, gap in enumerate(reference.gaps) if gap < NEAR_TIE)
    return next(ties, len(reference.tokens))


def _first_mistake(reference: Reply, reply: Reply, length: int) -> tuple[int | None, list[float]]:
    """Where the answer is wrong, and how far logprobs differ before."""
    drifts: list[float] = []
    for place in range(length):
        drift = abs(reply.logprobs[place] - reference.logprobs[place])
        if reply.tokens[place] != reference.tokens[place] or drift > DRIFT:
            return place, drifts
        drifts.append(drift)
    return None, drifts
