"""Runs that stop in time."""

import pytest
from accuracy.deadline import Deadline, OutOfTime, Piece

DONE = [
    Piece("full", "an engine", 0, 900.0),
    Piece("full", "copy", 4096, 100.0),
    Piece("ours", "copy", 4096, 200.0),
    Piece("full", "single_1", 8192, 80.0),
]


@pytest.mark.parametrize(
    ("kind", "size", "seconds"),
    [("copy", 4096, 200.0), ("single_1", 8192, 80.0), ("an engine", 0, 900.0), ("new", 8192, 400)],
)
def test_a_piece_takes_what_the_slowest_like_it_took(kind, size, seconds) -> None:
    assert Deadline(1.0, DONE).expected(kind, size) == pytest.approx(seconds)


def test_nothing_is_begun_that_would_end_too_late() -> None:
    clock = iter([0.0, 3300.0, 3300.0, 3450.0])
    deadline = Deadline(1.0, DONE, lambda: next(clock))
    deadline.check("copy", 4096)
    deadline.check("single_1", 8192)
    with pytest.raises(OutOfTime):
        deadline.check("copy", 4096)


def test_without_a_limit_there_is_always_time() -> None:
    Deadline(None, [Piece("full", "copy", 1, 1e9)]).check("copy", 1)
