"""All figures of a server at one moment, for the screen and for programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm_tailorkv.top.figures import (
    PLAN,
    RUNNING,
    Guard,
    Latencies,
    Traffic,
    guard,
    latencies,
    traffic,
)
from vllm_tailorkv.top.history import History
from vllm_tailorkv.top.scrape import Scrape


@dataclass(frozen=True)
class Report:
    """What there is to say.

    Args:
        model: its name, as the server has it.
        plan: the labels of the plan.
        traffic: since the scrape before.
        recent, guard: of the last minute.
        ever: since the start of the server.
    """

    model: str
    plan: Mapping[str, str]
    traffic: Traffic
    recent: Latencies
    ever: Latencies
    guard: Guard | None

    def as_json(self) -> dict[str, Any]:
        """Of JSON's types alone."""
        return asdict(self)


def make_report(history: History) -> Report:
    """From scrapes that are comparable."""
    now = history.newest
    return Report(
        model=now.labels(RUNNING).get("model_name", ""),
        plan=dict(now.labels(PLAN)),
        traffic=traffic(history.previous, now),
        recent=latencies(history.oldest, now),
        ever=latencies(Scrape(0.0), now),
        guard=guard(history.oldest, now),
    )
