"""The Grafana dashboard shows what there is."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from vllm_tailorkv.attention.metrics import METRICS
from vllm_tailorkv.attention.report import METRIC
from vllm_tailorkv.top import figures
from vllm_tailorkv.top.scrape import Scrape

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples/grafana.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
SELECTOR = re.compile(r"\b(tailorkv_\w+|vllm:\w+)(?:\{([^}]*)\})?")
LABELS = {METRIC: set(), **{metric.shown: set(metric.labels) for metric in METRICS}}
LABELS |= {f"{metric.name}_bucket": set(metric.labels) for metric in METRICS if metric.buckets}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metrics_and_labels_exist(expression: str, after: Scrape) -> None:
    used = SELECTOR.findall(expression)
    assert used
    for name, labels in used:
        given = set(re.findall(r'(\w+)=~?"', labels)) - {"instance"}
        if name.startswith("vllm:"):
            assert name in after.samples or name in figures.OF_DRAFTS
            assert not given
        else:
            assert given <= LABELS[name]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_brackets_close(expression: str) -> None:
    for left, right in ("()", "{}", "[]"):
        assert expression.count(left) == expression.count(right)


def test_it_shows_what_top_shows() -> None:
    shown = {name for expression in EXPRESSIONS for name, _ in SELECTOR.findall(expression)}
    named = {name: value for name, value in vars(figures).items() if name.isupper()}
    wanted = {value for value in named.values() if isinstance(value, str)}
    # Tokens of a block, to tell room in tokens.
    wanted.remove(figures.CACHE_CONFIG)
    assert {name for name in wanted if not {name, f"{name}_bucket"} & shown} == set()


def test_panels_lie_side_by_side() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for place in places:
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        apart = [
            one[axis] + one[size] <= other[axis] or other[axis] + other[size] <= one[axis]
            for axis, size in (("x", "w"), ("y", "h"))
        ]
        assert any(apart)
