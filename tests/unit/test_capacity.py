"""What `vllm-tailorkv plan` says fits is what the engine will find."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import vllm
from cache_planning import plan_caches, vllms_own
from rich.console import Console
from vllm.config import CacheConfig, VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_tailorkv import cli
from vllm_tailorkv.attention import report as log_report
from vllm_tailorkv.attention.budget import cache_sizing
from vllm_tailorkv.attention.spec import layer_spec
from vllm_tailorkv.attention.staged import Staging
from vllm_tailorkv.cache.sizing import size_cache
from vllm_tailorkv.capacity import command
from vllm_tailorkv.capacity.arithmetic import (
    Fit,
    Worker,
    fit_tailorkv,
    fit_vllm,
    layouts_of,
    scratch_bytes,
)
from vllm_tailorkv.capacity.cards import CARDS, Card, find_card
from vllm_tailorkv.capacity.command import main
from vllm_tailorkv.capacity.model import count_weights, read_model
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import GIB
from vllm_tailorkv.patches.catalog import PATCHES
from vllm_tailorkv.patches.record import patches_for
from vllm_tailorkv.plan import Plan, make_plan
from vllm_tailorkv.profile import ModelShape

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PARAMETERS = 8_030_261_248
MACHINE = ["--device-gib", "24", "--host-gib", "64"]
SHAPE = ModelShape("some/model", "LlamaForCausalLM", 32, 8, 128, 32)


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return folder


@pytest.fixture(autouse=True)
def _levels_of_logs() -> Iterator[None]:
    """The command quiets others; tests that follow hear them again."""
    loggers = [logging.getLogger(name) for name in ("vllm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    with mock.patch.dict(os.environ):
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path / "Llama-3.1-8B-Instruct")


def worker_of(**changes: Any) -> Worker:
    fields: dict[str, Any] = {
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "itemsize": 2,
        "longest": 131_072,
        "context": 32_768,
        "weights": 2 * PARAMETERS,
        "step_weights": 15 * GIB,
        "memory": 24 * GIB,
        "utilization": 0.92,
        "overhead": GIB,
    }
    return Worker(**(fields | changes))


def plan_on(device: str, options: dict[str, Any] | None = None, host: int = 64 * GIB) -> Plan:
    options = {"profile": {"dense_layers": [0, 5]}} | (options or {})
    return make_plan(options, SHAPE, device=device, host_memory=host)


def engine_config(plan: Plan | None, max_model_len: int = 1024) -> Any:
    """As much of an engine's configuration as its sizes follow from."""
    config = VllmConfig()
    config.model_config = SimpleNamespace(  # type: ignore[assignment]
        max_model_len=max_model_len,
        original_max_model_len=max_model_len,
        supports_kv_cache_grouping=False,
        is_hybrid=False,  # since 0.33
    )
    config.cache_config.kv_cache_layout = "LBHNC"
    # As the engine's core does first.
    register_all_kvcache_specs(config)
    if plan is not None:
        config.additional_config = {"tailorkv_plan": plan.as_json()}
    return config


def specs_of(worker: Worker, block_size: int, dtype: torch.dtype) -> dict[str, FullAttentionSpec]:
    """What vLLM's own layers ask for."""
    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=worker.num_kv_heads,
        head_size=worker.head_size,
        dtype=dtype,
    )
    return {f"model.layers.{i}.self_attn.attn": spec for i in range(worker.num_layers)}


def blocks_in_engine(config: Any, specs: Any, memory: int) -> int:
    """The blocks that vLLM allocates, by the call that our patch wraps."""
    patches = patches_for(PATCHES, vllm.__version__)
    wrapped = next(one for one in patches if one.name == "block-count").wrap(vllms_own())
    return plan_caches(config, [specs], [memory], wrapped)[0].num_blocks


