"""The plan survives the way to other processes, and stands in one place."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vllm_tailorkv
from vllm_tailorkv.attention import carried
from vllm_tailorkv.attention.carried import carry_plan, options_of, plan_of
from vllm_tailorkv.config import PRESETS
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import DerivedKind, KeyLayout
from vllm_tailorkv.plan import Plan, make_plan
from vllm_tailorkv.profile import ModelShape

MODEL = ModelShape("some/model", "LlamaForCausalLM", 6, 2, 128, 8)
ROOT = Path(vllm_tailorkv.__file__).parent


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "preset": st.sampled_from(list(PRESETS)),
            "profile": st.builds(
                lambda layers: {"dense_layers": sorted(layers)}, st.sets(st.integers(0, 5))
            ),
            "bits": st.sampled_from([1, 2, 4]),
            "index": st.sampled_from(["onebit", "channels"]),
            "topk_tokens": st.integers(1, 1000),
            "rerank_factor": st.floats(1, 64),
            "fit_codes": st.booleans(),
            "placement": st.sampled_from(["auto", "split"]),
        },
    ),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_json_keeps_all_of_it(options: dict[str, Any], device: str) -> None:
    plan = make_plan(options, MODEL, device=device, host_memory=10 << 30)
    assert Plan.from_json(json.loads(json.dumps(plan.as_json()))) == plan


@pytest.mark.parametrize("index", ["onebit", "channels"])
def test_layouts(index: str) -> None:
    plan = make_plan({"profile": {"dense_layers": [0, 3]}, "index": index, "bits": 1}, MODEL)
    sizes = {"num_kv_heads": 1, "head_size": 128, "block_size": 192, "kv_itemsize": 2}
    layouts = [plan.layout(layer, **sizes) for layer in range(6)]
    kinds = [layout.kind for layout in layouts]
    assert kinds == [
        DerivedKind.DENSE if i in (0, 3) else DerivedKind(index) for i in range(len(layouts))
    ]
    # Channels are read whole where they are the index; K lies twice there alone.
    by_channels = [kind is DerivedKind.CHANNELS for kind in kinds]
    orders = [layout.key_layout is KeyLayout.CHANNEL_MAJOR for layout in layouts]
    assert orders == [layout.key_rows for layout in layouts] == by_channels
    # As long as fits the block.
    assert {layout.group_size for layout in layouts} == {64}


def test_more_channels_than_a_head_has() -> None:
    with pytest.raises(TailorKVError, match="critical_channels=129 is more than the 128 channels"):
        make_plan({"index": "channels", "critical_channels": 129}, MODEL)


def test_a_gpu_reads_rows_over_the_bus() -> None:
    """Pages hold what is derived alone; K lies in rows, once; short contexts are decoded too."""
    plan = make_plan({"profile": {"dense_layers": [0]}}, MODEL, device="cuda", host_memory=10 << 30)
    assert plan.split
    assert plan.host_pool == 6 << 30
    assert plan.config.full_attention_below == 0
    sizes = {"num_kv_heads": 1, "head_size": 128, "block_size": 128, "kv_itemsize": 2}
    for layer in range(6):
        layout = plan.layout(layer, **sizes)
        assert layout.key_layout is KeyLayout.TOKEN_MAJOR
        assert not layout.key_rows
        assert layout.host_bytes == layout.full_bytes
    given = {"full_attention_below": 777, "host_pool_gib": 2, "placement": "split"}
    plan = make_plan(given, MODEL, device="cuda", host_memory=10 << 30)
    assert plan.host_pool == 2 << 30
    assert plan.config.full_attention_below == 777


def test_placements_by_device() -> None:
    with pytest.raises(TailorKVError, match=r'placement="joint".*device memory'):
        make_plan({"placement": "joint"}, MODEL, device="cuda", host_memory=1 << 30)
    with pytest.raises(TailorKVError, match='host_pool_gib=4 needs placement="split", is "auto"'):
        make_plan({"host_pool_gib": 4}, MODEL)
    assert make_plan({"host_pool_gib": 4}, MODEL, device="cuda").host_pool == 4 << 30


def test_a_guard_is_for_cpus() -> None:
    assert make_plan({"guard_share": 0.5}, MODEL).config.guard_share == 0.5
    with pytest.raises(TailorKVError, match=r"guard_share=0\.5 is for CPUs.*leave it out"):
        make_plan({"guard_share": 0.5}, MODEL, device="cuda", host_memory=1 << 30)


def config_with(additional: Any, monkeypatch: pytest.MonkeyPatch, model: ModelShape = MODEL) -> Any:
    monkeypatch.setattr(carried, "model_shape", lambda _: model)
    device = SimpleNamespace(device_type="cpu")
    return SimpleNamespace(additional_config=additional, device_config=device)


def test_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment and the disk say later matters to no process of this engine."""
    options = {"tailorkv": {"bits": 1}, "another plugin": 5}
    config = config_with(options, monkeypatch)
    plan = carry_plan(config)
    assert options == {"tailorkv": {"bits": 1}, "another plugin": 5}, "the user's, left as it is"
    monkeypatch.setenv("VLLM_TAILORKV_BITS", "4")
    assert carry_plan(config) == plan == plan_of(config)
    assert plan.config.bits == 1
    assert config.additional_config["another plugin"] == 5
    # Other options are another plan, although the dict holds this one.
    changed = {**config.additional_config, "tailorkv": {"bits": 2}}
    monkeypatch.delenv("VLLM_TAILORKV_BITS")
    assert carry_plan(config_with(changed, monkeypatch)).config.bits == 2
    # The same options for another model are another plan.
    other = config_with(config.additional_config, monkeypatch, ModelShape("b", "A", 2, 1, 64))
    assert carry_plan(other).layers.num_layers == 2


