"""What all processes of a program would say, said once.

A `TailorKVError` that nobody catches ends with one line, the last that the user reads: vLLM's
processes end one after the other, each with tracebacks of its own, so a process notes the error in
a file that the first process names, and the program says it at the very end. Beside that file lies
an empty one for each warning that one of the processes has given.
"""

import atexit
import contextlib
import hashlib
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
        handle, path = tempfile.mkstemp(prefix="tailorkv-", suffix=".failure")
        os.close(handle)
        os.environ[_FILE] = f"{os.getpid()}:{path}"
        atexit.register(_remove, Path(path))

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, TailorKVError):
            print(f"vllm-tailorkv: error: {error}", file=sys.stderr)
            return
        previous(kind, error, traceback)
        # What vLLM says when a process of its own did not come up; `multiprocessing`, which starts
        # them, calls no hook in them.
        if "initialization failed" in str(error) and (noted := _take_note()):
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
            owner, _, path = os.environ.get(_FILE, "").partition(":")
            # In the first process the error itself arrives where it is read.
            if path and owner != str(os.getpid()):
                # On another machine there is no such file, and none is left there.
                with contextlib.suppress(OSError), Path(path).open("r+") as file:
                    file.write(str(error))
                    file.truncate()
            raise

    return run


def is_first_to_say(message: str) -> bool:
    """Whether no process of this program, on this machine, has said so before; notes that it is."""
    path = os.environ.get(_FILE, "").partition(":")[2]
    if not path:
        return True
    digest = hashlib.sha256(message.encode()).hexdigest()[:16]
    try:
        os.close(os.open(f"{path}.{digest}", os.O_CREAT | os.O_EXCL))
    except OSError as error:
        # Where no file can be made: better twice than never.
        return not isinstance(error, FileExistsError)
    return True


def _take_note() -> str | None:
    """What a process wrote down, once."""
    path = Path(os.environ[_FILE].partition(":")[2])
    try:
        text = path.read_text()
        path.write_text("")
    except OSError:
        return None
    return text


def _remove(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        with contextlib.suppress(OSError):
            file.unlink()
