"""The demo's server is watched and stopped, whatever its state."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

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
    deadline = time.monotonic() + 20
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
        server.wait_until_healthy(lambda _: None, timeout=20)
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
        server.wait_until_healthy(lambda _: None, timeout=20)
    assert caught.value.log_lines == ("vllm-tailorkv: error: bits=3: Input should be 1, 2 or 4",)


def test_an_end_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = fake_server(monkeypatch, tmp_path, "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="not started"):
        server.wait(0)
    with server:
        assert server.wait(0) is None
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(20) == -signal.SIGKILL


def test_dtype_and_further_arguments(tmp_path: Path) -> None:
    options = ServerOptions(
        model=tmp_path, log=tmp_path / "log", max_model_len=1, cache_gib=1, dtype="float32"
    )
    command = demo_server._command(replace(options, arguments=("--max-num-seqs", "3")), 1)
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


def test_sigterm_to_the_demo_stops_the_server(tmp_path: Path) -> None:
    program = f"""
import sys
from vllm_tailorkv.demo import __main__ as demo, server
script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
server._command = lambda *_: [sys.executable, "-c", script]
sys.exit(demo.main(["--tokens", "1024", "--needles", "1", "--cache-dir", {str(tmp_path)!r}]))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as process:
        log = tmp_path / "logs" / f"tailorkv-{process.pid}.log"
        deadline = time.monotonic() + 60
        while not log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server_pid = int(wait_for_lines(log, 1)[0])
        process.terminate()
        assert process.wait(30) == 128 + 15
    assert not is_running(server_pid)


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
