"""Stops a run in time: what a piece of work will take is guessed from what others took."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Deadline:
    """`hours` from now on; None is no limit.

    A piece of work has a kind and a size (tokens). It is expected to take as long as the longest of
    its kind and size, or else as long for its size as the slowest of any kind; with nothing seen
    yet, no time.
    """

    def __init__(self, hours: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = None if hours is None else now() + 3600 * hours
        self._took: dict[tuple[str, int], list[float]] = defaultdict(list)

    def allows(self, kind: str, size: int) -> bool:
        """There is time for this."""
        return self._end is None or self._now() + self.expected(kind, size) <= self._end

    def expected(self, kind: str, size: int) -> float:
        """Seconds."""
        if (kind, size) in self._took:
            return max(self._took[kind, size])
        rates = [max(took) / other for (_, other), took in self._took.items()]
        return size * max(rates, default=0.0)

    @contextmanager
    def timed(self, kind: str, size: int) -> Iterator[None]:
        """The work is done in this block."""
        started = self._now()
        yield
        self._took[kind, size].append(self._now() - started)
