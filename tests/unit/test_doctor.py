"""The report never fails, and never calls ready what cannot serve."""

import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum

from vllm_tailorkv import doctor
from vllm_tailorkv.kernels.dispatch import forget

READY = "Ready"


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = doctor.run()
    return status, " ".join(capsys.readouterr().out.split())


def test_ready(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
    status, text = report(capsys)
    assert status == 0
    assert READY in text
    # What runs, not what could be composed.
    assert "retrieve_topk cpu" in text


def test_another_platform(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.ROCM)
    monkeypatch.setattr(type(current_platform), "device_name", "rocm")
    status, text = report(capsys)
    assert status == 1
    assert READY not in text
    assert "rocm, where tailorkv cannot serve" in text
    assert "Ops on cuda" not in text


def test_gpus_of_which_torch_sees_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    status, text = report(capsys)
    forget()
    assert status == 1
    assert READY not in text
    assert "Ops on cuda" in text
    assert "no GPU has served yet" in text
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
    status, text = report(capsys)
    assert status == 1
    assert READY not in text
    assert words in text


@pytest.mark.parametrize(
    "check",
    [name for name in vars(doctor) if name.startswith("_check_")],
)
def test_a_check_that_fails_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: str
) -> None:
    def broken() -> doctor.Finding:
        raise OSError("the disk is gone")

    broken.__name__ = check
    monkeypatch.setattr(doctor, check, broken)
    status, text = report(capsys)
    assert status == 1
    assert READY not in text
    assert "OSError: the disk is gone" in text
