"""The demo with a real chat model: its questions, how they are asked, what counts as lost."""

import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from vllm_tailorkv.demo import __main__ as demo
from vllm_tailorkv.demo import report
from vllm_tailorkv.demo.checkpoint import read_checkpoint
from vllm_tailorkv.demo.client import Measurement, Reply, measure_chat
from vllm_tailorkv.demo.phase import Phase
from vllm_tailorkv.demo.questions import (
    LongText,
    PlacedQuestion,
    Question,
    build_text,
    make_questions,
)
from vllm_tailorkv.demo.server import ServerError, ServerOptions, VllmServer
from vllm_tailorkv.demo.text import train_tokenizer

NUM_TOKENS = 4096
CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 2048,
}


@cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(2048)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture
def text(tokenizer: Tokenizer) -> LongText:
    return build_text(tokenizer, NUM_TOKENS, num_needles=6, seed=1)


def judged(text: LongText) -> list[PlacedQuestion]:
    return [placed for placed in text.questions if placed.question.is_judged]


def test_answers_stand_where_they_are_said_to(tokenizer: Tokenizer, text: LongText) -> None:
    encoding = tokenizer.encode(text.text)
    assert len(encoding.ids) == text.num_tokens <= NUM_TOKENS
    for placed in judged(text):
        assert placed.token_offset is not None
        start = encoding.offsets[placed.token_offset][0]
        assert text.text[start:].startswith(placed.question.passage)
        assert placed.question.find(placed.question.passage) is not None


def test_questions_are_spread_in_the_texts_order(text: LongText) -> None:
    offsets = [placed.token_offset or 0 for placed in judged(text)]
    assert offsets == sorted(offsets)
    assert offsets[0] < 0.1 * text.num_tokens
    assert offsets[-1] > 0.9 * text.num_tokens


def test_there_are_needles_facts_and_free_questions(text: LongText) -> None:
    needles = make_questions(6, seed=1)
    questions = [placed.question for placed in text.questions]
    assert all(needle in questions for needle in needles)
    facts = [question for question in questions if question.passage.startswith("# From Python's")]
    assert len(facts) >= 3
    free = [placed for placed in text.questions if not placed.question.is_judged]
    assert free
    assert all(placed.token_offset is None for placed in free)
    assert len(questions) == len(needles) + len(facts) + len(free)


def test_facts_leave_room_for_text(tokenizer: Tokenizer) -> None:
    short = build_text(tokenizer, 600, num_needles=2, seed=1)
    passages = sum(len(tokenizer.encode(placed.question.passage).ids) for placed in short.questions)
    assert passages < 300


def test_the_same_seed_gives_the_same_text(tokenizer: Tokenizer, text: LongText) -> None:
    assert build_text(tokenizer, NUM_TOKENS, num_needles=6, seed=1) == text
    assert build_text(tokenizer, NUM_TOKENS, num_needles=6, seed=2).text != text.text


def test_more_needles_than_subjects_all_differ() -> None:
    questions = make_questions(20, seed=0)
    assert len({question.prompt for question in questions}) == 20
    assert len({question.answers for question in questions}) == 20


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("The code is 117567.", True),
        ("117567", True),
        ("It is **117567**, I think", True),
        ("1117567", False),
        ("117567.5", False),
        ("2,117567", False),
        ("11756", False),
        ("", False),
        ("It is GEORG brandl.", True),
        ("Georg Brandlmann", False),
    ],
)
def test_replies_are_judged_by_whole_words_and_numbers(reply: str, right: bool) -> None:
    question = Question("q", "?", ("117567", "Georg Brandl"))
    assert (question.find(reply) is not None) == right


def test_a_free_question_has_no_right_answer() -> None:
    assert not Reply(PlacedQuestion(Question("q", "?"), None), "anything").is_right


