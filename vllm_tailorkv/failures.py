"""How a `TailorKVError` that nobody catches ends: with one line, the last that the user reads.

vLLM's processes end one after the other, each with tracebacks of its own. So a process notes the
error in a file that the first process names, and the program says it at the very end.
"""

import atexit
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from vllm_tailorkv.errors import TailorKVError

_FILE = "_TAILORKV_FAILURE"
"""The variable that names the file to the processes that this one starts."""

P = ParamSpec("P")
T = TypeVar("T")


def report_in_one_line() -> None:
    """Let a `TailorKVError` be the last line of the program, status 1. Idempotent."""
    previous = sys.excepthook
    if getattr(previous, "_tailorkv", False):
        return
    if _FILE not in os.environ:
        os.environ[_FILE] = str(Path(tempfile.gettempdir()) / f"tailorkv-{os.getpid()}.failure")
        _take_note()  # of an earlier process with this number
        atexit.register(_take_note)

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        # vLLM starts its processes by `multiprocessing`, which calls no hook in them.
        noted = _take_note()
        if isinstance(error, TailorKVError):
            noted = str(error)
        else:
            previous(kind, error, traceback)
        if noted:
            print(f"vllm-tailorkv: error: {noted}", file=sys.stderr)

    hook._tailorkv = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def noted(function: Callable[P, T]) -> Callable[P, T]:
    """A function that, where it raises a `TailorKVError`, notes it for the first process."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TailorKVError as error:
            if path := os.environ.get(_FILE):
                with contextlib.suppress(OSError):
                    Path(path).write_text(str(error))
            raise

    return run


def _take_note() -> str | None:
    """What a process wrote down, once."""
    path = Path(os.environ[_FILE])
    try:
        text = path.read_text()
        path.unlink()
    except OSError:
        return None
    return text
