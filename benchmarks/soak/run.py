"""Rounds of phases over the lives of a server, each phase checked and written down."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import httpx

from soak.checks import (
    Limits,
    compare,
    judge_answers,
    judge_growth,
    judge_idle,
    judge_memory,
    judge_outcomes,
)
from soak.client import FINISHED, Client, Reply
from soak.endings import Ended, ask_to_end, end, kill_engine
from soak.metrics import PREEMPTIONS, PREFIX_HITS, Metrics, rest
from soak.phases import PHASES, Done, Load, Phase, mixed, references, warm_up
from soak.processes import resident_bytes
from vllm_tailorkv.demo.server import ServerOptions, VllmServer

START_SECONDS = 240.0
REQUEST_SECONDS = 300.0
"""A request that has not ended by then hangs; the longest take some 20 s on two cores."""

_REST_SECONDS = 20.0
ENDINGS = {"terminated": ask_to_end, "engine killed": kill_engine}


class Soak:
    """A server under test and what is known of it; to be used in a `with` statement.

    Args:
        options: of the server.
        limits: of how closely answers can be compared.
        write: gets the record of each phase as it is done.
        show: gets the name of what happens.
    """

    def __init__(
        self,
        options: ServerOptions,
        load: Load,
        limits: Limits,
        write: Callable[[dict[str, Any]], None],
        show: Callable[[str], None],
    ) -> None:
        self._options = options
        self._load = load
        self._limits = limits
        self._write = write
        self._show = show
        self._references: dict[str, Reply] = {}
        self._server = VllmServer(options)
        self._round = 0
        self._warm_bytes: int | None = None
        self.problems: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop()

    def run(self, minutes: float, restart_every: int) -> None:
        """Phases until the time is up, all of the first round whatever it is.

        Raises:
            ServerError: the server does not start.
        """
        deadline = time.monotonic() + 60 * minutes
        self._start()
        self._refer()
        while self._round == 0 or time.monotonic() < deadline:
            self._round += 1
            last = None if self._round == 1 else deadline
            for name, phase in PHASES.items():
                if self._warm_bytes is None:
                    self._go_through("warm-up", warm_up)
                if last is None or time.monotonic() < last:
                    self._go_through(name, phase)
            if (self._round - 1) % restart_every == 0:
                for name in ENDINGS:
                    if last is None or time.monotonic() < last:
                        self._end(name)

    def _start(self) -> float:
        """A server that answers, on the port of the one before; the seconds that it took."""
        start = time.monotonic()
        self._show("starts")
        self._server.stop()
        self._server = VllmServer(self._options)
        self._options = replace(self._options, port=self._server.port)
        self._server.start()
        self._server.wait_until_healthy(lambda _: None, START_SECONDS)
        self._warm_bytes = None
        return time.monotonic() - start

    def _refer(self) -> None:
        """The answers of an undisturbed server."""
        self._show("references")
        start = time.monotonic()
        replies = asyncio.run(self._with_client(references))
        self._references = {reply.prompt.name or "": reply for reply in replies}
        problems = judge_outcomes(replies, [FINISHED])
        self._record("references", start, replies, problems, {})

    def _go_through(self, name: str, phase: Phase) -> None:
        self._show(name)
        start = time.monotonic()
        done, record, problems = Done([]), {}, []
        try:
            before = Metrics(self._server.url)
            done = asyncio.run(self._with_client(phase))
            problems = [*done.problems]
            idle = rest(self._server.url, _REST_SECONDS)
            problems += judge_idle(idle)
            after = Metrics(self._server.url)
            preemptions = after[PREEMPTIONS] - before[PREEMPTIONS]
            for counter in done.must_grow:
                problems += judge_growth(counter, before[counter], after[counter])
            memory = resident_bytes(self._server.pid)
            if name == "warm-up":
                self._warm_bytes = memory
            elif self._warm_bytes is not None:
                problems += judge_memory(self._warm_bytes, memory)
            record = {
                "preemptions": preemptions,
                "prefix_hits": after[PREFIX_HITS] - before[PREFIX_HITS],
                "kv_usage": idle.kv_usage,
                "running": idle.running,
                "waiting": idle.waiting,
                "rss_bytes": memory,
                "warm_rss_bytes": self._warm_bytes,
            } | self._compared(done.replies, preemptions, problems)
        except httpx.HTTPError as error:
            problems.append(f"the server does not answer: {type(error).__name__}")
        status = self._server.wait(0)
        if status is not None:
            problems.append(f"the server ended with exit status {status}")
        self._record(name, start, done.replies, problems, record)
        if status is not None:
            self._start()

    def _end(self, name: str) -> None:
        """End the server under load, start another one, and see that it answers the same."""
        self._show(name)
        start = time.monotonic()
        ended: Ended = asyncio.run(self._with_client(end, self._server, ENDINGS[name]))
        record: dict[str, Any] = {
            "end_seconds": round(ended.seconds, 2),
            "exit_status": ended.exit_status,
            "gave_up": ended.gave_up,
            "start_seconds": round(self._start(), 1),
        }
        self._show(f"{name}: answers of the next server")
        before = Metrics(self._server.url)
        done = asyncio.run(self._with_client(mixed))
        problems = (
            ended.problems + done.problems + judge_idle(rest(self._server.url, _REST_SECONDS))
        )
        preemptions = Metrics(self._server.url)[PREEMPTIONS] - before[PREEMPTIONS]
        record |= self._compared(done.replies, preemptions, problems)
        self._record(name, start, ended.replies + done.replies, problems, record)

    async def _with_client(self, work: Callable[..., Any], *arguments: Any) -> Any:
        model = self._load.model
        async with Client(self._server.url, model, REQUEST_SECONDS) as client:
            if arguments:
                server, strike = arguments
                return await work(server, client, self._load, strike)
            return await work(client, self._load)

    def _compared(
        self, replies: Sequence[Reply], preemptions: float, problems: list[str]
    ) -> dict[str, Any]:
        """What comes of comparing answers; problems are added."""
        comparison = compare(self._references, replies, self._limits)
        problems += judge_answers(comparison, preemptions)
        return {"answers": vars(comparison)}

    def _record(
        self,
        name: str,
        start: float,
        replies: Sequence[Reply],
        problems: list[str],
        more: dict[str, Any],
    ) -> None:
        self.problems += [f"round {self._round}, {name}: {problem}" for problem in problems]
        outcomes = Counter(reply.outcome for reply in replies)
        self._write(
            {
                "round": self._round,
                "phase": name,
                "seconds": round(time.monotonic() - start, 1),
                "requests": len(replies),
                "outcomes": dict(outcomes),
                "longest_seconds": round(max((r.seconds for r in replies), default=0), 1),
                **more,
                "problems": problems,
            }
        )
