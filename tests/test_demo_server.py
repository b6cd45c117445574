"""The demo's server is watched and stopped, whatever its state."""

import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from signals import HEEDED

from vllm_tailorkv.demo import __main__ as demo
from vllm_tailorkv.demo import server as demo_server
from vllm_tailorkv.demo.client import Answer
from vllm_tailorkv.demo.server import ServerError, ServerOptions, VllmServer
from vllm_tailorkv.demo.text import Needle, PlacedNeedle

PLAN = {
    "dense_layers": [0, 1],
    "sparse_layers": [2, 3],
    "num_kv_heads": 2,
    "head_size": 128,
    "placement": "joint",
    "host_bytes_per_token": 6144,
    "derived_bytes_per_token": 352.0,
    "full_bytes_per_token": 6144,
    "num_blocks": 10,
    "block_size": 128,
    "budget_tokens": 192,
    "bits": 2,
    "index": "channels",
    "critical_channels": 8,
}


def fake_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> VllmServer:
    """A server that runs a Python script in place of vLLM."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    monkeypatch.setattr(demo_server, "_command", lambda *_: command)
    options = ServerOptions(
        model=tmp_path, log=tmp_path / "logs" / "fake.log", max_model_len=1, cache_gib=1
    )
    return VllmServer(options)


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_lines(log: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 120
    while len(lines := log.read_text().split()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return lines


METRICS = """\
# HELP tailorkv_plan_info The plan of TailorKV.
# TYPE tailorkv_plan_info gauge
tailorkv_plan_info{%s} 1.0
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="10"} 1.0
# HELP vllm:kv_cache_usage_perc KV-cache usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.5
"""


def serve_metrics(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(demo_server.httpx, "get", lambda *_, **__: httpx.Response(200, text=text))


def labels_of(plan: dict[str, object]) -> str:
    """As the metric has them; the sizes of the cache are vLLM's to tell."""
    listed = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in plan.items()
        if name not in ("num_blocks", "block_size")
    }
    return ",".join(f'{name}="{value}"' for name, value in listed.items())


def test_plan_of_the_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = fake_server(monkeypatch, tmp_path, "")
    serve_metrics(monkeypatch, METRICS % labels_of(PLAN))
    plan = server.plan()
    assert plan is not None
    assert plan.model_dump() == PLAN
    assert plan.num_tokens == 9 * 128
    assert server.cached_tokens() == 640
    serve_metrics(monkeypatch, METRICS % labels_of(PLAN | {"dense_layers": []}))
    plan = server.plan()
    assert plan is not None and plan.dense_layers == []


@pytest.mark.parametrize("text", ["", METRICS % 'bits="2"'])
def test_no_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    server = fake_server(monkeypatch, tmp_path, "")
    serve_metrics(monkeypatch, text)
    assert server.plan() is None


def test_failed_start_names_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = fake_server(
        monkeypatch,
        tmp_path,
        """
        print("(EngineCore pid=7) ERROR 11-21 02:19:53 [core.py:1] ValueError: no such plan")
        print("(APIServer pid=6) RuntimeError: Engine core initialization failed. See above.")
        print("nanobind: leaked 3 instances!")
        raise SystemExit(3)
        """,
    )
    with pytest.raises(ServerError, match="exit status 3") as caught, server:
        server.wait_until_healthy(lambda _: None, timeout=120)
    assert caught.value.log_lines == ("ValueError: no such plan",)
    assert caught.value.log == server.log


def test_refused_options_are_the_cause_however_vllm_warns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = """
        print("(APIServer pid=6) WARNING 11-21 02:19:53 [cpu.py:9] Errors may follow")
        print("vllm-tailorkv: error: bits=3: Input should be 1, 2 or 4")
        raise SystemExit(1)
        """
    server = fake_server(monkeypatch, tmp_path, script)
    with pytest.raises(ServerError) as caught, server:
        server.wait_until_healthy(lambda _: None, timeout=120)
    assert caught.value.log_lines == ("vllm-tailorkv: error: bits=3: Input should be 1, 2 or 4",)


def test_an_end_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = fake_server(monkeypatch, tmp_path, "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="not started"):
        server.wait(0)
    with server:
        assert server.wait(0) is None
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(120) == -signal.SIGKILL


def test_dtype_and_further_arguments(tmp_path: Path) -> None:
    options = ServerOptions(
        model=tmp_path, log=tmp_path / "log", max_model_len=1, cache_gib=1, dtype="float32"
    )
    command = demo_server._command(replace(options, arguments=("--max-num-seqs", "3")), 1, "it")
    assert "--dtype float32" in " ".join(command)
    assert " ".join(command).endswith("--max-num-seqs 3")


def test_slow_start_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = fake_server(monkeypatch, tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ServerError, match="not ready after 0 s"), server:
        server.wait_until_healthy(lambda _: None, timeout=0)


def test_stop_ends_children_and_a_server_that_ignores_sigterm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_server, "_STOP_GRACE_SECONDS", 0.2)
    server = fake_server(
        monkeypatch,
        tmp_path,
        """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(os.getpid(), child.pid, flush=True)
        time.sleep(60)
        """,
    )
    with pytest.raises(KeyboardInterrupt), server:
        pids = [int(pid) for pid in wait_for_lines(server.log, 2)]
        assert all(map(is_running, pids))
        raise KeyboardInterrupt
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def demo_program(folder: Path) -> list[str]:
    """A demo whose server is a script that starts another one, as vLLM does."""
    program = f"""
import sys
from vllm_tailorkv.demo import __main__ as demo, server
child = "import time; time.sleep(60)"
script = f"import os, subprocess, sys, time; child = [sys.executable, '-c', {{child!r}}];"
script += "print(os.getpid(), subprocess.Popen(child).pid, flush=True); time.sleep(60)"
server._command = lambda *_: [sys.executable, "-c", script]
sys.exit(demo.main(["--tokens", "1024", "--needles", "1", "--cache-dir", {str(folder)!r}]))
"""
    return [sys.executable, "-c", program]


