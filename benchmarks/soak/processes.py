"""The processes of a server: their memory, the engine among them, and what outlives them."""

import contextlib
import socket
import time

import psutil

from vllm_tailorkv.demo.server import HOST

_ENGINE = "EngineCore"
_POLL_SECONDS = 0.1


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def resident_bytes(pid: int) -> int:
    """Memory of a tree; what processes share counts for each."""
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def engine_core(pid: int) -> psutil.Process:
    """The process that schedules.

    Raises:
        LookupError: there is none under this server.
    """
    for process in tree(pid):
        if _ENGINE in " ".join(process.cmdline()):
            return process
    raise LookupError(f"the server has no process named {_ENGINE}")


def survivors(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that are still there after so many seconds; dead ones that nobody reaped are not."""
    deadline = time.monotonic() + seconds
    while True:
        left = [process for process in processes if _runs(process)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_SECONDS)


def is_port_free(port: int) -> bool:
    """Whether a server may listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
