"""What the benchmarks' command lines share: options, progress, lines of JSON."""

import argparse
import json
import os
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from provenance import provenance
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from speed.kept import kept_records


def numbers(text: str) -> list[int]:
    """Positive whole numbers, comma-separated."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers, as 8192,32768")
    return values


def positive(text: str) -> int:
    """One positive whole number."""
    values = numbers(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one number")
    return values[0]


def parser(doc: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring and these examples."""
    return argparse.ArgumentParser(
        description=doc,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_output(target: argparse.ArgumentParser) -> None:
    """`--threads` and `--json`."""
    target.add_argument(
        "--threads",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="T",
        help="threads of both (%(default)s: all cores this process may use)",
    )
    target.add_argument(
        "--json",
        default="-",
        metavar="FILE",
        help="where lines of JSON go, one a case, each as it is done; - is stdout (%(default)s)",
    )


def refuse(script: str, message: str) -> NoReturn:
    """End with one line."""
    print(f"{Path(script).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


class Lines:
    """Lines of JSON, to a file or stdout, each written at once.

    Args:
        where: a path, or - for stdout.
        settings: what every line of this run says: a file of such lines, measured on the same
            processor, is gone on with. None: what is in a file is overwritten.

    Raises:
        ValueError: the file is of another run.
        OSError: it cannot be written.
    """

    def __init__(self, where: str, settings: dict[str, Any] | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        mode = "w"
        if settings is not None and Path(where).is_file():
            alike = settings | {"processor": provenance()["processor"]}
            self.records, mode = kept_records(Path(where), alike), "a"
        self._file: TextIO = sys.stdout if where == "-" else open(where, mode, encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not sys.stdout:
            self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write one, and where it came from."""
        self.records.append(record)
        print(json.dumps(record | provenance()), file=self._file, flush=True)
        # Pipes and devices know no disk.
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            os.fsync(self._file.fileno())


def progress() -> Progress:
    """A bar on stderr; none where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,
        transient=True,
    )
