"""Stops a run in time: what a piece of work will take is guessed from what others took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class OutOfTime(Exception):  # noqa: N818
    """The next piece of work would end too late."""


@dataclass(frozen=True)
class Piece:
    """A piece of work that was done; `size` in tokens, 0 where time does not grow with it."""

    method: str
    kind: str
    size: int
    seconds: float


class Deadline:
    """`hours` from now on; None is no limit.

    A piece of work is expected to take as long as the longest of its kind and size in `done`, or
    else as long for its size as the slowest of any kind; with nothing done yet, no time.
    """

    def __init__(
        self, hours: float | None, done: Sequence[Piece], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self._end = None if hours is None else now() + 3600 * hours
        self._done = done

    def check(self, kind: str, size: int) -> None:
        """Raises OutOfTime if there is no time for this."""
        if self._end is not None and self._now() + self.expected(kind, size) > self._end:
            raise OutOfTime

    def expected(self, kind: str, size: int) -> float:
        """Seconds."""
        alike = [x.seconds for x in self._done if (x.kind, x.size) == (kind, size)]
        rates = [x.seconds / x.size for x in self._done if x.size]
        return max(alike) if alike else size * max(rates, default=0.0)
