"""Several processes: tensor, pipeline and data parallel, two API servers."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import LONG_OPTIONS, engine, greedy, random_prompts
from random_checkpoint import save_random_checkpoint
from server_log import assert_brief

from vllm_tailorkv.attention.carried import DRAFTER
from vllm_tailorkv.demo.server import MODEL_NAME, ServerOptions, VllmServer
from vllm_tailorkv.errors import TailorKVError

PROMPTS = random_prompts([100, 300, 350, 420, 500], seed=31)
"""Within the budget, and beyond it. So short that every token is a candidate: other batches and
other sums over ranks change last bits, and nothing else."""
STEPS = 24
OPTIONS = {"preset": "fast", "full_attention_below": 0} | LONG_OPTIONS["onebit"]


@pytest.fixture(scope="module")
def expected(random_llama: Path) -> list[list[int]]:
    """What one process says with the same options, codes and indexes read."""
    with engine(random_llama, LONG_OPTIONS["onebit"]) as llm:
        return greedy(llm, PROMPTS, STEPS)


@pytest.fixture
def serve(random_llama: Path, tmp_path: Path) -> Iterator[Callable[..., VllmServer]]:
    """Starts servers with some arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        # Dynamo without compilation: a compiled model takes a minute more.
        patch.setenv("VLLM_CPU_CI_ENV", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        # vLLM would bind workers to NUMA nodes, of which there may be one.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        servers = []

        def start(*arguments: str, model: Path = random_llama, **config: Any) -> VllmServer:
            options = ServerOptions(
                model=model,
                log=tmp_path / "server.log",
                max_model_len=2048,
                cache_gib=1,
                backend="tailorkv",
                config=OPTIONS | config,
                dtype="float32",
                arguments=arguments,
            )
            servers.append(VllmServer(options))
            servers[-1].start()
            servers[-1].wait_until_healthy(lambda _: None, timeout=240)
            return servers[-1]

        yield start
        for server in servers:
            server.stop()


def answers(server: VllmServer) -> list[list[int]]:
    """What it says to all prompts at once, each over a connection of its own."""

    def ask(prompt: list[int]) -> Any:
        request = {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": STEPS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        reply = httpx.post(f"{server.url}/v1/completions", json=request, timeout=120)
        return reply.raise_for_status().json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(ask, PROMPTS))


def decode_rows(metrics: str) -> dict[str, float]:
    """Of each kind of layer."""
    pattern = r'^tailorkv_decode_rows_total{layers="(\w+)"} (\S+)$'
    return {kind: float(count) for kind, count in re.findall(pattern, metrics, re.M)}


_BEYOND = len(PROMPTS) - 1
EVERY_ROW = {"dense": _BEYOND * (STEPS - 1) * 2, "sparse": _BEYOND * (STEPS - 1) * 2}
"""Of two layers of each kind. The first token of a request is its prompt's, and those of one within
the budget are attended to in full."""


def test_data_parallel_with_two_api_servers(
    serve: Callable[..., VllmServer], expected: list[list[int]]
) -> None:
    server = serve("--data-parallel-size", "2", "--api-server-count", "2", "--enforce-eager")
    assert answers(server) == expected
    metrics = httpx.get(f"{server.url}/metrics").text
    generated = re.findall(r'^vllm:generation_tokens_total{engine="(\d)".* (\S+)$', metrics, re.M)
    assert {engine for engine, count in generated if float(count)} == {"0", "1"}
    assert decode_rows(metrics) == EVERY_ROW
    plan = server.plan()
    assert plan is not None
    assert plan.dense_layers == LONG_OPTIONS["onebit"]["profile"]["dense_layers"]
    assert_brief(server)


def test_tensor_and_pipeline_parallel(
    serve: Callable[..., VllmServer], expected: list[list[int]]
) -> None:
    """Two stages of two ranks, which have a KV head each. The layers of the first stage are all
    dense, those of the second all sparse."""
    with pytest.MonkeyPatch.context() as patch:
        # Without a warm-up the second stage of vLLM on a CPU fails at the first request.
        patch.delenv("VLLM_CPU_CI_ENV")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
        server = serve(
            *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"),
            *("--compilation-config", '{"mode": 1, "backend": "eager"}'),
        )
    assert answers(server) == expected
    # Rows count on one rank of a stage.
    assert decode_rows(httpx.get(f"{server.url}/metrics").text) == EVERY_ROW
    assert_brief(server)


def test_tensor_parallel_with_split_placement(
    serve: Callable[..., VllmServer], expected: list[list[int]]
) -> None:
    """Each worker has pages and a pool of its own."""
    server = serve("--tensor-parallel-size", "2", "--enforce-eager", placement="split")
    assert answers(server) == expected
    # Rows count on one rank.
    assert decode_rows(httpx.get(f"{server.url}/metrics").text) == EVERY_ROW
    plan = server.plan()
    assert plan is not None
    assert plan.placement == "split"
    assert_brief(server)


def test_drafts_of_two_ranks(serve: Callable[..., VllmServer], random_llama: Path) -> None:
    """The ranks draft the same tokens, and say what vLLM's own attention says."""
    with engine(random_llama) as llm:
        full = greedy(llm, PROMPTS, STEPS)
    speculation = json.dumps({"model": DRAFTER, "num_speculative_tokens": 3})
    server = serve("--tensor-parallel-size", "2", "--speculative-config", speculation)
    assert answers(server) == full
    metrics = httpx.get(f"{server.url}/metrics").text
    drafted = re.search(r"^vllm:spec_decode_num_draft_tokens_total{.*} (\S+)$", metrics, re.M)
    assert drafted is not None
    rows = decode_rows(metrics)
    # A draft is a decode row in each layer. The last ones of an answer are judged by no step.
    assert rows["dense"] == rows["sparse"] >= 2 * float(drafted[1]) > 0
    assert_brief(server)


def one_and_many(model: Path, options: dict[str, Any], **parallel: Any) -> list[list[list[int]]]:
    """What one worker says, and what several say."""
    with engine(model, options) as llm:
        one = greedy(llm, PROMPTS, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        cores = islice(cycle("01"), parallel["tensor_parallel_size"])
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(cores))
        with engine(model, options, **parallel) as llm:
            return [one, greedy(llm, PROMPTS, STEPS)]


@pytest.mark.parametrize(
    ("kv_heads", "options"), [(4, {}), (2, {"topk_tokens": 1024})], ids=["split", "replicated"]
)
def test_four_ranks(tmp_path: Path, kv_heads: int, options: dict[str, Any]) -> None:
    """Each has one query head. Two that have the same KV head select for their own query heads, so
    that all is selected there."""
    model = save_random_checkpoint(tmp_path / "model", "Llama", num_key_value_heads=kv_heads)
    options = LONG_OPTIONS["onebit"] | options
    one, many = one_and_many(model, options, tensor_parallel_size=4)
    assert many == one


def test_mixture_of_experts(tmp_path: Path) -> None:
    """Each rank has half of every expert, and half of the heads."""
    model = save_random_checkpoint(tmp_path / "model", "Mixtral", num_local_experts=4)
    one, many = one_and_many(model, LONG_OPTIONS["onebit"], tensor_parallel_size=2)
    assert many == one
    refused = pytest.raises(TailorKVError, match="leave --enable-expert-parallel out")
    with refused, engine(model, {}, enable_expert_parallel=True):
        pass
