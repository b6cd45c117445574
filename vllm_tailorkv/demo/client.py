"""Questions to a server, through the official OpenAI client, and how long it takes to answer."""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import openai

from vllm_tailorkv.demo.questions import LongText, PlacedQuestion
from vllm_tailorkv.demo.server import MODEL_NAME, VllmServer
from vllm_tailorkv.demo.text import Haystack, PlacedNeedle

_POLL_SECONDS = 1.0
# A prefill of 128k tokens takes a quarter of an hour on two cores.
_REQUEST_TIMEOUT_SECONDS = 7200.0
_TIMED_TOKENS = 32
_TIMED_STREAMS = 5

OnWait = Callable[[str], None]
"""Called every second or so of a wait, with what there is to say."""

OnAnswer = Callable[[str, str, float | None], None]
"""Called with every piece of an answer: the question's title, the answer so far and, once it is
complete, its tokens a second."""


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
class Reply:
    """What a chat model wrote to a question."""

    placed: PlacedQuestion
    text: str

    @property
    def is_right(self) -> bool:
        """Whether it has the right answer; False for a question that has none."""
        return self.placed.question.find(self.text) is not None


AnswerT = TypeVar("AnswerT", Answer, Reply)


@dataclass(frozen=True)
class Measurement(Generic[AnswerT]):
    """One backend's answers, and its times in seconds.

    `seconds_per_token` is the median over several streams that continue the whole haystack.
    """

    answers: tuple[AnswerT, ...]
    prefill_seconds: float
    seconds_per_token: float


class _Asker(Protocol):
    """A way to have a prompt continued, greedily."""

    def complete(self, prompt: str, max_tokens: int) -> str: ...

    def answer(self, title: str, prompt: str, max_tokens: int) -> str:
        """The same, shown while it comes where somebody watches."""
        ...

    def stream(self, prompt: str, num_tokens: int) -> Iterable[object]:
        """Events while exactly `num_tokens` tokens arrive; the first with the first of them."""
        ...


def measure(
    server: VllmServer, haystack: Haystack, max_tokens: int, on_wait: OnWait
) -> Measurement[Answer]:
    """Ask `server` for every needle in `haystack`, at most `max_tokens` tokens an answer.

    A first request fills the prefix cache, so that the questions do not pay for the haystack.

    Raises:
        ServerError: the server died, or a request failed.
    """
    asked = [
        (placed.needle.name, haystack.text + placed.needle.question, max_tokens)
        for placed in haystack.needles
    ]
    with _client(server) as client:
        asker = _Completions(client)
        texts, *times = _measure(asker, server, haystack.text, haystack.num_tokens, asked, on_wait)
    return Measurement(tuple(map(Answer, haystack.needles, texts)), *times)


def measure_chat(
    server: VllmServer,
    text: LongText,
    max_tokens: int,
    free_tokens: int,
    on_wait: OnWait,
    on_answer: OnAnswer | None = None,
) -> Measurement[Reply]:
    """Ask `server` every question on `text` through its chat endpoint.

    Args:
        server: it serves a chat model.
        text: what every message begins with; a first request fills the prefix cache with it.
        max_tokens: longest reply to a question with a right answer.
        free_tokens: longest reply to any other.
        on_wait: called now and then.
        on_answer: called as answers come; None to have each as a whole.

    Raises:
        ServerError: the server died, or a request failed.
    """
    asked = [
        (
            placed.question.title,
            text.message(placed.question),
            max_tokens if placed.question.is_judged else free_tokens,
        )
        for placed in text.questions
    ]
    with _client(server) as client:
        asker = _Chat(client, on_answer)
        texts, *times = _measure(asker, server, text.text, text.num_tokens, asked, on_wait)
    return Measurement(tuple(map(Reply, text.questions, texts)), *times)


@contextlib.contextmanager
def _client(server: VllmServer) -> Iterator[openai.OpenAI]:
    """A client of `server`, whose errors are the server's."""
    client = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        timeout=_REQUEST_TIMEOUT_SECONDS,
        max_retries=0,
        # No proxy knows of a port of this machine's own.
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    try:
        yield client
    except openai.OpenAIError as error:
        raise server.error(f"a request failed: {error}") from error


def _measure(
    asker: _Asker,
    server: VllmServer,
    text: str,
    num_tokens: int,
    asked: Sequence[tuple[str, str, int]],
    on_wait: OnWait,
) -> tuple[list[str], float, float]:
    """The answers to (title, prompt, longest answer) in `asked`; the times of a Measurement."""
    start = time.monotonic()
    request = _in_background(lambda: asker.complete(text, 1))
    while not request.done():
        server.check_alive()
        on_wait(_prefill_progress(server, num_tokens))
        try:
            request.exception(timeout=_POLL_SECONDS)
        except TimeoutError:
            continue
    request.result()
    prefill_seconds = time.monotonic() - start

    answers = []
    for number, (title, prompt, max_tokens) in enumerate(asked, 1):
        on_wait(f"question {number} of {len(asked)}: {title}")
        answers.append(asker.answer(title, prompt, max_tokens))

    seconds = []
    for number in range(1, _TIMED_STREAMS + 1):
        on_wait(f"timing stream {number} of {_TIMED_STREAMS}, {_TIMED_TOKENS} tokens")
        seconds.append(_seconds_per_token(asker, text))
    return answers, prefill_seconds, statistics.median(seconds)


def _prefill_progress(server: VllmServer, num_tokens: int) -> str:
    tokens = server.cached_tokens()
    if tokens is None:
        return server.last_log_line()
    return f"{min(tokens, num_tokens):,} of {num_tokens:,} tokens read"


@dataclass(frozen=True)
class _Completions:
    """The text itself is continued."""

    client: openai.OpenAI

    def complete(self, prompt: str, max_tokens: int) -> str:
        response = self.client.completions.create(
            model=MODEL_NAME, prompt=prompt, max_tokens=max_tokens, temperature=0.0
        )
        return response.choices[0].text

    def answer(self, title: str, prompt: str, max_tokens: int) -> str:
        return self.complete(prompt, max_tokens)

    def stream(self, prompt: str, num_tokens: int) -> Iterable[object]:
        return self.client.completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )


@dataclass(frozen=True)
class _Chat:
    """The prompt is a user's message, in the model's own chat template."""

    client: openai.OpenAI
    on_answer: OnAnswer | None

    def complete(self, prompt: str, max_tokens: int) -> str:
        response = self.client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0.0,
        )
        return response.choices[0].message.content or ""

    def answer(self, title: str, prompt: str, max_tokens: int) -> str:
        if self.on_answer is None:
            return self.complete(prompt, max_tokens)
        text, times = "", []
        for event in self.client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=max_tokens,
            temperature=0.0,
            stream=True,
        ):
            times.append(time.monotonic())
            text += event.choices[0].delta.content or ""
            self.on_answer(title, text, None)
        seconds = times[-1] - times[0] if times else 0.0
        self.on_answer(title, text, (len(times) - 1) / seconds if seconds else 0.0)
        return text

    def stream(self, prompt: str, num_tokens: int) -> Iterable[object]:
        return self.client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=num_tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )


def _seconds_per_token(asker: _Asker, prompt: str) -> float:
    """Seconds between two tokens of a streamed completion, the first token not counted.

    The mean of a stream: when the processor is busy, tokens arrive several at a time, and the
    single intervals say little.
    """
    times = [time.monotonic() for _ in asker.stream(prompt, _TIMED_TOKENS + 1)]
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
