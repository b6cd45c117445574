"""Every C++ header compiles by itself, as an editor opens it, and includes what it uses."""

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent / "include"
INCLUDES = [TORCH, TORCH / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
HEADERS = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.h")])
if platform.machine() != "x86_64":
    X86 = ("avx", "lut", "_256", "exact_bf16", "exact_pairs", "exact_tiles")
    HEADERS = [path for path in HEADERS if not any(part in path.name for part in X86)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_header(header: Path, tmp_path: Path) -> None:
    # As a source that includes it: the compiler warns of `#pragma once` in a main file.
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\n')
    result = subprocess.run(
        [
            *("g++", "-std=c++20", "-fopenmp", "-fsyntax-only", "-Wall", "-Wno-unused-function"),
            *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"),
            *(f"-isystem{path}" for path in INCLUDES),
            str(source),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "error" not in result.stderr
