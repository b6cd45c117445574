"""What is kept of the past, and when the past is another server's."""

from vllm_tailorkv.top.history import History
from vllm_tailorkv.top.scrape import Scrape


def said(time: float, tokens: float) -> Scrape:
    return Scrape(time, {"tokens_total": (({}, tokens),), "running": (({}, -tokens),)})


def test_a_minute_is_kept() -> None:
    history = History()
    for second in range(0, 200, 2):
        history.add(said(second, second))
    assert (history.newest.time, history.previous.time, history.oldest.time) == (198, 196, 138)


def test_there_are_two_however_long_the_interval() -> None:
    history = History()
    for second in (0, 100, 200):
        history.add(said(second, second))
        assert history.is_comparable == (second > 0)
    assert history.oldest.time == history.previous.time == 100


def test_a_server_that_starts_again_has_no_past() -> None:
    history = History()
    history.add(said(0, 100))
    history.add(said(2, 100))
    assert history.is_comparable
    history.add(said(4, 7))
    assert not history.is_comparable
    history.add(said(6, 8))
    assert history.previous.time == 4


def test_a_recorded_server_is_continued_one_way_only(before: Scrape, after: Scrape) -> None:
    assert before.is_continued_by(after)
    assert not after.is_continued_by(before)
