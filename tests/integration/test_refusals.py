"""The table of bad inputs: one clear error each, naming the option and the remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm
from engines import engine
from packaging.version import Version
from random_checkpoint import save_random_checkpoint

from vllm_tailorkv.errors import TailorKVError

OTHER_MODEL = {
    "schema_version": 1,
    "architecture": "LlamaForCausalLM",
    "num_layers": 32,
    "num_kv_heads": 8,
    "head_size": 128,
    "dense_layers": [0],
}
CONNECTOR = {"kv_connector": "SharedStorageConnector", "kv_role": "kv_both"}

CASES: list[tuple[str, dict[str, Any] | None, dict[str, Any], list[str]]] = [
    ("unknown key", {"topk": 3}, {}, ["unknown option 'topk'", "topk_tokens"]),
    ("bad bits", {"bits": 3}, {}, ["bits=3", "1, 2 or 4"]),
    ("dense layer out of range", {"profile": {"dense_layers": [9]}}, {}, ["[9]", "0 to 3"]),
    ("missing profile", {"profile": "/no/such/file"}, {}, ["profile='/no/such/file'"]),
    ("block size", {}, {"block_size": 96}, ["--block-size 96", "group_size 64"]),
    ("group size", {"group_size": 128}, {"block_size": 64}, ["--block-size 64", "128"]),
    ("fp8 cache", {}, {"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "leave it at auto"]),
    (
        "fp8 cache, 16 bits",
        {},
        {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
        ["--kv-cache-dtype fp8", "give --kv-cache-dtype bfloat16"],
    ),
    ("offloading", {}, {"kv_offloading_size": 1.0}, ["KV offloading", "--kv-offloading-size"]),
    ("misplaced option", None, {"additional_config": {"bits": 1}}, ["'bits' beside 'tailorkv'"]),
    (
        "our name, nearly",
        None,
        {"additional_config": {"tailor_kv": {"bits": 1}}},
        ["'tailor_kv'", "the key is 'tailorkv'"],
    ),
    ("embeddings", {}, {"runner": "pooling"}, ["pooling runner"]),
    (
        "scores",
        {},
        {"hf_overrides": {"architectures": ["LlamaForSequenceClassification"]}},
        ["pooling runner"],
    ),
    (
        "prompts without the layers that share K and V",
        {},
        {"kv_sharing_fast_prefill": True},
        ["which share K and V", "--kv-sharing-fast-prefill"],
    ),
    ("connector", {}, {"kv_transfer_config": CONNECTOR}, ["KV connectors", "--kv-transfer-config"]),
    (
        "channels",
        {"index": "channels", "critical_channels": 65},
        {},
        ["critical_channels=65", "64"],
    ),
    (
        "host pool",
        {"placement": "split", "host_pool_gib": 0.001},
        {},
        ["host_pool_gib=0.001", "give at least"],
    ),
    (
        "host pool beyond the memory",
        {"placement": "split", "host_pool_gib": 100000},
        {},
        ["host_pool_gib=100000", "GiB of memory available"],
    ),
    (
        "override beyond the host pool",
        {"placement": "split", "host_pool_gib": 0.0625},
        {"num_gpu_blocks_override": 1000},
        ["--num-gpu-blocks-override 1000", "host_pool_gib"],
    ),
]


@pytest.mark.parametrize(
    "options,arguments,words", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input(
    random_llama: Path, options: dict[str, Any] | None, arguments: dict[str, Any], words: list[str]
) -> None:
    if options is None:
        arguments = arguments | {"attention_backend": "tailorkv"}
    with pytest.raises(TailorKVError) as caught, engine(random_llama, options, **arguments):
        pass
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_another_cache_dtype(random_llama: Path) -> None:
    # Since 0.33 vLLM refuses it by itself, before it asks us.
    kind = TailorKVError if Version(vllm.__version__) < Version("0.33") else ValueError
    with (
        pytest.raises(kind, match=r"bfloat16.*float32.*auto"),
        engine(random_llama, {}, kv_cache_dtype="bfloat16"),
    ):
        pass


def test_profile_of_another_model(random_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(OTHER_MODEL))
    with (
        pytest.raises(TailorKVError, match="num_layers 32, the model has 4"),
        engine(random_llama, {"profile": str(path)}),
    ):
        pass


def test_profile_beside_another_number_of_layers(tmp_path: Path) -> None:
    """It was not asked for: the remedy is no option to leave out."""
    model = save_random_checkpoint(tmp_path / "model", "Llama")
    (model / "tailorkv.json").write_text(json.dumps(OTHER_MODEL))
    with (
        pytest.raises(TailorKVError, match=r"was found by itself.*\"dense_layers\": \[\]"),
        engine(model, {}, hf_overrides={"num_hidden_layers": 2}),
    ):
        pass


def test_fp8_cache_of_a_checkpoint(random_llama: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    overrides = {"quantization_config": {**quantization, "config_groups": {}, "format": "dense"}}
    for dtype in ("bfloat16", "float16"):
        with (
            pytest.raises(TailorKVError, match=rf"kv_cache_scheme.*give --kv-cache-dtype {dtype}$"),
            engine(random_llama, {}, dtype=dtype, hf_overrides=overrides),
        ):
            pass


def test_profile_of_this_model(random_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    shape = {"num_layers": 4, "num_kv_heads": 2, "head_size": 64, "dense_layers": [1, 2]}
    path.write_text(json.dumps({**OTHER_MODEL, **shape}))
    with engine(random_llama, {"profile": str(path)}) as llm:
        from engines import attention_layers

        kinds = [layer.impl.spec.layout.kind.value for layer in attention_layers(llm).values()]
    assert kinds == ["onebit", "dense", "dense", "onebit"]


def test_cache_too_small(random_llama: Path) -> None:
    with (
        pytest.raises(TailorKVError, match=r"--kv-cache-memory-bytes .* --max-model-len to 768"),
        engine(random_llama, {}, kv_cache_memory_bytes=4 << 20),
    ):
        pass


@pytest.mark.parametrize(
    "attention",
    [
        {"backend_per_kind": {"sliding_window": "TAILORKV"}},
        {"backend": "TAILORKV", "backend_per_kind": {"full_attention": "CPU_ATTN"}},
    ],
    ids=["windows alone", "all but full attention"],
)
def test_our_backend_where_it_serves_no_layer(
    random_llama: Path, attention: dict[str, Any]
) -> None:
    """The model has layers with full attention: it is not to blame."""
    from vllm.plugins import load_general_plugins

    # `LLM` reads this argument before it loads them; `vllm serve` does not.
    load_general_plugins()
    with (
        pytest.raises(TailorKVError, match=r"backend_per_kind gives .*give it full_attention="),
        engine(random_llama, attention_config=attention),
    ):
        pass


@pytest.mark.parametrize(
    "architecture,changes,words",
    [
        ("DeepseekV2", {"qk_nope_head_dim": 64, "kv_lora_rank": 64, "q_lora_rank": None}, "MLA"),
        ("Bloom", {"n_head": 4, "hidden_size": 256}, "ALiBi"),
        ("Mistral", {"sliding_window": 128}, "no layer with full attention"),
        ("Mamba2", {"num_heads": 8, "head_dim": 64}, "has no attention"),
    ],
)
def test_unsupported_model(
    architecture: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = save_random_checkpoint(tmp_path / "model", architecture, **changes)
    with pytest.raises(TailorKVError, match=words), engine(model, {}):
        pass


SMALL = ("--enforce-eager", "--gpu-memory-utilization", "0.1", "--max-model-len", "256")


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `vllm serve` as a user does."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", *arguments]
    variables = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    # Engines in this process leave them behind.
    for left in ("VLLM_DIST_IDENT", "_TAILORKV_FAILURE"):
        variables.pop(left, None)
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=120, check=False
    )


def test_one_line_at_the_terminal(random_llama: Path) -> None:
    options = json.dumps({"tailorkv": {"bits": 3}})
    result = run_cli(
        str(random_llama), "--attention-backend", "tailorkv", "--additional-config", options
    )
    assert result.returncode == 1
    assert "vllm-tailorkv: error: tailorkv: bits=3: Input should be 1, 2 or 4" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_an_error_of_a_worker_is_the_last_line(tmp_path: Path) -> None:
    """vLLM's processes end one by one, with tracebacks of their own."""
    model = save_random_checkpoint(tmp_path / "model", "Llama", head_dim=48)
    result = run_cli(str(model), "--attention-backend", "tailorkv", *SMALL)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "vllm-tailorkv: error: --attention-backend tailorkv: head size 48 is not"
    )