CASES = [
    ("cuda", {}, 64 * GIB, 1),
    ("cuda", {"host_pool_gib": 200}, 64 * GIB, 1),
    ("cuda", {"bits": 4, "index": "channels", "host_pool_gib": 20}, 64 * GIB, 2),
    ("cpu", {}, 64 * GIB, 1),
    ("cpu", {"index": "channels"}, 64 * GIB, 2),
    ("cpu", {"index": "channels", "key_rows": False}, 64 * GIB, 1),
    ("cpu", {"placement": "split"}, 64 * GIB, 1),
    ("cpu", {"placement": "split", "host_pool_gib": 3}, 64 * GIB, 1),
]


@pytest.mark.parametrize(("device", "options", "host", "workers"), CASES)
def test_blocks_are_those_of_the_engine(
    device: str,
    options: dict[str, Any],
    host: int,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_on(device, options, host)
    worker = worker_of(num_heads=32 // workers, num_kv_heads=8 // workers)
    fit = fit_tailorkv("tailorkv", worker, plan, block_size=128)
    config = engine_config(plan)
    specs = {
        name: layer_spec(spec, name, config)
        for name, spec in specs_of(worker, 128, torch.bfloat16).items()
    }
    sizing = cache_sizing(specs)
    assert sizing is not None
    assert sizing == fit.sizing == size_cache(layouts_of(worker, plan, 128), 0, split=plan.split)
    told: list[Any] = []
    monkeypatch.setattr(log_report, "tell_sizes", lambda *said: told.append(said[1:]))
    assert blocks_in_engine(config, specs, fit.cache) == fit.blocks
    assert told == [(sizing, fit.blocks)]
    assert sizing.memory_for_vllm(fit.cache, plan.host_pool) // sizing.pool_bytes == fit.blocks
    by_pool = fit.blocks_by_host_pool
    assert fit.blocks == min(fit.blocks_by_memory, fit.blocks if by_pool is None else by_pool)
    assert fit.bound_by_host_pool == (by_pool == fit.blocks)
    tokens = f"{fit.blocks:,} blocks of 128 tokens: {fit.tokens:,} tokens; one request may have "
    assert sizing.describe(fit.blocks, 131_072)[-1] == f"{tokens}{fit.longest_context:,}"


@pytest.mark.parametrize(
    ("dtype", "block_size"), [(torch.bfloat16, 16), (torch.uint8, 16), (torch.bfloat16, 128)]
)
def test_blocks_of_vllm_are_its_own(dtype: torch.dtype, block_size: int) -> None:
    worker = worker_of()
    fit = fit_vllm("vLLM", worker, itemsize=dtype.itemsize, block_size=block_size)
    specs = specs_of(worker, block_size, dtype)
    config = engine_config(None, worker.context)
    pages = [spec.page_size_bytes for spec in specs.values()]
    assert fit.pool_block == sum(pages)
    assert fit.blocks == fit.cache // sum(pages) == fit.blocks_by_memory
    needed = sum(spec.max_memory_usage_bytes(config) for spec in specs.values())
    assert needed == fit.blocks_of_request * fit.pool_block
    # The call of the block-count patch, before it is patched.
    configs = plan_caches(config, [dict(specs)], [fit.cache], vllms_own())
    assert configs[0].num_blocks == fit.blocks


@pytest.mark.parametrize("more", [0, 1])
def test_longest_context_is_what_vllm_accepts(more: int) -> None:
    worker = worker_of()
    fit = fit_vllm("vLLM", worker, itemsize=2, block_size=16)
    config = engine_config(None, fit.longest_context + more)
    specs = specs_of(worker, 16, torch.bfloat16)
    if more:
        with pytest.raises(ValueError, match=f"maximum model length is {fit.longest_context}"):
            plan_caches(config, [dict(specs)], [fit.cache], vllms_own())
    else:
        plan_caches(config, [dict(specs)], [fit.cache], vllms_own())


def test_defaults_are_those_of_vllm() -> None:
    assert CacheConfig().gpu_memory_utilization == command.UTILIZATION
    assert command.VLLM_BLOCK_SIZE["cuda"] == CacheConfig.DEFAULT_BLOCK_SIZE


@pytest.mark.parametrize("longest", [4096, 131_072])
def test_staging_buffer(longest: int) -> None:
    worker = worker_of(longest=longest)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=128),
    )
    varlen: Any = SimpleNamespace(merges=True)
    buffer = Staging(varlen, 8, 128, torch.bfloat16, config).buffer(torch.device("meta"))
    assert scratch_bytes(worker, plan_on("cuda")) == (buffer.nbytes, 256 << 20)
    assert scratch_bytes(worker, plan_on("cpu")) == (0, 0)