class FakeVllm(VllmServer):
    """A server in this process that answers chat requests and keeps them."""

    def __init__(self, log: Path, reply: Callable[[str], str]) -> None:
        super().__init__(ServerOptions(log.parent, log, 1, 1))
        log.write_text("RuntimeError: out of order\n")
        self.requests: list[dict[str, Any]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append(request | {"path": self.path})
                try:
                    content = reply(request["messages"][-1]["content"])
                except ValueError:
                    self.send_error(500)
                    return
                self.send_response(200)
                kind = "text/event-stream" if request.get("stream") else "application/json"
                self.send_header("Content-Type", kind)
                self.end_headers()
                if request.get("stream"):
                    # What is timed is as long as it may be; of an answer each word is a token.
                    words = content.split(" ")
                    if request.get("ignore_eos"):
                        words = words[:1] * request["max_tokens"]
                    for number, word in enumerate(words):
                        delta = {"content": " " * bool(number) + word}
                        self.event(json.dumps({"choices": [{"index": 0, "delta": delta}]}))
                    self.event("[DONE]")
                else:
                    message = {"role": "assistant", "content": content}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    self.wfile.write(json.dumps({"choices": [choice]}).encode())

            def event(self, data: str) -> None:
                self.wfile.write(f"data: {data}\n\n".encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def check_alive(self) -> None:
        pass


@pytest.fixture
def fake_vllm(tmp_path: Path) -> Iterator[Callable[[Callable[[str], str]], FakeVllm]]:
    started = []

    def start(reply: Callable[[str], str]) -> FakeVllm:
        started.append(FakeVllm(tmp_path / "log", reply))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


PLACED = (
    PlacedQuestion(Question("gate", "What opens the gate?", ("1234",), "1234 opens it.\n"), 5),
    PlacedQuestion(Question("lamp", "What lights the lamp?", ("77",), "77 lights it.\n"), 9),
    PlacedQuestion(Question("free", "What is it about?"), None),
)
SHORT = LongText("A text.\n1234 opens it.\n77 lights it.\n", 14, PLACED)


def test_questions_go_through_the_chat_endpoint(
    fake_vllm: Callable[[Callable[[str], str]], FakeVllm],
) -> None:
    server = fake_vllm(lambda message: "It is 1234." if "gate?" in message else "I see 78.")
    measurement = measure_chat(server, SHORT, 20, 50, lambda _: None)

    assert [reply.placed for reply in measurement.answers] == list(PLACED)
    assert [reply.is_right for reply in measurement.answers] == [True, False, False]
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    # Every message begins with the text, which is read once; the first is nothing else.
    contents = [request["messages"] for request in server.requests]
    assert all(len(messages) == 1 and messages[0]["role"] == "user" for messages in contents)
    assert contents[0][0]["content"] == SHORT.text
    assert all(messages[0]["content"].startswith(SHORT.text) for messages in contents)
    asked = server.requests[1:4]
    for request, placed in zip(asked, PLACED, strict=True):
        assert request["messages"][0]["content"].endswith(placed.question.prompt)
    assert [request["max_tokens"] for request in asked] == [20, 20, 50]
    assert all(request["temperature"] == 0 for request in server.requests)
    assert measurement.seconds_per_token > 0


def test_answers_are_shown_as_they_come(
    fake_vllm: Callable[[Callable[[str], str]], FakeVllm],
) -> None:
    server = fake_vllm(lambda message: "It is 1234." if "gate?" in message else "I see 78.")
    shown: list[tuple[str, str, bool]] = []

    def on_answer(title: str, text: str, tokens_a_second: float | None) -> None:
        shown.append((title, text, tokens_a_second is not None))

    streamed = measure_chat(server, SHORT, 20, 50, lambda _: None, on_answer)
    assert shown[:4] == [
        ("gate", "It", False),
        ("gate", "It is", False),
        ("gate", "It is 1234.", False),
        ("gate", "It is 1234.", True),
    ]
    assert [title for title, _, done in shown if done] == ["gate", "lamp", "free"]
    asked = [request for request in server.requests if "ignore_eos" not in request]
    assert [request["max_tokens"] for request in asked] == [1, 20, 20, 50]
    as_a_whole = measure_chat(server, SHORT, 20, 50, lambda _: None)
    assert streamed.answers == as_a_whole.answers


@pytest.mark.parametrize("terminal", [True, False])
def test_only_who_watches_sees_answers_come(
    terminal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_vllm: Callable[[Callable[[str], str]], FakeVllm],
) -> None:
    server = fake_vllm(lambda message: "It is 1234.")
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)

    def measured(
        options: object,
        console: Console,
        served: object,
        backend: str | None,
        ask: Callable[[VllmServer, Phase], Measurement[Reply]],
    ) -> tuple[Measurement[Reply], None, Path]:
        log = tmp_path / str(backend)
        log.touch()
        with Phase(console, f"Asking {backend}") as phase:
            return ask(server, phase), None, log

    monkeypatch.setattr(demo, "_serve_and_measure", measured)
    monkeypatch.setattr(demo, "build_text", lambda *_: SHORT)
    options = demo._parse(["--model", os.fspath(chat_model(tmp_path / "model"))])
    assert demo._run(options, console) == demo.ALL_RIGHT
    answers = [request for request in server.requests if "ignore_eos" not in request]
    assert [bool(request.get("stream")) for request in answers] == [
        False,
        *([terminal] * len(PLACED)),
    ] * 2
    lines = [line for line in written.getvalue().splitlines() if "tokens/s)" in line]
    assert len(lines) == (2 * len(PLACED) if terminal else 0)


def test_a_failed_request_is_the_servers_error(
    fake_vllm: Callable[[Callable[[str], str]], FakeVllm],
) -> None:
    def reply(message: str) -> str:
        raise ValueError(message)

    with pytest.raises(ServerError, match="a request failed") as caught:
        measure_chat(fake_vllm(reply), SHORT, 20, 50, lambda _: None)
    assert caught.value.log_lines == ("RuntimeError: out of order",)


def replies(*texts: str) -> Measurement[Reply]:
    return Measurement(tuple(map(Reply, PLACED, texts)), 1.0, 0.1)


BOTH = replies("1234", "77", "a gate")
NO_LAMP = replies("1234", "none", "a lamp")
NOTHING = replies("no", "no", "a gate")


def test_only_what_the_other_backend_found_can_be_lost() -> None:
    assert report.lost(NO_LAMP, BOTH) == ["lamp"]
    assert report.lost(BOTH, NO_LAMP) == []
    assert report.lost(NOTHING, NOTHING) == []


def chat_model(folder: Path, **changes: object) -> Path:
    """A folder that looks like a chat model to the demo."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"12345")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [
        (BOTH, BOTH, demo.ALL_RIGHT),
        (NO_LAMP, NO_LAMP, demo.ALL_RIGHT),
        (BOTH, NO_LAMP, demo.ALL_RIGHT),
        (NO_LAMP, BOTH, demo.SOME_WRONG),
        (NOTHING, NOTHING, demo.FAILED),
    ],
)
def test_exit_status(
    ours: Measurement[Reply],
    theirs: Measurement[Reply],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(
        options: object, console: object, served: demo._Served, backend: str | None, ask: object
    ) -> tuple[Measurement[Reply], None, Path]:
        log = tmp_path / str(backend)
        log.touch()
        assert served.max_model_len <= CONFIG["max_position_embeddings"]
        return (ours if backend else theirs), None, log

    monkeypatch.setattr(demo, "_serve_and_measure", measured)
    results = tmp_path / "results.json"
    arguments = ["--model", os.fspath(chat_model(tmp_path / "model")), "--json", str(results)]
    assert demo.main([*arguments, "--needles", "2"]) == status
    told = capsys.readouterr()
    assert ("nothing right with vLLM's own backend" in told.err) == (status == demo.FAILED)
    written = json.loads(results.read_text())
    assert written["lost"] == (["lamp"] if status == demo.SOME_WRONG else [])
    assert written["vllm"]["right"] == sum(reply.is_right for reply in theirs.answers)


def test_report_shows_both_replies_and_what_was_lost() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    long = replies(f"{'well ' * 50}it is 1234 {'or so ' * 50}", "none", "a long story")
    report.print_chat_report(console, SHORT, None, long, BOTH)
    printed = console.export_text()
    # The answer is shown wherever it stands in a long reply.
    row = next(line for line in printed.splitlines() if "gate" in line)
    assert "it is 1234" in row
    assert "What is it about?" in printed
    assert "a long story" in printed
    assert "tailorkv 1 of 2, vLLM's own backend 2 of 2" in printed
    assert "Lost by tailorkv: lamp" in printed


def test_checkpoint(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(chat_model(tmp_path))
    assert checkpoint.context == 2048
    # K and V, three layers, two KV heads of 16 values, two bytes each.
    assert checkpoint.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2
    assert checkpoint.weight_bytes == 5
    (tmp_path / "config.json").write_text(json.dumps({"text_config": CONFIG | {"head_dim": 32}}))
    wider = read_checkpoint(tmp_path)
    assert wider == replace(checkpoint, kv_bytes_per_token=2 * checkpoint.kv_bytes_per_token)


def spoil_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "name the folder of a checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "does not tell"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (spoil_template, "has no chat template; name a chat model"),
    ],
)
def test_a_folder_that_is_no_chat_model(
    spoil: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(chat_model(tmp_path))
    with pytest.raises(SystemExit) as caught:
        demo.main(["--model", os.fspath(tmp_path)])
    assert caught.value.code == demo.FAILED
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_template_may_stand_in_the_tokenizers_config(tmp_path: Path) -> None:
    folder = chat_model(tmp_path)
    spoil_template(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert read_checkpoint(folder).context == 2048


@pytest.mark.parametrize(
    ("context", "tokens"), [(2048, 1536), (8192, 6144), (32768, 16384), (131072, 16384)]
)
def test_the_default_length_fits_the_model(tmp_path: Path, context: int, tokens: int) -> None:
    model = chat_model(tmp_path, max_position_embeddings=context)
    options = demo._parse(["--model", os.fspath(model)])
    assert options.tokens == tokens
    assert options.tokens + options.slack <= context


def test_a_text_longer_than_the_models_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chat_model(tmp_path)
    with pytest.raises(SystemExit):
        demo.main(["--model", os.fspath(model), "--tokens", "2000"])
    assert "--tokens must be from 1 to 1696, is 2000" in capsys.readouterr().err