def test_variables_of_ours_are_known_to_vllm(random_llama: Path) -> None:
    """And those of Kubernetes, for a service called vllm-tailorkv."""
    result = run_cli(
        *(str(random_llama), "--attention-backend", "tailorkv", "--fail-on-environ-validation"),
        # Something that is refused after the environment.
        *("--additional-config", json.dumps({"tailorkv": {"index": "channels"}})),
        VLLM_TAILORKV_CRITICAL_CHANNELS="65",
        VLLM_TAILORKV_PORT="tcp://10.0.0.1:8000",
        VLLM_TAILORKV_SERVICE_HOST="10.0.0.1",
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm-tailorkv: error: critical_channels=65 is more than the 64")


def test_the_variable_of_older_vllms(random_llama: Path) -> None:
    result = run_cli(str(random_llama), VLLM_ATTENTION_BACKEND="tailorkv")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "VLLM_ATTENTION_BACKEND=tailorkv is not read" in last
    assert "--attention-backend tailorkv" in last


def test_missing_extension_at_the_terminal(random_llama: Path, tmp_path: Path) -> None:
    # A module of that name that cannot be loaded, found first.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['vllm_tailorkv._cpu'] = None\n"
    )
    result = run_cli(str(random_llama), "--attention-backend", "tailorkv", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "vllm-tailorkv: error: no implementation of write_kv" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_unknown_vllm_at_the_terminal(random_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'vllm._version':\n"
        "            return importlib.util.spec_from_loader(name, self)\n"
        "    def create_module(self, spec):\n"
        "        return None\n"
        "    def exec_module(self, module):\n"
        "        module.__version__ = '0.47.1'\n"
        "        module.__version_tuple__ = (0, 47, 1)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    result = run_cli(str(random_llama), "--attention-backend", "tailorkv", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "vllm-tailorkv: error: vLLM 0.47.1 is unknown" in result.stderr
    assert "VLLM_PLUGINS" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
