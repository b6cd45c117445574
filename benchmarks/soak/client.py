"""Streams of a server under test: read to the end, left in the middle, or torn down."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

FINISHED, LEFT, REFUSED, FAILED, HUNG = "finished", "left", "refused", "failed", "hung"
_CLIENT_ERRORS = range(400, 500)
# Close with RST rather than FIN, as when the network or the machine of a client goes.
_ABORTIVE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Args:
        tokens: of the prompt.
        max_tokens: of the answer, which has exactly so many.
        name: of the reference answer that it is compared with; None if there is none.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    name: str | None = None

    def body(self, model: str) -> dict[str, Any]:
        """Greedy, and without a seed, which on a chunked prompt ends vLLM's engine."""
        return {
            "model": model,
            "prompt": list(self.tokens),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 2,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }


@dataclass
class Reply:
    """How a request ended, and what came of it.

    Args:
        logprobs: of the tokens that were chosen.
        gaps: between the logprobs of the best token and the next one.
    """

    prompt: Prompt
    outcome: str = HUNG
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    detail: str = ""
    seconds: float = 0.0

    def take(self, choice: dict[str, Any]) -> None:
        """Add what one event of a stream brings."""
        self.tokens += choice["token_ids"]
        logprobs = choice["logprobs"]
        self.logprobs += logprobs["token_logprobs"]
        for best in logprobs["top_logprobs"]:
            first, second = sorted(best.values(), reverse=True)[:2]
            self.gaps.append(first - second)


class Client:
    """Asks one server, every request with a deadline.

    Args:
        url: root of the server.
        model: name that it serves.
        deadline: seconds after which a request counts as hung.
    """

    def __init__(self, url: str, model: str, deadline: float) -> None:
        self._url = url
        self._model = model
        self._deadline = deadline
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(base_url=url, timeout=None, limits=limits)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, prompt: Prompt, leave_after: int | None = None) -> Reply:
        """Stream an answer, up to its end or until so many tokens were read."""
        reply = Reply(prompt)
        return await self._timed(reply, self._stream(reply, leave_after))

    async def tear(self, prompt: Prompt, after: int) -> Reply:
        """Stream an answer over a bare socket and reset the connection after so many bytes."""
        reply = Reply(prompt)
        return await self._timed(reply, self._torn(reply, after))

    async def post(self, content: bytes, path: str = "/v1/completions") -> Reply:
        """Send any body; the reply has its status and text in `detail`."""
        reply = Reply(Prompt((), 0))
        return await self._timed(reply, self._posted(reply, content, path))

    async def _timed(self, reply: Reply, work: Any) -> Reply:
        start = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline):
                await work
        except TimeoutError:
            reply.outcome = HUNG
        except (httpx.HTTPError, OSError, asyncio.IncompleteReadError) as error:
            reply.outcome, reply.detail = FAILED, f"{type(error).__name__}: {error}"
        reply.seconds = time.monotonic() - start
        return reply

    async def _stream(self, reply: Reply, leave_after: int | None) -> None:
        body = reply.prompt.body(self._model)
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                _refused(reply, response)
                return
            async for event in _events(response):
                if "error" in event:
                    reply.outcome, reply.detail = FAILED, json.dumps(event["error"])
                    return
                for choice in event["choices"]:
                    reply.take(choice)
                if leave_after is not None and len(reply.tokens) >= leave_after:
                    reply.outcome = LEFT
                    return
        if len(reply.tokens) == reply.prompt.max_tokens:
            reply.outcome = FINISHED
        else:
            reply.outcome = FAILED
            reply.detail = f"{len(reply.tokens)} of {reply.prompt.max_tokens} tokens came"

    async def _torn(self, reply: Reply, after: int) -> None:
        url = httpx.URL(self._url)
        content = json.dumps(reply.prompt.body(self._model)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(url.host, url.port)
        try:
            writer.write(head.encode() + content)
            await writer.drain()
            if after:
                await reader.readexactly(after)
            reply.outcome = LEFT
        finally:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
            writer.transport.abort()

    async def _posted(self, reply: Reply, content: bytes, path: str) -> None:
        headers = {"Content-Type": "application/json"}
        response = await self._http.post(path, content=content, headers=headers)
        _refused(reply, response)


def _refused(reply: Reply, response: httpx.Response) -> None:
    reply.detail = f"{response.status_code} {response.text}"
    if response.status_code in _CLIENT_ERRORS:
        reply.outcome = REFUSED
    else:
        reply.outcome = FINISHED if response.is_success else FAILED


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, without the last, which says that it is done."""
    # By bytes: httpx ends lines at characters too that JSON has within strings, as U+0085.
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                yield event
