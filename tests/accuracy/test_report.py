"""Results in a file: whole, read again, and only by the run that wrote it."""

import json
from pathlib import Path

import pytest
from accuracy.attention_level import LayerQuality
from accuracy.deadline import Piece
from accuracy.evaluate import Cell, Score
from accuracy.methods import parse_method
from accuracy.report import Report, write_json
from accuracy.text_quality import Divergence, Likelihood
from rich.console import Console

METHODS = ["full", "tailorkv"]


def empty(**arguments: str) -> Report:
    told = {"samples": "2", "model": "m"} | arguments
    return Report(told, [parse_method(name, 4) for name in METHODS], 0.7)


@pytest.fixture
def report() -> Report:
    found = empty()
    found.scores = [
        Score("full", "copy", 4096, "written", (0.8, 0.7)),
        Score("tailorkv", "copy", 4096, "written", (0.6, 0.6)),
        Score("full", "single_1", 4096, "written", (0.6, 0.6)),
    ]
    found.likelihoods = [Likelihood(method, 4096, 32, (-1.0,), "code") for method in METHODS]
    found.divergences = [
        Divergence("tailorkv", "code", 4096, 64, 0.02, 0.01, 0.03, 0.95, 32, (0.02,))
    ]
    found.layers = [
        LayerQuality("tailorkv", 1, 0.9, 0.99, 0.02, 0.9, (0.95, 0.85), "code"),
        LayerQuality("tailorkv", 2, 0.8, 0.98, 0.04, 0.8, (0.82, 0.78), "code"),
        LayerQuality("tailorkv", 3, 0.8, 0.98, 0.04, 0.95, (1.0, 0.5), "code"),
    ]
    found.bytes_per_token = {"tailorkv": {"host": 2.0, "derived": 1.0}}
    found.pieces = [Piece("full", "copy", 4096, 3.0), Piece("full", "an engine", 0, 4.0)]
    return found


def test_what_is_written_is_read_again(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(report, path)
    again = empty()
    again.resume(json.loads(path.read_text()))
    assert again == report
    assert [x.name for x in tmp_path.iterdir()] == ["out.json"]


def test_what_is_there_is_known(report: Report) -> None:
    cell = Cell("copy", 4096, "written", ())
    assert report.has_score("tailorkv", cell)
    assert not report.has_score("tailorkv", Cell("copy", 4096, "given", ()))
    assert not report.has_score("paper", cell)
    assert report.has_text("full", "code") and not report.has_text("full", "prose")
    report.drop_text("full", "code")
    assert not report.has_text("full", "code") and report.divergences


def test_other_arguments_are_refused(report: Report) -> None:
    written = json.loads(json.dumps(report.as_json()))
    with pytest.raises(ValueError, match="samples 2, not 3"):
        empty(samples="3").resume(written)
    with pytest.raises(ValueError, match="new None, not 1"):
        empty(new="1").resume(written)


def test_tasks_count_from_the_threshold(report: Report) -> None:
    (group,) = report.groups
    assert report.counting(group) == ["copy"]
    assert report.share_of_full("tailorkv", group) == pytest.approx(0.8)
    report.counts_from = 0.8
    assert report.counting(group) == []


def test_worst_layer_and_head_are_named(report: Report) -> None:
    (row,) = report.as_json()["attention"]
    assert row["worst_layer"] == {"layer": 2, "of_oracle": 0.8}
    assert row["worst_head"] == {"layer": 3, "head": 1, "of_oracle": 0.5}
    assert row["of_oracle"] == pytest.approx((0.9 + 0.8 + 0.95) / 3)
    console = Console(width=200, record=True)
    report.print(console)
    printed = console.export_text()
    assert "80.0% (layer 2)" in printed
    assert "50.0% (layer 3, KV head 1)" in printed
    assert "0.0200 (0.0100 to 0.0300)" in printed and "95.0%" in printed
