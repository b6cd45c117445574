"""Configurations on NVIDIA GPUs, resolved where there are none: what serves, and what is refused.

Nothing runs on them here. One process that believes in two GPUs does everything there is to do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from random_checkpoint import tiny_config

GIB = 1 << 30
RAM = 400 * GIB
ROOT = Path(__file__).parents[2]

NGRAM = {"method": "ngram_gpu", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-8b": ("Llama", LLAMA_8B),
    "mistral": ("Mistral", {"sliding_window": 128}),
    "gemma": ("Gemma3", {"sliding_window": 128, "num_hidden_layers": 6}),
    "deepseek": ("DeepseekV2", {"qk_nope_head_dim": 64, "kv_lora_rank": 64, "q_lora_rank": None}),
}


def options(**values: Any) -> dict[str, Any]:
    return {"additional_config": {"tailorkv": values}}


ENGINES: dict[str, dict[str, Any]] = {
    "usual": {},
    "blocks of 64": {"block_size": 64},
    "eager": {"enforce_eager": True},
    "graphs of decode steps": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    "drafts": {"speculative_config": NGRAM},
    "weights in host memory": {"cpu_offload_gb": 1},
    "two ranks": {"tensor_parallel_size": 2},
    "two stages": {"pipeline_parallel_size": 2},
    "a pool of a given size": options(host_pool_gib=50) | {"tensor_parallel_size": 2},
}

REFUSED: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("block size", "engine", {"block_size": 96}, ["--block-size 96", "group_size 64"]),
    (
        "group size",
        "engine",
        {"block_size": 64, **options(group_size=128)},
        ["--block-size 64", "group_size 128"],
    ),
    ("joint pages", "engine", options(placement="joint"), ['placement="joint"', "leave it out"]),
    (
        "small pool",
        "engine",
        {"model": "llama-8b", **options(host_pool_gib=4)},
        [
            "host_pool_gib=4 holds 32,640 tokens, but one request may have 131,072; give at least "
            "16 GiB, or lower --max-model-len to 32,640"
        ],
    ),
    (
        "little memory",
        "engine",
        {"model": "llama-8b", "ram": 10 * GIB},
        [
            "the host pool of 6 GiB (60% of the memory available to a worker; host_pool_gib sets "
            "it) holds",
            "give at least 16 GiB",
        ],
    ),
    (
        "a pool beyond the memory",
        "engine",
        {"tensor_parallel_size": 2, **options(host_pool_gib=300)},
        ["host_pool_gib=300, for each of 2 workers here, is more than the 400.0 GiB of memory"],
    ),
    (
        "small cache",
        "engine",
        {"model": "llama-8b", "kv_cache_memory_bytes": GIB // 8},
        ["--kv-cache-memory-bytes of 0.125 GiB holds", "lower --max-model-len to"],
    ),
    (
        "another cache dtype",
        "engine",
        {"kv_cache_dtype": "fp8"},
        ["--kv-cache-dtype fp8", "give --kv-cache-dtype bfloat16"],
    ),
    (
        "layers without it",
        "engine",
        {"kv_cache_dtype_skip_layers": ["0"]},
        ["leave --kv-cache-dtype-skip-layers out"],
    ),
    ("offloading", "engine", {"kv_offloading_size": 1.0}, ["leave --kv-offloading-size out"]),
    (
        "sleep mode",
        "changed",
        {"change": {"model_config.enable_sleep_mode": True}},
        ["leave --enable-sleep-mode out"],
    ),
    (
        "the first runner",
        "engine",
        {"env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}},
        ["first model runner (VLLM_USE_V2_MODEL_RUNNER=0)", "unset VLLM_USE_V2_MODEL_RUNNER"],
    ),
    (
        "what the second runner cannot do",
        "changed",
        {"speculative_config": NGRAM, "change": {"speculative_config.method": "suffix"}},
        ["first model runner (speculative method 'suffix')", "leave that out"],
    ),
    (
        "batch invariance",
        "engine",
        {"env": {"VLLM_BATCH_INVARIANT": "1"}},
        ["depend on the batch", "unset VLLM_BATCH_INVARIANT"],
    ),
    (
        "microbatches",
        "changed",
        {"change": {"parallel_config.ubatch_size": 2}},
        ["microbatching", "--enable-dbo"],
    ),
    (
        "adaptive verification",
        "changed",
        {
            "speculative_config": NGRAM,
            "change": {"speculative_config.enable_adaptive_verification": True},
        },
        ["adaptive verification", "--speculative-config"],
    ),
    ("windows", "engine", {"model": "gemma"}, ["sliding window", "not supported on a GPU"]),
    ("windows alone", "engine", {"model": "mistral"}, ["sliding window", "on a GPU"]),
    ("latent attention", "engine", {"model": "deepseek"}, ["MLA"]),
    ("an older GPU", "on_an_older_gpu", {}, ["H100", "compute capability 7.5", "8.0 is needed"]),
    ("Triton", "without_triton", {}, ["Triton", "pip install triton"]),
    *(
        (name, "on_another_platform", {"platform": name}, [f"serving on {name}", "NVIDIA GPU"])
        for name in ("rocm", "xpu", "tpu")
    ),
    ("a layer's window", "layer", {"has_sliding_window": True}, ["sliding window"]),
    ("a layer of latent attention", "layer", {"use_mla": True}, ["MLA"]),
    ("a layer's cache dtype", "layer", {"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8"]),
    ("a layer's heads", "layer", {"head_size": 512}, ["head size 512", "224, 256"]),
    ("a layer of images", "layer", {"use_mm_prefix": True}, ["not causal"]),
]

BIG = {"model": "llama-8b", "dtype": "bfloat16"}
CACHES: dict[str, dict[str, Any]] = {
    "more memory than pool": BIG | {"memory": [60 * GIB], **options(host_pool_gib=60)},
    "more pool than memory": BIG | {"memory": [4 * GIB]},
    "given memory": BIG
    | {"memory": [3 * GIB], "kv_cache_memory_bytes": 3 * GIB, **options(host_pool_gib=100)},
    "given blocks": BIG | {"memory": [60 * GIB], "num_gpu_blocks_override": 1100},
    "a draft's layers": BIG | {"memory": [5 * GIB], "draft_layers": 1},
    "two ranks": BIG | {"memory": [60 * GIB, 50 * GIB], "tensor_parallel_size": 2},
    "two stages": BIG
    | {
        "memory": [60 * GIB, 2 * GIB],
        "pipeline_parallel_size": 2,
        **options(profile={"dense_layers": [0, 1]}),
    },
    "a small pool in two stages": BIG
    | {
        "memory": [60 * GIB, 60 * GIB],
        "pipeline_parallel_size": 2,
        **options(host_pool_gib=9),
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each by name, in one process of a few seconds."""
    directory = tmp_path_factory.mktemp("models")
    for name, (architecture, changes) in MODELS.items():
        config = tiny_config(architecture, **changes)
        config.architectures = [f"{architecture}ForCausalLM"]
        config.save_pretrained(directory / name)
    todo: dict[str, tuple[str, dict[str, Any]]] = {
        "cache: " + name: ("cache", arguments) for name, arguments in CACHES.items()
    }
    todo |= {"refused: " + name: (what, arguments) for name, what, arguments, _ in REFUSED}
    todo |= {name: ("engine", arguments) for name, arguments in ENGINES.items()}
    todo |= {
        "layer": ("layer", {}),
        "layer with sinks": ("layer", {"has_sink": True}),
        "spawned": ("spawned", options(bits=1, host_pool_gib=2)),
        "xformers": ("xformers_obstacle", {}),
        "xformers, drafts": ("xformers_obstacle", {"speculative_config": NGRAM}),
        "doctor": ("ready", {}),
    }
    for what, arguments in todo.values():
        if what not in ("layer", "ready"):
            arguments["model"] = str(directory / arguments.get("model", "llama"))
    support = str(ROOT / "tests/support")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([support, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    # What tests before this one, and engines on CPUs among them, leave in this process.
    for name in ("TRITON_INTERPRET", "THP_MEM_ALLOC_ENABLE"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, f"{support}/resolve_on_cuda.py"],
        input=json.dumps(todo),
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ENGINES)
def test_a_configuration_that_serves(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert "refused" not in found and "failed" not in found, found
    assert found["backend"] == "TAILORKV"
    assert found["worker"] == "vllm.v1.worker.gpu_worker.Worker"
    assert found["second_runner"]
    assert found["device"] == "cuda"
    assert found["metric"]["placement"] == "split"
    assert found["full_attention_below"] == 0
    assert found["block_size"] == (64 if name == "blocks of 64" else 128)
    graphs = {
        "eager": "NONE",
        "drafts": "PIECEWISE",
        "graphs of decode steps": "FULL_DECODE_ONLY",
    }
    assert found["graphs"] == graphs.get(name, "FULL_AND_PIECEWISE")
    assert found["small_pages"]


def test_drafts_are_scheduled_asynchronously(results: dict[str, Any]) -> None:
    assert results["drafts"]["async"]


@pytest.mark.parametrize("name", ["two ranks", "two stages"])
def test_workers_share_the_memory(results: dict[str, Any], name: str) -> None:
    assert results["usual"]["host_pool"] == int(RAM * 0.6)
    assert results[name]["local_workers"] == 2
    assert results[name]["host_pool"] == int(RAM // 2 * 0.6)


def test_a_pool_of_a_given_size_is_each_worker_s(results: dict[str, Any]) -> None:
    assert results["a pool of a given size"]["host_pool"] == 50 * GIB


@pytest.mark.parametrize("name,words", [(case[0], case[3]) for case in REFUSED])
def test_a_refusal(results: dict[str, Any], name: str, words: list[str]) -> None:
    found = results["refused: " + name]
    assert isinstance(found, dict) and "refused" in found, found
    for word in words:
        assert word in found["refused"]


@pytest.mark.parametrize("name", ["layer", "layer with sinks"])
def test_layers_get_our_backend(results: dict[str, Any], name: str) -> None:
    assert results[name] == "vllm_tailorkv.attention.backend.TailorKVBackend"


@pytest.mark.parametrize("name", CACHES)
def test_blocks_fit_both_budgets(results: dict[str, Any], name: str) -> None:
    """Those of the worker that has least room; all have as many."""
    found, arguments = results["cache: " + name], CACHES[name]
    assert "refused" not in found and "failed" not in found, found
    workers = zip(found["device_bytes"], found["host_bytes"], arguments["memory"], strict=True)
    fits = [min(memory // device, found["host_pool"] // host) for device, host, memory in workers]
    blocks = arguments.get("num_gpu_blocks_override", min(fits))
    assert found["blocks"] == [blocks] * len(arguments["memory"])


def bound(found: dict[str, Any]) -> list[str]:
    return [line for line in found["log"] if "bounds the cache" in line]


def test_the_log_says_what_bounds_the_cache(results: dict[str, Any]) -> None:
    found = results["cache: more memory than pool"]
    assert found["blocks"] == [60 * GIB // (128 * 128 * 1024)]
    assert bound(found) == [
        "TailorKV: host_pool_gib=60 holds 491,392 tokens and bounds the cache; 60 GiB of device "
        "memory (--gpu-memory-utilization) would hold 12,582,784: to have more, raise "
        "host_pool_gib."
    ]
    assert "131,072" in found["log"][-1]
    found = results["cache: more pool than memory"]
    assert bound(found) == [
        "TailorKV: 4 GiB of device memory (--gpu-memory-utilization) holds 838,656 tokens and "
        "bounds the cache; the host pool of 240 GiB (60% of the memory available to a worker; "
        "host_pool_gib sets it) would hold 1,965,952: to have more, raise "
        "--gpu-memory-utilization."
    ]
    [line] = bound(results["cache: given memory"])
    assert line.endswith("raise --kv-cache-memory-bytes.")
    assert bound(results["cache: given blocks"]) == []


def test_each_worker_has_a_part_of_a_block(results: dict[str, Any]) -> None:
    token = 32 * 8 * 128 * 2 * 2
    assert results["cache: two ranks"]["host_bytes"] == [token // 2 * 128] * 2
    found = results["cache: two stages"]
    assert found["host_bytes"] == [token // 2 * 128] * 2
    # The first stage's dense layers keep more.
    assert found["device_bytes"][0] > found["device_bytes"][1]
    [line] = bound(found)
    assert line.startswith("TailorKV: 2 GiB of device memory")


def test_another_process_finds_the_same(results: dict[str, Any]) -> None:
    found = results["spawned"]
    assert found["here"] == found["there"]
    assert found["there"]["backend"] == "TAILORKV"
    assert found["there"]["host_pool"] == 2 * GIB


def test_xformers_is_not_asked_for_lengths_that_are_not_known(results: dict[str, Any]) -> None:
    assert results["xformers"] is None
    assert "lengths that are not known" in results["xformers, drafts"]


def test_doctor(results: dict[str, Any]) -> None:
    found = results["doctor"]
    assert found["status"] == 0, found["text"]
    for words in (
        "GPU 1 NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0",
        "ops on cuda triton (Triton), the fastest available: write_kv",
        "ready to serve on 2 GPUs (NVIDIA H100 80GB HBM3)",
    ):
        assert words in found["text"]


def test_cuda_is_not_initialised(results: dict[str, Any]) -> None:
    assert results["initialisations"] == []
