"""What the start-up log says of the plan, and that it says it once."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tailorkv.attention import report
from vllm_tailorkv.cache.sizing import CacheSizing
from vllm_tailorkv.plan import Plan, make_plan
from vllm_tailorkv.profile import ModelShape

SHAPE = ModelShape("me/unknown", "UnknownForCausalLM", 4, 2, 64, 4)
PROFILE = {"dense_layers": [0, 1]}
SIZING = CacheSizing((0, 1), (2, 3), 128, 128_000, 128_000, 12_800, 0, False, 2, 64)
Tell = Callable[..., None]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    said: list[str] = []

    def log(text: str, *arguments: object) -> None:
        said.append(text % arguments)

    logger = SimpleNamespace(info=log, info_once=log, warning_once=log)
    monkeypatch.setattr(report, "logger", logger)
    monkeypatch.setattr(report, "publish", lambda: None)
    return said


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Both calls, so that what is told here is forgotten afterwards.
    monkeypatch.setenv(report._TOLD, "")
    monkeypatch.delenv(report._TOLD)
    yield


def plan(**options: Any) -> Plan:
    return make_plan({"profile": PROFILE, **options}, SHAPE)


def in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.multiprocessing, "parent_process", lambda: "the one before")


def test_two_lines_tell_the_plan(lines: list[str]) -> None:
    report.tell_plan(plan(), SIZING, [])
    assert len(lines) == 2
    assert lines[0].startswith("TailorKV: dense layers (quantized to 2 bit): 0-1; sparse layers: 2")
    assert "contexts up to 2,048 tokens" in lines[1]


def test_windowed_layers_are_named(lines: list[str]) -> None:
    report.tell_plan(plan(), SIZING, [1, 2])
    assert "0; sparse layers: 3; left to vLLM: 1-2; from" in lines[0]
    assert "the profile calls layers 1 dense" in lines[2]


def test_layers_that_share_are_named(lines: list[str]) -> None:
    report.tell_plan(plan(profile={"dense_layers": [1, 3]}), SIZING, [2], [2, 3])
    assert "): 1; sparse layers: 0; as the layer whose K and V they read: 3; left to" in lines[0]
    assert "calls layers 3 dense, which read K and V of an earlier layer" in lines[2]


def test_a_missing_profile_is_a_warning(lines: list[str]) -> None:
    report.tell_plan(make_plan(None, SHAPE), SIZING, [])
    assert len(lines) == 3
    assert "no profile is known for me/unknown" in lines[2]
    assert lines[2].endswith("vllm-tailorkv identify me/unknown")


def test_processes_that_are_started_do_not_repeat_it(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report.tell_plan(plan(), SIZING, [])
    told = list(lines)
    in_a_child(monkeypatch)
    report.tell_plan(plan(), SIZING, [])
    assert lines == told
    # Another engine, which they start themselves.
    report.tell_plan(plan(bits=4), SIZING, [])
    assert len(lines) == 4


def test_another_program_speaks_for_itself(lines: list[str]) -> None:
    """It has the environment of the script that started it, where another engine had run."""
    report.tell_plan(plan(), SIZING, [])
    assert os.environ[report._TOLD]
    report.tell_plan(plan(), SIZING, [])
    assert len(lines) == 4


def config(workers: int = 1, engine: int = 0) -> Any:
    parallel = SimpleNamespace(world_size=workers, data_parallel_index=engine)
    model = SimpleNamespace(max_model_len=4096)
    return SimpleNamespace(parallel_config=parallel, model_config=model)


def test_two_lines_tell_the_sizes(lines: list[str]) -> None:
    report.tell_sizes(config(), SIZING, 9)
    assert len(lines) == 2
    assert lines[0].startswith("TailorKV host tier: 1,000 bytes a token in vLLM's pages, 0.00 GiB")
    assert "; derived tier: 100 bytes a token" in lines[0]
    assert lines[1].startswith("TailorKV 9 blocks of 128 tokens: 1,024 tokens; ")
    report.tell_sizes(config(workers=2), SIZING, 9)
    assert lines[2].startswith("TailorKV, 2 workers together, host tier: ")


def test_engines_that_are_alike_say_it_once(lines: list[str]) -> None:
    report.tell_sizes(config(engine=1), SIZING, 9)
    assert not lines
