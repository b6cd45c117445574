"""What workers and engine cores count, under the `/metrics` that another process serves.

A process writes its values into memory-mapped files of `prometheus_client`'s own format, one write
of 16 bytes for a value. Where vLLM runs several API servers it has a folder for such files
(PROMETHEUS_MULTIPROC_DIR), which each of them reads: ours lie there too. Else the first process,
which then serves `/metrics` itself, makes a folder and reads it when it is asked. The folder is
named in the environment and not in vLLM's configuration, whose hash names what vLLM has compiled.
"""

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric as Collected
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString
from vllm.logger import init_logger

from vllm_tailorkv.attention.name import LOGGER

logger = init_logger(LOGGER)

VLLM_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
FOLDER = "_TAILORKV_METRICS"
"""The variable that names our folder, as `pid:path`, to the processes that this one starts."""

_PREFIX = "tailorkv-metrics-"
_OWNER = "owner"
_FILE_BYTES = 1 << 17
"""Of a file, more than its values take: 300 bytes each at the most."""


@dataclass(frozen=True)
class Metric:
    """A metric of ours; without `vllm` in its name, because vLLM unregisters such.

    Args:
        name: without the suffix of a counter.
        kind: "counter" or "histogram", summed over processes; "gauge_sum" or "gauge_max".
        text: what it counts, for `/metrics`.
        labels: their names.
        buckets: upper bounds of a histogram.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ("layers",)
    buckets: tuple[float, ...] = ()

    @property
    def shown(self) -> str:
        """The name under `/metrics`, but for the parts of a histogram."""
        return self.name + "_total" if self.kind == "counter" else self.name


class Meter:
    """One value, as this process has it; it stays with the process if there is no file."""

    def __init__(self, file: MmapedDict | None, key: str) -> None:
        self.value = 0.0
        self._file, self._key = file, key
        if file is not None:
            file.read_value(key)

    def set(self, value: float) -> None:
        """Write it."""
        self.value = value
        if self._file is not None:
            self._file.write_value(self._key, value, 0.0)

    def add(self, amount: float) -> None:
        """Add to it."""
        value = self.value = self.value + amount
        if self._file is not None:
            self._file.write_value(self._key, value, 0.0)


class Histogram:
    """Values seen, by size."""

    def __init__(self, buckets: list[tuple[float, Meter]], total: Meter) -> None:
        self._buckets, self._total = buckets, total

    def observe(self, value: float) -> None:
        """Count one value."""
        self._total.add(value)
        next(meter for bound, meter in self._buckets if value <= bound).add(1)


def meter(metric: Metric, *labels: str) -> Meter:
    """The value of a counter or gauge in this process, the same one for the same labels."""
    return _meter(os.getpid(), metric, metric.shown, labels)


def histogram(metric: Metric, *labels: str) -> Histogram:
    """The values of a histogram in this process, the same ones for the same labels."""
    buckets = [
        (bound, _meter(os.getpid(), metric, "_bucket", (*labels, floatToGoString(bound))))
        for bound in (*metric.buckets, float("inf"))
    ]
    return Histogram(buckets, _meter(os.getpid(), metric, "_sum", labels))


@cache
def _meter(pid: int, metric: Metric, sample: str, labels: tuple[str, ...]) -> Meter:
    names = [*metric.labels, "le"][: len(labels)]
    name = metric.name + sample if metric.kind == "histogram" else sample
    key = mmap_key(metric.name, name, names, list(labels), metric.text)
    return Meter(_file(pid, metric.kind), key)


@cache
def _file(pid: int, kind: str) -> MmapedDict | None:
    """The file of this process for metrics of a kind, or None where there is none."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / f"{kind}_tailorkv-{pid}.db"
    new = path.with_suffix(".new")
    try:
        with new.open("wb") as file:
            # A write through a mapping ends the process where the disk has no room for it.
            os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
        values = MmapedDict(str(new))
        # Readers see whole files only.
        new.rename(path)
    except OSError as error:
        _warn(error)
        return None
    return values


def _folder() -> Path | None:
    """Where this process writes, or None if nobody reads."""
    if path := os.environ.get(VLLM_FOLDER):
        return Path(path)
    owner, _, path = os.environ.get(FOLDER, "").partition(":")
    # Another program that was started from this one's shell or script counts for itself.
    if path and (owner == str(os.getpid()) or multiprocessing.parent_process() is not None):
        return Path(path)
    return None


def _warn(error: OSError) -> None:
    logger.warning_once("TailorKV: its counters are not under /metrics: %s.", error)


def publish() -> None:
    """Let `/metrics` of this process show what it and those that it starts count. Idempotent."""
    if _folder() is not None:
        return
    try:
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        owner = (folder / "new").open("wb")
        fcntl.flock(owner, fcntl.LOCK_EX)
        (folder / "new").rename(folder / _OWNER)
    except OSError as error:
        _warn(error)
        return
    os.environ[FOLDER] = f"{os.getpid()}:{folder}"
    # What it is called with keeps the lock.
    atexit.register(_remove, folder, os.getpid(), owner)
    REGISTRY.register(Merged(folder))


def _remove(folder: Path, pid: int, owner: object) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove the folders of programs that were killed: nobody holds their lock."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError), owner.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent)


class Merged:
    """Collects what the files of a folder hold, of all processes together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Collected]:
        """Called for every scrape."""
        files = sorted(map(str, self._folder.glob("*.db")))
        try:
            return list(MultiProcessCollector.merge(files))
        except (OSError, RuntimeError, ValueError, struct.error):
            # Removed or cut off by someone else: vLLM's own metrics are served all the same.
            return []
