"""setup.py as a module, run without building anything."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def setup_functions(
    monkeypatch: pytest.MonkeyPatch, **environment: str
) -> dict[str, Callable[..., Any]]:
    """The functions and constants of setup.py under these environment variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))
