"""Ends of a server under load: asked to end, or its engine killed."""

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import psutil

from soak.checks import judge_outcomes
from soak.client import FAILED, FINISHED, LEFT, Client, Reply
from soak.phases import Load
from soak.processes import engine_core, is_port_free, survivors, tree
from vllm_tailorkv.demo.server import VllmServer

END_SECONDS = 30.0
"""A server that has not ended by then hangs; it takes one or two seconds."""

_STREAMING_SECONDS = 3.0
_REAP_SECONDS = 30.0
"""Processes of a server may be that late behind it: on busy cores some took more than 5 s."""


@dataclass
class Ended:
    """How a server ended.

    Args:
        seconds: from the signal to the end of its first process.
        exit_status: None if it went on.
        gave_up: it ended only when its clients had closed their streams.
    """

    replies: list[Reply]
    problems: list[str]
    seconds: float
    exit_status: int | None
    gave_up: bool


def ask_to_end(server: VllmServer) -> None:
    """SIGTERM, as systemd and Kubernetes send it."""
    psutil.Process(server.pid).send_signal(signal.SIGTERM)


def kill_engine(server: VllmServer) -> None:
    """SIGKILL to the process that schedules, as when memory runs out."""
    engine_core(server.pid).kill()


async def end(
    server: VllmServer, client: Client, load: Load, strike: Callable[[VllmServer], None]
) -> Ended:
    """Strike a server in mid-stream and see that it ends, with all that belongs to it."""
    prompts = load.prompts.long_answers(load.streams)
    streams = [asyncio.create_task(client.ask(prompt)) for prompt in prompts]
    await asyncio.sleep(_STREAMING_SECONDS)
    processes = tree(server.pid)
    start = time.monotonic()
    strike(server)
    status = await asyncio.to_thread(server.wait, END_SECONDS)
    gave_up = status is None
    if gave_up:
        for stream in streams:
            stream.cancel()
        status = await asyncio.to_thread(server.wait, END_SECONDS)
    seconds = time.monotonic() - start
    ends = await asyncio.gather(*streams, return_exceptions=True)
    replies = [
        end if isinstance(end, Reply) else Reply(prompt, LEFT)
        for prompt, end in zip(prompts, ends, strict=True)
    ]
    problems = judge_outcomes(replies, [FAILED, FINISHED, LEFT])
    if gave_up and strike is not ask_to_end:
        # On SIGTERM vLLM may kill its engine before it has told the streams, and waits for them.
        problems.append(f"streams of a dead engine were open for {END_SECONDS:.0f} s")
    if all(reply.outcome == FINISHED for reply in replies):
        problems.append("no stream was open any more when the server was struck")
    problems += judge_end(server, status, processes)
    return Ended(replies, problems, seconds, status, gave_up)


def judge_end(server: VllmServer, status: int | None, processes: list[psutil.Process]) -> list[str]:
    """The server has ended and left nothing behind."""
    if status is None:
        state = "says that it is healthy" if _is_healthy(server) else "is not healthy"
        return [f"the server goes on after {END_SECONDS:.0f} s and {state}"]
    left = survivors(processes, _REAP_SECONDS)
    problems = [f"process {process.pid} outlives the server" for process in left]
    if not is_port_free(server.port):
        problems.append(f"port {server.port} is still taken")
    return problems


def _is_healthy(server: VllmServer) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5.0).is_success
    except httpx.HTTPError:
        return False
