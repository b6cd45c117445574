"""What a server of ours said, twice within seven seconds, while it answered three requests.

SmolLM2-135M with `guard_share` 0.05 on two cores; only families that `top` or a dashboard may want.
"""

from pathlib import Path

import pytest

from vllm_tailorkv.top.history import History
from vllm_tailorkv.top.scrape import Scrape, parse

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> Scrape:
    """A scrape, whose first line tells when it was made."""
    text = (RECORDED / f"{name}.txt").read_text()
    return parse(text, float(text.split()[2]))


@pytest.fixture
def before() -> Scrape:
    return recorded("before")


@pytest.fixture
def after() -> Scrape:
    return recorded("after")


@pytest.fixture
def history(before: Scrape, after: Scrape) -> History:
    kept = History()
    kept.add(before)
    kept.add(after)
    return kept
