"""`accuracy.py` is interrupted and goes on from its file: nothing is asked twice, or lost."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accuracy import runner
from accuracy.attention_level import LayerQuality
from accuracy.evaluate import Cell, Score
from accuracy.methods import FULL, Method
from accuracy.reference import Recorder
from accuracy.text_quality import Divergence, Likelihood

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"
METHODS, TASKS, LENGTHS, TEXTS = [FULL, "tailorkv", "oracle"], ["copy", "single_1"], [600, 700], 2
PIECES = len(METHODS) * (len(TASKS) * len(LENGTHS) + TEXTS)
Piece = tuple[str, ...]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, whose name is its package's, too."""
    spec = importlib.util.spec_from_file_location("accuracy_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Harness:
    """Runs the script with a fake engine.

    done: the pieces that it was asked for.
    stop_after: so many of them; None for no interrupt.
    """

    def __init__(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Piece] = []
        self.stop_after: int | None = None
        self._main: Callable[[], None] = script.main
        self._patch = monkeypatch
        for name in ("start", "run_cell", "likelihood", "observed"):
            monkeypatch.setattr(runner, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(runner, "selectors_of", lambda method, engine: None)
        # Contexts cost seconds, and are no matter to a fake engine.
        monkeypatch.setattr(
            script, "make_cell", lambda e, task, length, s, t, seed, a, f: Cell(task, length, a, ())
        )
        monkeypatch.setattr(script, "held_out", lambda e, n, seed, kind: list(range(n)))

    def run(self, file: Path, *more: str) -> None:
        asked = ["--methods", *METHODS, "--tasks", ",".join(TASKS), "--samples", "1"]
        asked += ["--lengths", ",".join(map(str, LENGTHS)), "--text", "prose,code"]
        command = ["accuracy.py", *asked, "--text-steps", "8", "--json", str(file), *more]
        self._patch.setattr(sys, "argv", command)
        self._main()

    def interrupted(self, file: Path, count: int) -> list[Piece]:
        """The pieces that were done."""
        self.done.clear()
        self.stop_after = count
        with pytest.raises(SystemExit) as caught:
            self.run(file)
        assert caught.value.code == 130
        self.stop_after = None
        return list(self.done)

    def _piece(self, *piece: str) -> None:
        if len(self.done) == self.stop_after:
            raise KeyboardInterrupt
        self.done.append(piece)

    @contextmanager
    def _start(self, *_: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(
            llm=SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(decode=None)),
            configure=lambda options, selectors: None,
            bytes_per_token=lambda: {"host": 2.0},
        )

    def _run_cell(self, engine: object, method: Method, cell: Cell, decode: object) -> Score:
        self._piece(method.name, cell.task, str(cell.length))
        value = len(method.name) / 10 + cell.length / 10_000
        return Score(method.name, cell.task, cell.length, cell.answers, (value,))

    def _likelihood(
        self,
        engine: object,
        method: str,
        kind: str,
        texts: Any,
        kept: Any,
        stretch: int,
        record: bool,
    ) -> tuple[Likelihood, Divergence | None]:
        if record:
            # As far as it comes before it is interrupted.
            recorders = [Recorder(reference) for reference in kept]
        self._piece(method, kind)
        likely = Likelihood(method, len(texts[0]), stretch, (-1.5,), kind)
        if record:
            for recorder in recorders:
                recorder.reference.path.touch()
                recorder.reference.complete_with(np.zeros((8, 2)), np.zeros((8, 2)))
            return likely, None
        assert all(reference.complete for reference in kept)
        return likely, Divergence(method, kind, 9, 8, 0.1, 0.0, 0.2, 0.9, stretch, (0.1,))

    @contextmanager
    def _observed(
        self, engine: object, method: str, kind: str, every: int
    ) -> Iterator[list[LayerQuality]]:
        yield [] if method == FULL else [LayerQuality(method, 1, 0.9, 1, 0, 0.9, (0.9,), kind)]


@pytest.fixture
def harness(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Harness:
    return Harness(script, monkeypatch)


def results(file: Path) -> dict[str, Any]:
    """Without times."""
    found = json.loads(file.read_text())
    del found["pieces"]
    for method in found["methods"]:
        del method["seconds"]
    return found


@pytest.mark.parametrize("count", range(PIECES))
def test_it_goes_on(count: int, harness: Harness, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.json", tmp_path / "out.json"
    harness.run(whole)
    pieces = list(harness.done)
    assert len(pieces) == len(set(pieces)) == PIECES
    assert harness.interrupted(file, count) == pieces[:count]
    if count:
        written = results(file)
        assert not written["finished"]
        assert len(written["scores"]) + len(written["likelihoods"]) == count
    harness.done.clear()
    harness.run(file)
    assert harness.done == pieces[count:]
    assert results(file) == results(whole)
    # The references are needed no more.
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.json", "whole.json"]
    harness.done.clear()
    harness.run(file)
    assert harness.done == [] and results(file) == results(whole)


def test_it_is_interrupted_again_and_again(harness: Harness, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.json", tmp_path / "out.json"
    harness.run(whole)
    pieces = list(harness.done)
    stopped = [harness.interrupted(file, 1) for _ in pieces[1:]]
    assert stopped == [[piece] for piece in pieces[:-1]]
    harness.done.clear()
    harness.run(file)
    assert harness.done == pieces[-1:] and results(file) == results(whole)


def test_a_kill_while_it_is_written_loses_nothing(harness: Harness, tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.json", tmp_path / "out.json"
    harness.run(whole)
    pieces = list(harness.done)
    harness.interrupted(file, 5)
    file.with_name("out.json.new").write_text(whole.read_text()[:99])
    harness.done.clear()
    harness.run(file)
    assert harness.done == pieces[5:] and results(file) == results(whole)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--samples", "2"], "it was written with samples 1, not 2"),
        (["--text-steps", "9"], "it was written with text_steps 8, not 9"),
        (["--seed", "1"], "it was written with seed 0, not 1"),
    ],
)
def test_other_settings_are_refused(
    options: list[str], told: str, harness: Harness, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    harness.interrupted(file, 3)
    before = file.read_text()
    harness.done.clear()
    with pytest.raises(SystemExit, match=told) as caught:
        harness.run(file, *options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("or remove it")
    assert harness.done == [] and file.read_text() == before


@pytest.mark.parametrize("text", ['{"revision": "a', "[]", "a note of mine", ""])
def test_other_files_are_refused(text: str, harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match="cannot go on from"):
        harness.run(file)
    assert harness.done == [] and file.read_text() == text


def test_references_of_a_removed_file_are_made_again(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    harness.interrupted(file, 6)
    kept = tmp_path / "out.json.reference"
    assert list(kept.iterdir())
    file.unlink()
    harness.interrupted(file, 0)
    assert not kept.exists()


def test_no_folder_is_told_before_work(harness: Harness, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no directory"):
        harness.run(tmp_path / "no" / "out.json")
    assert harness.done == []
