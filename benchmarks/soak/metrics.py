"""What a server says of itself over HTTP."""

import re
import time

import httpx

from soak.checks import Idle

PREEMPTIONS = "vllm:num_preemptions_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
_TIMEOUT_SECONDS = 10.0
_POLL_SECONDS = 0.2


class Metrics:
    """The numbers at `/metrics`, each summed over its labels.

    Raises:
        httpx.HTTPError: the server does not answer.
    """

    def __init__(self, url: str) -> None:
        self._text = httpx.get(f"{url}/metrics", timeout=_TIMEOUT_SECONDS).raise_for_status().text

    def __getitem__(self, name: str) -> float:
        pattern = rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$"
        values = re.findall(pattern, self._text, re.MULTILINE)
        if not values:
            raise KeyError(name)
        return sum(map(float, values))


def rest(url: str, seconds: float) -> Idle:
    """What is left of all requests once they are over, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        idle = _idle(url)
        if idle.at_rest or time.monotonic() > deadline:
            return idle
        time.sleep(_POLL_SECONDS)


def _idle(url: str) -> Idle:
    try:
        healthy = httpx.get(f"{url}/health", timeout=_TIMEOUT_SECONDS).is_success
        metrics = Metrics(url)
    except httpx.HTTPError:
        return Idle(False, 0, 0, 0)
    return Idle(
        healthy,
        metrics["vllm:num_requests_running"],
        metrics["vllm:num_requests_waiting"],
        metrics["vllm:kv_cache_usage_perc"],
    )
