"""What the demo is doing now: a line that lives until it is done."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape

_PLAIN_UPDATE_SECONDS = 15.0
_NEWS_CHARS = 100


class Phase:
    """A part of the demo, to be used in a `with` statement: its title, the seconds that go by and
    the newest news; at the end, what it took.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._status = console.status(title)
        self._start = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._status.stop()
        if error is None:
            self._print(f"{self._title}: {time.monotonic() - self._start:.1f} s")

    def news(self, news: str) -> None:
        """Something to say of it, in a line."""
        line = f"{self._head()}: {escape(news[:_NEWS_CHARS])}"
        self._status.update(line)
        # Where nothing can be redrawn, in a log for instance, a line now and then.
        plain = not self._console.is_terminal
        if plain and time.monotonic() - self._printed > _PLAIN_UPDATE_SECONDS:
            self._printed = time.monotonic()
            self._print(line)

    def answer(self, title: str, text: str, tokens_a_second: float | None) -> None:
        """An answer, as far as it has come; for good once it is complete."""
        line = f"[bold]{escape(title)}[/]: {escape(' '.join(text.split()))}"
        if tokens_a_second is None:
            self._status.update(f"{self._head()}\n  {line}")
        else:
            self._print(f"  {line} [dim]({tokens_a_second:.0f} tokens/s)[/]")

    def _head(self) -> str:
        return f"{self._title}, {time.monotonic() - self._start:.0f} s"

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
