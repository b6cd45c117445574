"""Questions to a server, through the official OpenAI client, and how long it takes to answer."""

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass

import openai

from vllm_tailorkv.demo.server import MODEL_NAME, VllmServer
from vllm_tailorkv.demo.text import Haystack, PlacedNeedle

_POLL_SECONDS = 1.0
# A prefill of 128k tokens takes a quarter of an hour on two cores.
_REQUEST_TIMEOUT_SECONDS = 7200.0
_TIMED_TOKENS = 32
_TIMED_STREAMS = 5

OnWait = Callable[[str], None]
"""Called every second or so of a wait, with what there is to say."""


@dataclass(frozen=True)
class Answer:
    """What a backend wrote after the question for one needle."""

    placed: PlacedNeedle
    completion: str

    @property
    def is_right(self) -> bool:
        """Whether it is the needle's number."""
        return self.placed.needle.is_answered_by(self.completion)


@dataclass(frozen=True)
class Measurement:
    """One backend's answers, and its times in seconds.

    `seconds_per_token` is the median over several streams that continue the whole haystack.
    """

    answers: tuple[Answer, ...]
    prefill_seconds: float
    seconds_per_token: float


def measure(
    server: VllmServer, haystack: Haystack, max_tokens: int, on_wait: OnWait
) -> Measurement:
    """Ask `server` for every needle in `haystack`, at most `max_tokens` tokens an answer.

    A first request fills the prefix cache, so that the questions do not pay for the haystack.

    Raises:
        ServerError: the server died, or a request failed.
    """
    client = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        timeout=_REQUEST_TIMEOUT_SECONDS,
        max_retries=0,
    )
    try:
        return _measure(client, server, haystack, max_tokens, on_wait)
    except openai.OpenAIError as error:
        raise server.error(f"a request failed: {error}") from error


def _measure(
    client: openai.OpenAI,
    server: VllmServer,
    haystack: Haystack,
    max_tokens: int,
    on_wait: OnWait,
) -> Measurement:
    start = time.monotonic()
    request = _in_background(lambda: _complete(client, haystack.text, 1))
    while not request.done():
        server.check_alive()
        on_wait(_prefill_progress(server, haystack.num_tokens))
        try:
            request.exception(timeout=_POLL_SECONDS)
        except TimeoutError:
            continue
    request.result()
    prefill_seconds = time.monotonic() - start

    answers = []
    for number, placed in enumerate(haystack.needles, 1):
        on_wait(f"question {number} of {len(haystack.needles)}: {placed.needle.name}")
        prompt = haystack.text + placed.needle.question
        answers.append(Answer(placed, _complete(client, prompt, max_tokens)))

    seconds = []
    for number in range(1, _TIMED_STREAMS + 1):
        on_wait(f"timing stream {number} of {_TIMED_STREAMS}, {_TIMED_TOKENS} tokens")
        seconds.append(_seconds_per_token(client, haystack.text))
    return Measurement(tuple(answers), prefill_seconds, statistics.median(seconds))


def _prefill_progress(server: VllmServer, num_tokens: int) -> str:
    tokens = server.cached_tokens()
    if tokens is None:
        return server.last_log_line()
    return f"{min(tokens, num_tokens):,} of {num_tokens:,} tokens read"


def _complete(client: openai.OpenAI, prompt: str, max_tokens: int) -> str:
    response = client.completions.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=max_tokens, temperature=0.0
    )
    return response.choices[0].text


def _seconds_per_token(client: openai.OpenAI, prompt: str) -> float:
    """Seconds between two tokens of a streamed completion, the first token not counted.

    The mean of a stream: when the processor is busy, tokens arrive several at a time, and the
    single intervals say little.
    """
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=_TIMED_TOKENS + 1,
        temperature=0.0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    times = [time.monotonic() for _ in stream]
    return (times[-1] - times[0]) / _TIMED_TOKENS


def _in_background(function: Callable[[], str]) -> Future[str]:
    """Run `function` in a thread that does not keep the program from ending."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
