"""The soak's client ends every request, and says how."""

import asyncio
import json
from collections.abc import Awaitable, Callable

from soak.client import FAILED, FINISHED, HUNG, LEFT, REFUSED, Client, Prompt, Reply

PROMPT = Prompt((5, 6), 2)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def event(token: int) -> bytes:
    logprobs = {"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0, "b": -1.5}]}
    # Within a line of JSON, though Unicode has it for the end of one.
    choice = {"token_ids": [token], "logprobs": logprobs, "text": "\u2028"}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


def answer(body: bytes, status: str = "200 OK", pause: float = 0) -> Handler:
    """A server that answers once with these bytes, and closes the connection after a pause."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        await asyncio.sleep(pause)
        writer.close()

    return handle


def ask(
    handler: Handler, work: Callable[[Client], Awaitable[Reply]], deadline: float = 20
) -> Reply:
    async def run() -> Reply:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Client(url, "demo", deadline) as client:
            reply = await work(client)
        server.close()
        return reply

    return asyncio.run(run())


def test_a_whole_answer() -> None:
    body = event(7) + event(8) + b"data: [DONE]\n\n"
    reply = ask(answer(body), lambda client: client.ask(PROMPT))
    assert (reply.outcome, reply.tokens) == (FINISHED, [7, 8])
    assert (reply.logprobs, reply.gaps) == ([-1.0, -1.0], [0.5, 0.5])


def test_an_answer_that_ends_early_has_failed() -> None:
    reply = ask(answer(event(7)), lambda client: client.ask(PROMPT))
    assert (reply.outcome, reply.detail) == (FAILED, "1 of 2 tokens came")


def test_an_error_within_a_stream_has_failed() -> None:
    body = b'data: {"error": {"message": "engine dead"}}\n\n'
    reply = ask(answer(body), lambda client: client.ask(PROMPT))
    assert reply.outcome == FAILED
    assert "engine dead" in reply.detail


def test_a_client_that_leaves() -> None:
    reply = ask(answer(event(7), pause=1), lambda client: client.ask(PROMPT, leave_after=1))
    assert (reply.outcome, reply.tokens) == (LEFT, [7])
    reply = ask(answer(event(7), pause=1), lambda client: client.tear(PROMPT, 20))
    assert reply.outcome == LEFT


def test_refusals_and_failures() -> None:
    refused = ask(answer(b"no", "400 Bad Request"), lambda client: client.post(b"{"))
    assert (refused.outcome, refused.detail) == (REFUSED, "400 no")
    failed = ask(answer(b"oh", "500 Error"), lambda client: client.ask(PROMPT))
    assert (failed.outcome, failed.detail) == (FAILED, "500 oh")


def test_a_hang() -> None:
    reply = ask(answer(event(7), pause=1), lambda client: client.ask(PROMPT), deadline=0.2)
    assert reply.outcome == HUNG