def servers_of(folder: Path, demo_pid: int) -> list[int]:
    """The processes that it has started."""
    log = folder / "logs" / f"tailorkv-{demo_pid}.log"
    deadline = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [int(pid) for pid in wait_for_lines(log, 2)]


def assert_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_demo_stops_the_server(tmp_path: Path, number: signal.Signals) -> None:
    program = [*HEEDED, *demo_program(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL) as process:
        pids = servers_of(tmp_path, process.pid)
        assert all(map(is_running, pids))
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert_ended(pids)


def test_a_closed_terminal_stops_the_server(tmp_path: Path) -> None:
    terminal, inside = pty.openpty()
    # In a session of its own, the terminal is the one that it is controlled by.
    process = subprocess.Popen(
        [*HEEDED, sys.executable, "-c", CONTROLLED, *demo_program(tmp_path)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    pids = servers_of(tmp_path, process.pid)
    os.close(terminal)
    assert process.wait(30) != 0
    assert_ended(pids)


CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_nohup_is_respected(tmp_path: Path) -> None:
    with subprocess.Popen(
        ["nohup", *demo_program(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        pids = servers_of(tmp_path, process.pid)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.terminate()
        assert process.wait(30) == 128 + 15
    assert_ended(pids)


WEB_SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        models = {{"data": [{{"id": name}} for name in {names!r}]}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(models).encode())
HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def web_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: Callable[[str], list[str]]
) -> VllmServer:
    """A server that answers everything, `/v1/models` with names that it makes of its own."""
    server = fake_server(monkeypatch, tmp_path, "")
    script = WEB_SERVER.format(names=names(server._name), port=server.port)
    monkeypatch.setattr(demo_server, "_command", lambda *_: [sys.executable, "-c", script])
    return server


def test_the_server_is_known_by_its_name_behind_a_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with web_server(monkeypatch, tmp_path, lambda name: [demo_server.MODEL_NAME, name]) as server:
        server.wait_until_healthy(lambda _: None, timeout=120)


def test_another_server_at_the_port_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another demo's, for instance, which serves a model of the same name."""
    server = web_server(monkeypatch, tmp_path, lambda name: [demo_server.MODEL_NAME, "demo-other"])
    waits = []

    def on_wait(news: str) -> None:
        if server._get("/health") is not None:
            waits.append(news)

    with pytest.raises(ServerError, match="not ready"), server:
        server.wait_until_healthy(on_wait, timeout=3)
    assert waits, "it did answer"


def test_the_port_of_another_program_ends_in_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = fake_server(monkeypatch, tmp_path, "")
        script = WEB_SERVER.format(names=[server._name], port=taken.getsockname()[1])
        monkeypatch.setattr(demo_server, "_command", lambda *_: [sys.executable, "-c", script])
        with pytest.raises(ServerError, match="exit status 1") as caught, server:
            server.wait_until_healthy(lambda _: None, timeout=120)
    assert caught.value.log_lines == ("OSError: [Errno 98] Address already in use",)


def test_two_servers_have_two_names(tmp_path: Path) -> None:
    options = ServerOptions(model=tmp_path, log=tmp_path / "log", max_model_len=1, cache_gib=1)
    one, other = VllmServer(options), VllmServer(options)
    assert one._name != other._name
    command = demo_server._command(options, 1, one._name)
    named = command[command.index("--served-model-name") + 1 :]
    assert named[:2] == [demo_server.MODEL_NAME, one._name]


def test_keys_of_the_users_other_servers_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    options = ServerOptions(model=tmp_path, log=tmp_path / "log", max_model_len=1, cache_gib=1)
    assert "VLLM_API_KEY" not in demo_server._environment(options)


def test_without_vllm_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_server, "find_script", lambda name: None)
    arguments = ["--tokens", "1024", "--needles", "1", "--cache-dir", os.fspath(tmp_path)]
    assert demo.main(arguments) == demo.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo: the command vllm is neither beside this Python")


def test_a_mistake_of_the_programs_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def mistaken(*_: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(demo, "build_haystack", mistaken)
    with pytest.raises(ValueError, match="a mistake"):
        demo.main(["--tokens", "1024", "--cache-dir", os.fspath(tmp_path)])


def test_what_the_system_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["--tokens", "1024", "--cache-dir", os.fspath(tmp_path / "file")]
    assert demo.main(arguments) == demo.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo: [Errno ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{"], "is no JSON"),
        (["--config", "[1]"], "is no JSON object"),
        (["--tokens", "0"], "--tokens must be"),
        (["--tokens", "200000"], "--tokens must be"),
        (["--needles", "0"], "--needles must be"),
        (["--max-tokens", "0"], "--max-tokens must be"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == demo.FAILED
    assert message in capsys.readouterr().err


def test_needles_that_do_not_fit_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokens", "50", "--cache-dir", os.fspath(tmp_path)]
    assert demo.main(arguments) == demo.FAILED
    assert capsys.readouterr().err == "demo: 8 needles do not fit into 50 tokens\n"


@pytest.mark.parametrize(
    ("completion", "right"),
    [(" 123456.", True), ("123456.\nand more", True), (" 1234567.", False), (" 12345", False)],
)
def test_answers_are_judged_by_the_whole_number(completion: str, right: bool) -> None:
    answer = Answer(PlacedNeedle(Needle("Foo", "123456"), 0), completion)
    assert answer.is_right == right
