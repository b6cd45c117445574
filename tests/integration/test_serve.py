"""`vllm serve` as users start it: engine and workers in spawned processes, HTTP, benchmarks."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_log import assert_brief

from vllm_tailorkv.demo.server import ServerOptions, VllmServer

VLLM = str(Path(sys.executable).parent / "vllm")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("OMP_")},
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # Dynamo without compilation: a compiled model takes a minute more.
    "VLLM_CPU_CI_ENV": "1",
}


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("serve") / "server.log"
    options = ServerOptions(
        model=demo_model,
        log=log,
        max_model_len=8192,
        cache_gib=1,
        backend="tailorkv",
        config={"index": "onebit", "full_attention_below": 0},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_CPU_CI_ENV", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        with VllmServer(options) as running:
            running.wait_until_healthy(lambda _: None, timeout=240)
            yield running


def sample(server: VllmServer, name: str, **labels: str) -> float:
    """One value under `/metrics`."""
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for one in family.samples:
            if (one.name, one.labels) == (name, labels):
                return one.value
    raise AssertionError((name, labels))


def metric(server: VllmServer, name: str) -> float:
    """The sum of a metric over its labels."""
    text = httpx.get(f"{server.url}/metrics").text
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert values, name
    return sum(map(float, values))


def test_completion(server: VllmServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu\n" * 3
    reply = client.completions.create(
        model="demo", prompt=text + "alpha beta gamma delta epsilon zeta", max_tokens=4
    )
    assert reply.choices[0].text.strip().startswith("eta")


def test_the_log_says_in_a_few_lines_what_is_to_be_known(server: VllmServer) -> None:
    assert_brief(server)


def test_the_metrics_tell_the_plan(server: VllmServer) -> None:
    plan = server.plan()
    assert plan is not None
    assert plan.index == "onebit"
    assert plan.dense_layers == [0, 1]
    assert plan.num_blocks > 1
    assert plan.host_bytes_per_token >= plan.full_bytes_per_token > plan.derived_bytes_per_token


def test_the_metrics_count_what_the_workers_do(server: VllmServer) -> None:
    """A prompt of 600 tokens in two dense and four sparse layers, then four decode steps."""
    plan = server.plan()
    assert plan is not None
    layers = {"dense": len(plan.dense_layers), "sparse": len(plan.sparse_layers)}
    names = ["decode_rows", "exact_rows", "context_tokens", "quantized_groups"]
    names += ["host_written_bytes", "derived_read_bytes", "derived_written_bytes"]

    def read() -> dict[tuple[str, str], float]:
        return {
            (name, kind): sample(server, f"tailorkv_{name}_total", layers=kind)
            for name in names
            for kind in layers
        } | {("selected", "sparse"): metric(server, "tailorkv_selected_tokens_total")}

    before = read()
    reply = httpx.post(
        f"{server.url}/v1/completions",
        json={
            "model": "demo",
            "prompt": [100 + i % 700 for i in range(600)],
            "max_tokens": 5,
            "ignore_eos": True,
        },
        timeout=120,
    )
    reply.raise_for_status()
    moved = {name: value - before[name] for name, value in read().items()}
    contexts = range(601, 605)
    for kind, count in layers.items():
        assert moved["decode_rows", kind] == 4 * count
        assert moved["exact_rows", kind] == 600 * count
        assert moved["context_tokens", kind] == sum(contexts) * count
    assert moved["quantized_groups", "dense"] == 600 // 64 * layers["dense"]
    assert moved["quantized_groups", "sparse"] == 600 // 128 * layers["sparse"]
    # Of the 512 tokens in whole groups, 8 are sinks: there is more between than is taken.
    assert moved["selected", "sparse"] == 4 * 448 * layers["sparse"]
    row = plan.num_kv_heads * plan.head_size * 2
    for kind, count in layers.items():
        assert moved["host_written_bytes", kind] == 604 * 2 * row * count
    # A record of 64 tokens, or of 128 of which K alone has codes, at 2 and 1 bits.
    head = plan.head_size
    values = 64 * -(-head * 2 // 8) + 64 * -(-head // 64) * 4
    dense = plan.num_kv_heads * (head * (64 * 2 // 8 + 4) + values)
    sparse = plan.num_kv_heads * head * (128 // 8 + 4)
    coded = sum((context - 128) // 64 for context in contexts)
    assert moved["derived_read_bytes", "dense"] == coded * dense * layers["dense"]
    assert moved["derived_read_bytes", "sparse"] == 4 * 4 * sparse * layers["sparse"]
    assert moved["derived_written_bytes", "dense"] == 9 * dense * layers["dense"]
    assert moved["derived_written_bytes", "sparse"] == 4 * sparse * layers["sparse"]


def test_the_metrics_tell_the_use_of_the_tiers(server: VllmServer) -> None:
    plan = server.plan()
    assert plan is not None
    for tier in ("host", "derived"):
        assert sample(server, "tailorkv_cache_blocks", tier=tier) == plan.num_blocks - 1
        assert sample(server, "tailorkv_cache_blocks_used", tier=tier) == 0


def test_an_aborted_stream_gives_its_blocks_back(server: VllmServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.completions.create(
        model="demo",
        prompt="once upon a time " * 200,
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for count, _ in enumerate(stream):
        if count == 3:
            assert metric(server, "vllm:kv_cache_usage_perc") > 0
            assert metric(server, "tailorkv_cache_blocks_used") > 0
            stream.close()
            break
    deadline = time.monotonic() + 30
    while metric(server, "vllm:kv_cache_usage_perc") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "tailorkv_cache_blocks_used") == 0


def run_bench(*arguments: str) -> str:
    """Run one of vLLM's benchmarks."""
    result = subprocess.run(
        [VLLM, "bench", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_bench_serve(server: VllmServer, demo_model: Path) -> None:
    output = run_bench(
        *("serve", "--base-url", server.url, "--model", "demo"),
        *("--tokenizer", str(demo_model), "--dataset-name", "random"),
        *("--random-input-len", "600", "--random-output-len", "8", "--num-prompts", "4"),
    )
    assert re.search(r"Successful requests: +4\b", output)


@pytest.mark.slow
def test_bench_throughput(demo_model: Path, tmp_path: Path) -> None:
    result = tmp_path / "throughput.json"
    run_bench(
        *("throughput", "--model", str(demo_model), "--attention-backend", "tailorkv"),
        *("--dataset-name", "random", "--random-input-len", "400", "--random-output-len", "8"),
        *("--num-prompts", "4", "--max-model-len", "1024", "--enforce-eager"),
        *("--kv-cache-memory-bytes", "200000000", "--output-json", str(result)),
    )
    assert json.loads(result.read_text())["num_requests"] == 4
