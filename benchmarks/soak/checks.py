"""What a phase must have left behind. Every judgement is a list of problems, empty if all is well.

Answers: a batch's composition and a prompt's chunks change the last bits of what a float32 model
computes on CPUs. So a token may differ from the reference's only at a near tie, where the
reference's two best logprobs are closer than a tolerance, and ends the comparison; logprobs of
equal tokens agree within it. `ROUNDING` is a hundred times what was measured. Where the index
leaves tokens out, the last bits decide which are nearly left out, and logprobs were seen to differ
by up to 0.017: there `NEARLY_CHOSEN` is the tolerance.

A request that was preempted reads its own answer again as a prompt, exactly, where tailored decode
had written it before; beyond the token budget its later tokens may then differ by any amount. So as
many tailored answers may differ as there were preemptions, and no other.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from soak.client import HUNG, Reply

ROUNDING = 1e-3
NEARLY_CHOSEN = 0.1
GROWTH_BYTES = 32 << 20
"""A leak of 0.1 MiB a request passes it within a round; a warm server grows by 5 MiB at most."""


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
class Limits:
    """Up to how many tokens of context answers depend on what.

    Args:
        exact_below: attended in full.
        ranked_below: the index leaves none out: exact scores choose among all tokens.
    """

    exact_below: int
    ranked_below: int

    def is_tailored(self, prompt: int, place: int) -> bool:
        """Whether the token at this place of an answer comes of tailored decode."""
        # The first token comes of the prompt, which is always read exactly.
        return place > 0 and prompt + place > self.exact_below

    def tolerance(self, prompt: int, place: int) -> float:
        """Of logprobs at this place."""
        return NEARLY_CHOSEN if place > 0 and prompt + place > self.ranked_below else ROUNDING


@dataclass(frozen=True)
class Comparison:
    """Answers against their references.

    Args:
        compared: answers that have a reference and at least one token.
        equal: of them, without a mistake.
        whole: of the equal ones, to their last token.
        tokens: compared.
        tailored: compared answers with tokens beyond the token budget.
        drift: largest difference between logprobs of equal tokens where the index leaves none out.
        tailored_drift: the same where it does.
        wrong_exact, wrong_tailored: references of which a mistake is within and beyond the budget.
    """

    compared: int
    equal: int
    whole: int
    tokens: int
    tailored: int
    drift: float
    tailored_drift: float
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
    references: Mapping[str, Reply], replies: Sequence[Reply], limits: Limits
) -> Comparison:
    """Compare what came of answers, cut short or not."""
    compared = equal = whole = tokens = tailored = 0
    drifts = {ROUNDING: 0.0, NEARLY_CHOSEN: 0.0}
    wrong: dict[bool, list[str]] = {False: [], True: []}
    for reply in replies:
        if reply.prompt.name is None or not reply.tokens:
            continue
        reference = references[reply.prompt.name]
        prompt = len(reply.prompt.tokens)
        same, is_mistake = _follow(reference, reply, limits, drifts)
        compared += 1
        tokens += same
        tailored += limits.is_tailored(prompt, min(same, len(reply.tokens) - 1))
        if is_mistake:
            wrong[limits.is_tailored(prompt, same)].append(reply.prompt.name)
        else:
            equal += 1
            whole += same == len(reply.tokens)
    return Comparison(
        compared, equal, whole, tokens, tailored, *drifts.values(), wrong[False], wrong[True]
    )


def _follow(
    reference: Reply, reply: Reply, limits: Limits, drifts: dict[float, float]
) -> tuple[int, bool]:
    """How many tokens agree, and whether the next one is a mistake; keeps the largest drifts."""
    for place, token in enumerate(reply.tokens):
        tolerance = limits.tolerance(len(reply.prompt.tokens), place)
        if token != reference.tokens[place]:
            return place, reference.gaps[place] >= tolerance
        drift = abs(reply.logprobs[place] - reference.logprobs[place])
        if drift > tolerance:
            return place, True
        drifts[tolerance] = max(drifts[tolerance], drift)
    return len(reply.tokens), False
