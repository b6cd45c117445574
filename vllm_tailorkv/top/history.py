"""The scrapes of the last minute."""

from collections import deque

from vllm_tailorkv.top.scrape import Scrape

_SECONDS = 60.0


class History:
    """Scrapes in the order of their times; a server that starts again begins a new one."""

    def __init__(self) -> None:
        self._scrapes: deque[Scrape] = deque()

    def add(self, scrape: Scrape) -> None:
        """The newest one."""
        kept = self._scrapes
        if kept and not kept[-1].is_continued_by(scrape):
            kept.clear()
        kept.append(scrape)
        # One that is older stays, or a long interval would leave nothing to compare with.
        while len(kept) > 2 and scrape.time - kept[1].time >= _SECONDS:
            kept.popleft()

    def clear(self) -> None:
        """The server is gone."""
        self._scrapes.clear()

    @property
    def is_comparable(self) -> bool:
        """Whether there are two of them."""
        return len(self._scrapes) > 1

    @property
    def oldest(self) -> Scrape:
        """About a minute old, or as old as there is."""
        return self._scrapes[0]

    @property
    def previous(self) -> Scrape:
        """The one before the newest, where they are comparable."""
        return self._scrapes[-2]

    @property
    def newest(self) -> Scrape:
        """The last one added."""
        return self._scrapes[-1]
