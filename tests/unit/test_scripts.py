"""Where programs are looked for."""

import os
import sys
import sysconfig
from pathlib import Path

import pytest

from vllm_tailorkv.scripts import find_script


def program(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vllm"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_first_the_environment_then_the_user_then_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    beside, user, path = (tmp_path / name for name in ("env", "user", "path"))
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *scheme: str(user if scheme else beside)
    )
    monkeypatch.setenv("PATH", os.pathsep.join(["/nowhere", str(path)]))
    assert find_script("vllm") is None
    for folder in (path, user, beside):
        expected = program(folder)
        assert find_script("vllm") == expected


def test_what_cannot_be_run_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path(program(tmp_path)).chmod(0o644)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_script("vllm") is None
