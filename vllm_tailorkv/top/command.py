"""`vllm-tailorkv top`: watch a server."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.top.history import History
from vllm_tailorkv.top.report import Report, make_report
from vllm_tailorkv.top.screen import screen
from vllm_tailorkv.top.server import MetricsServer

_DEFAULT_URL = "http://localhost:8000"
_SHORTEST_SECONDS = 0.1

_EXAMPLES = """\
examples:
  vllm-tailorkv top
  vllm-tailorkv top http://gpu-box:8000 --interval 5
  vllm-tailorkv top --once
  vllm-tailorkv top --json >> figures.jsonl

exit status: 0, also after Ctrl-C; 1 if there is no server with tailorkv at the start (one that goes
away later is waited for)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-tailorkv top",
        description="Watch a server: its plan, requests, tokens, what each tier reads and holds, "
        "waits of clients, and what the quality guard sees.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "url", nargs="?", default=_DEFAULT_URL, metavar="URL", help="server (default: %(default)s)"
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="between two screens (default: %(default)s)",
    )
    parser.add_argument(
        "--once", action="store_true", help="print one screen, of one interval, and end"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a line of JSON for each interval"
    )
    return parser


class _Lines:
    """Shows reports as lines of JSON."""

    def show(self, report: Report) -> None:
        """A report."""
        self._print(report.as_json())

    def lost(self, error: TailorKVError) -> None:
        """There is none."""
        self._print({"error": str(error)})

    def _print(self, values: dict[str, object]) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        print(json.dumps({"time": now} | values), flush=True)


class _Screen:
    """Shows reports on a terminal, each in the place of the one before; elsewhere in turn."""

    def __init__(self, server: MetricsServer, console: Console, live: Live | None) -> None:
        self._server, self._console, self._live = server, console, live

    def show(self, report: Report) -> None:
        """A report."""
        self._draw(Group(self._title(), screen(report)))

    def lost(self, error: TailorKVError) -> None:
        """There is none."""
        self._draw(Group(self._title(), Text(f"waiting: {error}", style="yellow")))

    def _title(self) -> Text:
        text = f"{self._server.url.removesuffix('/metrics')}  {datetime.now():%H:%M:%S}"
        return Text(text + ("  (Ctrl-C ends)" if self._live else ""), style="dim")

    def _draw(self, what: Group) -> None:
        if self._live is None:
            self._console.print(what)
        else:
            self._live.update(what, refresh=True)


def _watch(server: MetricsServer, out: _Lines | _Screen, interval: float, once: bool) -> None:
    history = History()
    # The first answer decides whether there is anything to watch.
    history.add(server.read())
    while True:
        time.sleep(interval)
        try:
            history.add(server.read())
        except TailorKVError as error:
            if once:
                raise
            history.clear()
            out.lost(error)
            continue
        if history.is_comparable:
            out.show(make_report(history))
            if once:
                return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after `top`.

    Returns:
        The exit status: 0, or 1 after a line on what is wrong.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.interval >= _SHORTEST_SECONDS:
        parser.error(f"--interval must be at least {_SHORTEST_SECONDS}, is {options.interval}")
    console = Console()
    try:
        with ExitStack() as stack:
            server = stack.enter_context(MetricsServer(options.url))
            if options.json:
                _watch(server, _Lines(), options.interval, options.once)
                return 0
            live = None
            if console.is_terminal and not options.once:
                live = Live(console=console, auto_refresh=False, screen=False)
                stack.enter_context(live)
            _watch(server, _Screen(server, console, live), options.interval, options.once)
    except TailorKVError as error:
        print(f"vllm-tailorkv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Who read has gone; what is left would be written once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
