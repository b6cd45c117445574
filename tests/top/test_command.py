"""The command against a server in this process that repeats what one of ours said."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from signals import HEEDED

from vllm_tailorkv import cli
from vllm_tailorkv.top import command
from vllm_tailorkv.top.history import History
from vllm_tailorkv.top.report import make_report
from vllm_tailorkv.top.screen import screen

RECORDED = Path(__file__).parent / "recorded"
BEFORE, AFTER = ((RECORDED / f"{name}.txt").read_text() for name in ("before", "after"))
WITHOUT_OURS = "\n".join(line for line in AFTER.splitlines() if "tailorkv" not in line)

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that says each text in turn, then the last; None: status 503."""
    servers = []

    def start(*texts: str | None) -> str:
        left = list(texts)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/metrics"
                text = left.pop(0) if len(left) > 1 else left[0]
                if text is None:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_one_screen(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", serve(BEFORE, AFTER), "--once", "--interval", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "smollm2-135m" in text
    assert "1 dense layers at 2 bit, 29 sparse by onebit" in text
    assert "2 running, 0 waiting" in text
    assert "34 of 348 (9.8%)" in text
    assert "largest error since the start: 0.256, layer 0 (dense)" in text


@pytest.mark.parametrize("suffix", ["", "/", "/metrics", "/v1"])
def test_one_line_of_json(serve: Serve, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    url = serve(BEFORE, AFTER).removeprefix("http://") + suffix
    assert cli.main(["top", url, "--once", "--json", "--interval", "0.1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert figures["traffic"]["tiers"]["host"]["blocks_used"] == 34
    assert figures["plan"]["index"] == "onebit"
    assert figures["ever"]["first_token"]["count"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "status 503"),
        (WITHOUT_OURS, "serves without tailorkv; start it with --attention-backend tailorkv"),
        ("# nothing\n", "no metrics of vLLM's"),
        ("<html><body>hello</body></html>", "tells no metrics"),
    ],
)
def test_a_server_that_is_not_ours(
    serve: Serve, capsys: pytest.CaptureFixture[str], text: str | None, words: str
) -> None:
    assert cli.main(["top", serve(text)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("vllm-tailorkv: error: ") and words in line


@pytest.mark.parametrize("url", ["http://", "ftp://localhost", "http://[::1"])
def test_no_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", url]) == 1
    assert "is no URL" in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", unused_url()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no server answers at" in line


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_intervals(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["top", "--interval", seconds])
    assert caught.value.code == 2
    assert "--interval must be at least" in capsys.readouterr().err


def test_a_server_may_go_and_come_back(serve: Serve) -> None:
    """Its figures go on without those from before."""
    url = serve(BEFORE, AFTER, None, BEFORE, AFTER)
    program = [*HEEDED, sys.executable, "-m", "vllm_tailorkv.cli", "top", url]
    program += ["--interval", "0.1", "--json"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(2)
        assert process.wait(120) == 0
    assert lines[0]["traffic"]["running"] == 2
    assert "status 503" in lines[1]["error"]
    assert lines[2]["traffic"]["generated_tokens"] > 0


def test_who_reads_may_go(serve: Serve) -> None:
    program = f"{sys.executable} -m vllm_tailorkv.cli top {serve(BEFORE, AFTER)} --json"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} --interval 0.1 | head -1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stderr == ""
    assert result.returncode == 0
    assert json.loads(result.stdout)["traffic"]["running"] == 2


def test_proxies_are_not_asked_for_this_machine(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, unused_url())
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["top", serve(BEFORE, AFTER), "--once", "--interval", "0.1"]) == 0
    assert "2 running" in capsys.readouterr().out


def test_the_screen_fits_a_small_terminal(history: History) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(screen(make_report(history)))
    lines = console.export_text().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "a step     3,658 tokens in context, a sparse layer chooses 448 (12.2%)" in (
        line.rstrip() for line in lines
    )


def test_a_terminal_is_redrawn(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []

    class Terminal(command.Live):
        def update(self, *arguments: object, **named: object) -> None:
            drawn.append(arguments)
            if len(drawn) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(command, "Live", Terminal)
    monkeypatch.setattr(command, "Console", lambda: Console(force_terminal=True))
    assert cli.main(["top", serve(BEFORE, AFTER, None), "--interval", "0.1"]) == 0
    assert len(drawn) == 2
    assert os.linesep not in capsys.readouterr().err
