"""Which layers are dense: published, given, beside the model, or nothing known."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from vllm_tailorkv.config import DensePlan
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.profile import LayerPlan, ModelShape, layer_plan

PUBLISHED: list[tuple[str, str, tuple[int, int, int], tuple[int, ...]]] = [
    # name, architecture, (layers, KV heads, head size), dense layers
    ("meta-llama/Llama-3.1-8B-Instruct", "LlamaForCausalLM", (32, 8, 128), (0,)),
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", "LlamaForCausalLM", (32, 8, 128), (0,)),
    ("meta-llama/Llama-3.1-70B-Instruct", "LlamaForCausalLM", (80, 8, 128), (0,)),
    ("meta-llama/Meta-Llama-3.1-70B-Instruct", "LlamaForCausalLM", (80, 8, 128), (0,)),
    ("mistralai/Mistral-7B-Instruct-v0.3", "MistralForCausalLM", (32, 8, 128), (0,)),
    ("togethercomputer/Llama-2-7B-32K-Instruct", "LlamaForCausalLM", (32, 32, 128), (0, 1)),
    ("01-ai/Yi-6B-200K", "LlamaForCausalLM", (32, 4, 128), (0, 1)),
    ("01-ai/Yi-9B-200K", "LlamaForCausalLM", (48, 4, 128), (0, 1)),
]
MEASURED: list[tuple[str, str, tuple[int, int, int], tuple[int, ...]]] = [
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "LlamaForCausalLM", (30, 3, 64), (0,)),
    ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen2ForCausalLM", (24, 2, 64), (22, 23)),
]
SHAPE = ModelShape("some/model", "LlamaForCausalLM", 32, 8, 128)


def content(**changes: Any) -> dict[str, Any]:
    """A profile that fits `SHAPE`, with changes; None leaves a key out."""
    profile: dict[str, Any] = {
        "schema_version": 1,
        "architecture": "LlamaForCausalLM",
        "num_layers": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "dense_layers": [0, 5],
    }
    return {key: value for key, value in (profile | changes).items() if value is not None}


def written(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps(content(**changes)))
    return str(path)


@pytest.mark.parametrize("suffix", ["", "-AWQ", "-AWQ-INT4", "/"])
@pytest.mark.parametrize(("name", "architecture", "sizes", "dense"), PUBLISHED + MEASURED)
def test_known(
    name: str,
    architecture: str,
    sizes: tuple[int, int, int],
    dense: tuple[int, ...],
    suffix: str,
) -> None:
    plan = layer_plan(None, ModelShape(name + suffix, architecture, *sizes))
    assert plan.dense == dense
    assert not plan.is_fallback
    published = (name, architecture, sizes, dense) in PUBLISHED
    assert plan.source.startswith("published for " if published else "measured for ")
    assert plan.sparse == tuple(i for i in range(sizes[0]) if i not in dense)
    assert [plan.is_dense(i) for i in range(3)] == [i in dense for i in range(3)]


def test_every_known_profile_is_tested() -> None:
    data = files("vllm_tailorkv") / "data" / "profiles.json"
    profiles = json.loads(data.read_text())["profiles"]
    tested = {name.rpartition("/")[2].lower() for name, *_ in PUBLISHED + MEASURED}
    assert {alias for entry in profiles for alias in entry["names"]} == tested


@pytest.mark.parametrize("where", ["elsewhere/", "/data/models/", ""])
def test_published_wherever_it_lies(where: str) -> None:
    shape = ModelShape(f"{where}LLAMA-3.1-8b-instruct", "LlamaForCausalLM", 32, 8, 128)
    assert layer_plan(None, shape).dense == (0,)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("MistralForCausalLM", (32, 8, 128)),
        ("LlamaForCausalLM", (16, 8, 128)),
        ("LlamaForCausalLM", (32, 4, 128)),
        ("LlamaForCausalLM", (32, 8, 64)),
    ],
)
def test_published_name_with_another_shape(architecture: str, sizes: tuple[int, int, int]) -> None:
    name = "meta-llama/Llama-3.1-8B-Instruct"
    plan = layer_plan(None, ModelShape(name, architecture, *sizes))
    assert plan.is_fallback
    assert plan.dense == ()


def test_nothing_is_guessed() -> None:
    plan = layer_plan(None, ModelShape("some/model", "LlamaForCausalLM", 3, 8, 128))
    assert plan == LayerPlan((), 3, "no profile", is_fallback=True)
    assert plan.sparse == (0, 1, 2)


def test_path(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.json", note="kept for its reader", scores=[0.5])
    assert layer_plan(path, SHAPE) == LayerPlan((0, 5), 32, path)


def test_path_wins_over_published_and_neighbour(tmp_path: Path) -> None:
    written(tmp_path / "tailorkv.json", dense_layers=[7])
    shape = ModelShape(str(tmp_path), "LlamaForCausalLM", 32, 8, 128)
    path = written(tmp_path / "mine.json", dense_layers=[9])
    assert layer_plan(path, shape).dense == (9,)


def test_neighbour(tmp_path: Path) -> None:
    model = tmp_path / "Llama-3.1-8B-Instruct"  # wins over the published one
    model.mkdir()
    path = written(model / "tailorkv.json", dense_layers=[7])
    shape = ModelShape(str(model), "LlamaForCausalLM", 32, 8, 128)
    assert layer_plan(None, shape) == LayerPlan((7,), 32, path)


def test_neighbour_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    written(tmp_path / "tailorkv.json", head_size=64)
    shape = ModelShape(str(tmp_path), "LlamaForCausalLM", 32, 8, 128)
    with pytest.raises(TailorKVError, match="head_size 64, the model has 128"):
        layer_plan(None, shape)


def test_given_layers() -> None:
    plan = layer_plan(DensePlan(dense_layers=(9, 0, 9)), SHAPE)
    assert plan.dense == (0, 9)
    assert not plan.is_fallback
    assert layer_plan(DensePlan(dense_layers=()), SHAPE).sparse == tuple(range(32))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "MistralForCausalLM"}, "architecture MistralForCausalLM.*LlamaForCausalLM"),
    ({"num_layers": 80}, "num_layers 80, the model has 32"),
    ({"num_kv_heads": 4}, "num_kv_heads 4, the model has 8"),
    ({"head_size": 64}, "head_size 64, the model has 128"),
    ({"head_size": 0}, "head_size: .*greater than 0"),
    ({"num_layers": "many"}, "num_layers: .*integer"),
    ({"schema_version": 2}, "schema_version 2; .* reads 1"),
    ({"schema_version": None}, "schema_version: .*required"),
    ({"dense_layers": None}, "dense_layers: .*required"),
    ({"dense_layers": 0}, "dense_layers: "),
    ({"dense_layers": [0, 32]}, r"dense_layers names layers \[32\].*layers 0 to 31"),
    ({"dense_layers": [-1]}, r"dense_layers names layers \[-1\].*layers 0 to 31"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "mine.json", **changes)
    with pytest.raises(TailorKVError, match=message) as caught:
        layer_plan(path, SHAPE)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", [-1, 32])
def test_given_layer_out_of_range(layer: int) -> None:
    with pytest.raises(TailorKVError, match="dense_layers") as caught:
        layer_plan(DensePlan(dense_layers=(0, layer)), SHAPE)
    assert f"[{layer}]" in str(caught.value)
    assert "0 to 31" in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe\x00", b"dense_layers: [0]"])
def test_malformed(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text)
    with pytest.raises(TailorKVError, match="is no JSON") as caught:
        layer_plan(str(path), SHAPE)
    assert str(path) in str(caught.value)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[0, 1]")
    with pytest.raises(TailorKVError) as caught:
        layer_plan(str(path), SHAPE)
    assert str(path) in str(caught.value)
    assert ": :" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(TailorKVError, match="give the path") as caught:
        layer_plan(path, SHAPE)
    assert path.rstrip("/.") in str(caught.value)


def test_a_snapshot_of_the_hubs_cache_keeps_its_name() -> None:
    name = "cache/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0123abc"
    plan = layer_plan(None, ModelShape(name, "LlamaForCausalLM", 32, 8, 128))
    assert plan.dense == (0,)