def test_a_plan_that_is_none() -> None:
    for value in ({}, 5, {"model": {}, "config": {}, "layers": {}}):
        config: Any = SimpleNamespace(additional_config={"tailorkv_plan": value})
        with pytest.raises(TailorKVError, match="ours to write"):
            plan_of(config)


def test_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    for additional in ({}, {"tailorkv": {}}, None):
        with pytest.raises(TailorKVError, match="attention_backend"):
            plan_of(config_with(additional, monkeypatch))


@pytest.mark.parametrize("key", ["bits", "topk_tokens", "profile", "index"])
def test_options_beside_their_section(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    config = config_with({key: 1, "tailorkv": {}}, monkeypatch)
    with pytest.raises(TailorKVError, match=f"has '{key}' beside 'tailorkv'.*inside"):
        options_of(config)


@pytest.mark.parametrize("key", ["tailor_kv", "TailorKV", "tailorKV", "tailorkv_config", "tailokv"])
def test_nearly_our_name(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with pytest.raises(TailorKVError, match=rf"has '{key}'.*the key is 'tailorkv'"):
        options_of(config_with({key: {"bits": 1}}, monkeypatch))


@pytest.mark.parametrize("key", ["other", "kv_tool", "taylor_series"])
def test_other_keys_are_not_ours(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    assert options_of(config_with({key: 1, "tailorkv": {"bits": 2}}, monkeypatch)) == {"bits": 2}


def calls_of(name: str) -> set[str]:
    """The modules of the package that call a function or class of this name."""
    found = set()
    folders = (ROOT, ROOT / "kernels", ROOT / "patches")
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if getattr(called, "id", getattr(called, "attr", None)) == name:
                found.add(path.relative_to(ROOT).as_posix())
    return found


def test_no_second_place_makes_a_layout_or_reads_a_profile() -> None:
    assert calls_of("PageLayout") == {"plan.py"}
    assert calls_of("layer_plan") == {"plan.py"}
    # The other one plans for machines that are not there.
    assert calls_of("make_plan") == {"attention/carried.py", "capacity/command.py"}