def reads(fit: Fit) -> dict[str, tuple[bool, int, int, int]]:
    return {
        read.what: (read.from_host, read.layers, read.count, read.num_bytes) for read in fit.reads
    }


def test_reads_of_a_gpu() -> None:
    """By hand: 30 sparse layers, 8 KV heads, rows of 256 bytes."""
    fit = fit_tailorkv("tailorkv", worker_of(), plan_on("cuda"), block_size=128)
    codes = 64 * 128 // 4 + 4 * 128 + 64 * 128 // 4 + 4 * 64 * 2
    index = 128 * 128 // 8 + 4 * 128
    assert reads(fit) == {
        "dense, codes": (False, 2, 510, 2 * 510 * 8 * codes),
        "dense, newest K and V": (True, 2, 128, 2 * 128 * 8 * 512),
        "sparse, index": (False, 30, 256, 30 * 256 * 8 * index),
        "sparse, K of candidates": (True, 30, 1008, 30 * 1008 * 8 * 256),
        "sparse, K and V of selected": (True, 30, 448, 30 * 448 * 8 * 512),
        "sparse, K and V at both ends": (True, 30, 64, 30 * 64 * 8 * 512),
        "sparse, K there, for mass": (True, 30, 64, 30 * 64 * 8 * 256),
    }
    one, many = fit.step_bytes(1), fit.step_bytes(5)
    assert one[0] == 15 * GIB + fit.pool_bytes_read
    assert many == (15 * GIB + 5 * fit.pool_bytes_read, 5 * one[1])


def test_tail_within_a_group() -> None:
    """Tokens of the group in progress are read exactly, and no codes of them."""
    worker = worker_of(context=32_768 + 100)
    found = reads(fit_tailorkv("tailorkv", worker, plan_on("cuda"), block_size=128))
    assert found["dense, codes"][2] == 511
    assert found["dense, newest K and V"][2] == 164
    assert found["sparse, index"][2] == 256
    assert found["sparse, K and V at both ends"][2] == 8 + 100


def test_reads_of_channels() -> None:
    options = {"index": "channels", "critical_channels": 4, "rerank_factor": 1}
    options |= {"query_reduce": "mean"}
    gpu = reads(fit_tailorkv("t", worker_of(), plan_on("cuda", options), block_size=128))
    middle = 32_768 - 56 - 8
    # A sector for each channel of a token's row; extremes of every second group of 64.
    assert gpu["sparse, critical channels of K"][2:] == (middle, 30 * middle * 8 * 4 * 32)
    assert gpu["sparse, extremes of channels"][2:] == (256, 30 * 256 * 8 * 512)
    assert "sparse, K of candidates" not in gpu
    assert "sparse, K there, for mass" not in gpu
    cpu = reads(fit_tailorkv("t", worker_of(), plan_on("cpu", options), block_size=128))
    assert cpu["sparse, critical channels of K"][3] == 30 * middle * 8 * 4 * 2


def test_reads_of_a_cpu() -> None:
    """Without K token by token, every channel of a single token is a cache line of its own."""
    rows = reads(fit_tailorkv("t", worker_of(), plan_on("cpu"), block_size=128))
    assert rows["sparse, K of candidates"][3] == 30 * 1008 * 8 * 256
    plan = plan_on("cpu", {"index": "channels", "key_rows": False})
    found = reads(fit_tailorkv("t", worker_of(), plan, block_size=128))
    assert found["sparse, K of candidates"][3] == 30 * 1008 * 8 * 48 * 64
    assert found["sparse, K and V of selected"][3] == 30 * 448 * 8 * (128 * 64 + 256)


def test_short_contexts_are_read_in_full() -> None:
    fit = fit_tailorkv("t", worker_of(context=2048), plan_on("cpu"), block_size=128)
    assert reads(fit) == {"K and V": (True, 32, 2048, 32 * 2048 * 8 * 512)}


