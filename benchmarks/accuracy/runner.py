"""Does what a run asks for, piece by piece; what is in the report already is left out."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from accuracy.attention_level import observed
from accuracy.deadline import Deadline, Piece
from accuracy.engine import Engine, start
from accuracy.evaluate import Cell, run_cell
from accuracy.methods import FULL, Method, selectors_of
from accuracy.reference import Reference
from accuracy.report import Report
from accuracy.text_quality import likelihood

_TEXT_STRETCH = 32
_OBSERVED_STEPS = 64
_ENGINE = "an engine"


Show = Callable[[str | None], None]


@dataclass(frozen=True)
class Text:
    """Texts of one kind as tokens, and where full attention's view of each is kept."""

    kind: str
    texts: Sequence[list[int]]
    kept: Sequence[Reference]

    @property
    def length(self) -> int:
        """Tokens of each."""
        return len(self.texts[0])

    @property
    def steps(self) -> int:
        """Decode steps of each."""
        return self.kept[0].steps


@dataclass
class Run:
    """All cells and texts with all methods.

    model: folder of the checkpoint.
    longest: tokens of the longest request.
    skip_unsolved: other methods are spared what full attention does not solve.
    saved: is called after each piece of work.
    """

    report: Report
    cells: Sequence[Cell]
    texts: Sequence[Text]
    model: Path
    longest: int
    kv_cache_gib: float
    skip_unsolved: bool
    deadline: Deadline
    saved: Callable[[], None]

    @property
    def pieces(self) -> int:
        """How many pieces of work there are."""
        return len(self.report.methods) * (len(self.cells) + len(self.texts))

    def run(self, show: Show) -> None:
        """Runs what is not there yet. A context is read once an engine, then asked by each method.

        Args:
            show: is told what is done next; None is told when a piece is done.

        Raises:
            OutOfTime: not all was done.
        """

        def engine_of(method: Method) -> tuple[bool, str]:
            # Full attention comes first: it tells which tasks count.
            return method.options is not None, str(method.engine_options)

        for _, served in groupby(sorted(self.report.methods, key=engine_of), engine_of):
            self._run_engine(list(served), show)
        self.report.finished = True
        self.saved()

    def _run_engine(self, methods: list[Method], show: Show) -> None:
        """Everything that methods which share an engine have still to do."""
        everything: list[Cell | Text] = [*self.cells, *self.texts]
        jobs = [(what, method) for what in everything for method in methods]
        todo = [(what, method) for what, method in jobs if self._wanted(what, method)]
        for _ in range(len(jobs) - len(todo)):
            show(None)
        if not todo:
            return
        with ExitStack() as stack:
            options = methods[0].engine_options
            started = self._begin(show, f"{_ENGINE} starts", _ENGINE, 0)
            engine = stack.enter_context(
                start(str(self.model), self.longest, self.kv_cache_gib, options)
            )
            self._end(methods[0], _ENGINE, 0, started)
            selectors = {method.name: selectors_of(method, engine) for method in methods}
            for what, method in todo:
                if method.options is not None:
                    engine.configure(method.options, selectors[method.name])
                    self.report.bytes_per_token[method.name] = engine.bytes_per_token()
                label = _label(what)
                started = self._begin(show, f"{method.name}: {label}", label, what.length)
                self._do(engine, what, method)
                self._end(method, label, what.length, started)
                self.saved()
                show(None)

    def _begin(self, show: Show, shown: str, kind: str, size: int) -> float:
        self.deadline.check(kind, size)
        show(shown)
        return time.monotonic()

    def _end(self, method: Method, kind: str, size: int, started: float) -> None:
        self.report.pieces.append(Piece(method.name, kind, size, time.monotonic() - started))

    def _wanted(self, what: Cell | Text, method: Method) -> bool:
        """It is to be done, and is not there yet."""
        report = self.report
        if isinstance(what, Cell):
            skipped = self.skip_unsolved and method.name != FULL and not report.counts(what)
            return not skipped and not report.has_score(method.name, what)
        if not report.has_text(method.name, what.kind):
            return True
        # Others are to be compared with it, and it is no longer there.
        others = (m.name for m in report.methods if m.name != FULL)
        return (
            method.name == FULL
            and not all(kept.complete for kept in what.kept)
            and not all(report.has_text(name, what.kind) for name in others)
        )

    def _do(self, engine: Engine, what: Cell | Text, method: Method) -> None:
        if isinstance(what, Cell):
            decode = engine.llm.get_tokenizer().decode
            self.report.scores.append(run_cell(engine, method, what, decode))
            return
        self.report.drop_text(method.name, what.kind)
        every = max(1, what.steps // _OBSERVED_STEPS)
        with observed(engine, method.name, what.kind, every) as layers:
            likely, divergence = likelihood(
                engine,
                method.name,
                what.kind,
                what.texts,
                what.kept,
                _TEXT_STRETCH,
                record=method.name == FULL,
            )
        self.report.likelihoods.append(likely)
        if divergence is not None:
            self.report.divergences.append(divergence)
        self.report.layers += layers


def _label(what: Cell | Text) -> str:
    if isinstance(what, Cell):
        return f"{what.task}, {what.length:,} tokens, {what.answers}"
    return f"{what.steps:,} steps of {what.kind}"
