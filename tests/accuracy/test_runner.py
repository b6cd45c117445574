"""Runs: every piece once, those of full attention first, nothing twice, stopped in time."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accuracy import runner
from accuracy.deadline import Deadline, OutOfTime, Piece
from accuracy.evaluate import Cell, Score
from accuracy.methods import FULL, parse_method
from accuracy.report import Report
from accuracy.runner import Run, Text
from accuracy.text_quality import Likelihood, references

CELLS = [Cell("copy", 4096, "written", ()), Cell("single_1", 4096, "written", ())]
METHODS = ["tailorkv", "full", "tailorkv:bits=4", "oracle"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    done: list[object] = []

    @contextmanager
    def start(model, longest, gib, options):
        done.append("start full" if options is None else f"start {options['bits']}")
        yield SimpleNamespace(
            llm=SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(decode=None)),
            sparse_impls=[],
            configure=lambda options, selectors: None,
            bytes_per_token=lambda: {},
        )

    def run_cell(engine, method, cell, decode):
        done.append((method.name, cell.task))
        return Score(method.name, cell.task, cell.length, cell.answers, (cell.task == "copy",))

    def likelihood(engine, method, kind, texts, kept, stretch, record):
        done.append((method, kind))
        for reference in kept if record else ():
            reference.path.parent.mkdir(exist_ok=True)
            reference.complete_with(np.zeros((1, 1)), np.zeros((1, 1)))
        return Likelihood(method, 9, stretch, (0.0,), kind), None

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner, "run_cell", run_cell)
    monkeypatch.setattr(runner, "likelihood", likelihood)
    monkeypatch.setattr(runner, "selectors_of", lambda method, engine: None)
    return done


def run_of(folder: Path, **options) -> Run:
    ids = [list(range(9))]
    report = Report({}, [parse_method(name, 4) for name in METHODS], 0.9)
    return Run(
        report,
        CELLS,
        [Text("code", ids, references(folder / "kept", "code", ids, 3))],
        Path("model"),
        9,
        1.0,
        **{"skip_unsolved": False, "deadline": Deadline(None, []), "saved": lambda: None} | options,
    )


def test_everything_is_done_once_and_full_attention_first(log: list, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    shown: list[str | None] = []
    run.run(shown.append)
    assert log[:4] == ["start full", ("full", "copy"), ("full", "single_1"), ("full", "code")]
    pieces = [x for x in log if isinstance(x, tuple)]
    assert len(pieces) == len(set(pieces)) == run.pieces == shown.count(None) == 12
    # Methods that share an engine are asked cell by cell.
    assert log.count("start 2") == 1 and log.count("start 4") == 1
    assert run.report.finished


def test_a_run_goes_on_where_it_was_stopped(log: list, tmp_path: Path) -> None:
    saved: list[int] = []

    def stop() -> None:
        saved.append(1)
        if len(saved) == 5:
            raise KeyboardInterrupt

    first = run_of(tmp_path, saved=stop)
    with pytest.raises(KeyboardInterrupt):
        first.run(lambda shown: None)
    before = [x for x in log if isinstance(x, tuple)]
    assert len(before) == 5 and not first.report.finished
    log.clear()
    second = run_of(tmp_path)
    second.report.resume(first.report.as_json())
    second.run(lambda shown: None)
    after = [x for x in log if isinstance(x, tuple)]
    assert "start full" not in log
    assert len(after) == 7 and not set(before) & set(after)


def test_lost_references_are_made_again(log: list, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.report.likelihoods = [Likelihood(FULL, 9, 32, (0.0,), "code")]
    run.run(lambda shown: None)
    assert log.count((FULL, "code")) == 1
    assert len([x for x in run.report.likelihoods if x.method == FULL]) == 1
    # Nothing is left that needs them.
    log.clear()
    for reference in run.texts[0].kept:
        reference.forget()
    run.run(lambda shown: None)
    assert log == []


def test_what_full_attention_does_not_solve_is_spared(log: list, tmp_path: Path) -> None:
    run_of(tmp_path, skip_unsolved=True).run(lambda shown: None)
    asked = [x for x in log if x[1] in ("copy", "single_1")]
    assert len(asked) == 5
    assert [x for x in asked if x[1] == "single_1"] == [(FULL, "single_1")]


def test_it_stops_in_time(log: list, tmp_path: Path) -> None:
    slow = [Piece("x", "single_1, 4,096 tokens, written", 4096, 7200.0)]
    slow.append(Piece("x", "copy, 4,096 tokens, written", 4096, 1.0))
    run = run_of(tmp_path, deadline=Deadline(1.0, slow))
    with pytest.raises(OutOfTime):
        run.run(lambda shown: None)
    assert log == ["start full", ("full", "copy")]
    assert [x.task for x in run.report.scores] == ["copy"] and not run.report.finished