def test_nothing_fits() -> None:
    worker = worker_of(memory=8 * GIB)
    for fit in (
        fit_vllm("vLLM", worker, itemsize=2, block_size=16),
        fit_tailorkv("tailorkv", worker, plan_on("cuda"), block_size=128),
    ):
        assert fit.cache < 0
        assert (fit.blocks, fit.tokens, fit.requests, fit.longest_context) == (0, 0, 0, 0)


def test_parameters_of_a_config(llama: Path, tmp_path: Path) -> None:
    """The matrices of a layer, its two norms, and the embeddings, twice or tied."""
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    vectors = 32 * 2 * 4096 + 4096
    layers = 32 * (attention + 3 * 4096 * 14336)
    table = 128_256 * 4096
    assert layers + vectors + 2 * table == PARAMETERS
    model = read_model(str(llama), "auto")
    assert (model.shape.num_layers, model.longest, model.dtype) == (32, 131_072, "bfloat16")
    one = count_weights(model, 1, None)
    assert (one.held, one.read) == (2 * PARAMETERS, 2 * (PARAMETERS - table))
    two = count_weights(model, 2, None)
    assert two.held == 2 * ((layers + 2 * table) // 2 + vectors)
    assert two.read == two.held - table
    many = count_weights(model, 32, None)
    assert many.held == 2 * ((layers + 24 * 32 * 2 * 128 * 4096 + 2 * table) // 32 + vectors)
    tied = read_model(str(write_config(tmp_path / "tied", tie_word_embeddings=True)), "float32")
    counted = count_weights(tied, 1, None)
    assert counted.held == counted.read == 4 * (PARAMETERS - table)
    assert count_weights(model, 4, 400).held == 100


def test_quantized_checkpoint(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "awq", quantization_config={"quant_method": "awq", "bits": 4})
    model = read_model(str(folder), "auto")
    with pytest.raises(TailorKVError, match=r"quantized \(awq\).*--weights-gib"):
        count_weights(model, 1, None)
    index = {"metadata": {"total_size": 5000}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = count_weights(model, 2, None)
    assert (weights.held, weights.read) == (2500, 2500)
    assert weights.source.startswith("model.safetensors.index.json, awq")
    for i in range(2):
        (folder / f"model-{i}.safetensors").write_bytes(b"x" * 100)
    assert count_weights(model, 1, None).held == 200


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "a sliding window"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 16}, "sliding_attention"),
        ({"architectures": ["NoSuchModel"]}, "--weights-gib"),
        ({"model_type": "no_such_model"}, "cannot be read"),
    ],
)
def test_models_that_are_not_counted(
    tmp_path: Path, changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_config(tmp_path / "m", **changes)), *MACHINE]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "MODEL" in error
    assert words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*MACHINE, "--context", "-5"], ["--context", "-5"]),
        ([*MACHINE, "--context", "0"], ["--context", "'0'"]),
        ([*MACHINE, "--context", "131073"], ["--context 131073", "131072"]),
        ([*MACHINE, "--tp", "3"], ["--tp 3", "32 query heads"]),
        ([*MACHINE, "--tp", "x"], ["--tp", "'x'"]),
        ([*MACHINE, "--card", "Voodoo"], ["--card 'Voodoo'", "RTX 4090"]),
        ([*MACHINE, "--card", "RTX"], ["--card 'RTX'", "RTX 4090"]),
        ([*MACHINE, "--card", "-"], ["--card '-'"]),
        (["--device-gib", "-24", "--host-gib", "64"], ["--device-gib", "-24"]),
        (["--device-gib", "nan", "--host-gib", "64"], ["--device-gib", "nan"]),
        (["--device-gib", "24", "--host-gib", "0"], ["--host-gib", "'0'"]),
        (["--device-gib", "24"], ["--host-gib"]),
        (["--host-gib", "64"], ["--device-gib is needed"]),
        (["--cpu", *MACHINE], ["--device-gib is of GPUs"]),
        (["--cpu", "--host-gib", "64", "--card", "h100"], ["--card is of GPUs"]),
        ([*MACHINE, "--dtype", "int8"], ["--dtype", "bfloat16"]),
        ([*MACHINE, "--utilization", "1.5"], ["--utilization", "1.5"]),
        ([*MACHINE, "--weights-gib", "inf"], ["--weights-gib", "inf"]),
        ([*MACHINE, "--overhead-gib", "none"], ["--overhead-gib", "none"]),
        ([*MACHINE, "--block-size", "96"], ["--block-size 96", "group_size 64"]),
        ([*MACHINE, "--config", "{"], ["--config", "no JSON"]),
        ([*MACHINE, "--config", '{"topk": 3}'], ["unknown option 'topk'"]),
        ([*MACHINE, "--config", '{"placement": "joint"}'], ['placement="joint"']),
        ([*MACHINE, "--tp", "2", "--config", '{"host_pool_gib": 40}'], ["host_pool_gib=40"]),
        ([*MACHINE, "--fast"], ["--fast"]),
    ],
)
def test_bad_input(
    llama: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(llama), *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "\n" not in printed.err.strip()
    for word in words:
        assert word in printed.err


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", ""])
def test_no_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name or str(tmp_path), *MACHINE]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("vllm-tailorkv: error: MODEL")
    assert "\n" not in error


def test_cards() -> None:
    assert find_card("h100") == find_card("H100 SXM") == CARDS[1]
    assert find_card("4090").name == "RTX 4090"
    assert find_card("a100 80g").memory_gb_s == 2039
    assert Card("some", 1000, 50).step_ms(2_000_000_000, 100_000_000) == 4


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, str(llama), *MACHINE, "--context", "32768", "--card", "4090")
    own, fp8, ours = found["caches"]
    # As published with the paper for a model of this name and shape.
    assert found["plan"]["dense_layers"] == [0]
    assert found["plan"]["config"]["full_attention_below"] == 0
    assert own["weights_bytes"] == 2 * PARAMETERS
    assert (own["tokens"], own["requests"]) == (46_032, 1)
    assert (fp8["tokens"], fp8["requests"]) == (92_096, 2)
    assert (ours["tokens"], ours["requests"], ours["binds"]) == (314_368, 9, "host pool")
    assert (ours["pool_bytes_per_token"], ours["host_bytes_per_token"]) == (5600, 131_072)
    assert ours["host_pool_bytes"] == int(64 * GIB * 0.6)
    assert [step["requests"] for step in ours["steps"]] == [1, 9]
    assert ours["steps"][0]["least_ms"].keys() == {"RTX 4090"}
    assert ours["log"][-1].startswith("2,457 blocks of 128 tokens: 314,368 tokens")


def test_json_of_a_cpu(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(llama), "--cpu", "--host-gib", "64", "--tp", "2"]
    found = run_json(capsys, *arguments, "--config", '{"bits": 1}')
    ours = found["caches"][2]
    assert found["plan"]["device"] == "cpu"
    assert ours["memory_bytes"] == 32 * GIB
    # K and V of 4 heads in 32 layers, and the derived tier.
    host = 4 * 256 * 2 * 32
    assert ours["log"][0].startswith(f"host tier: {host:,} bytes a token in vLLM's pages")
    assert ours["pool_bytes_per_token"] > host
    assert (ours["host_pool_bytes"], ours["host_bytes_per_token"]) == (None, 0)
    assert ours["steps"][0]["least_ms"] == {}


@pytest.mark.parametrize(
    "arguments",
    [
        [*MACHINE, "--tp", "2"],
        ["--cpu", "--host-gib", "64"],
        ["--device-gib", "8", "--host-gib", "1"],
    ],
)
def test_tables(
    llama: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "Console", lambda **options: Console(width=120, **options))
    assert main([str(llama), *arguments]) == 0
    printed = capsys.readouterr().out
    for word in ("8,030,261,248 parameters of 2 bytes", "longest single context", "what binds"):
        assert word in printed
    assert ("RTX 3090" in printed) == ("--cpu" not in arguments)
    assert ("none fits" in printed) == ("1" in arguments)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out
