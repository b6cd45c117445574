"""The CUDA sources under nvcc, and the switches of setup.py. No GPU is needed.

Without nvcc nothing here can run: the tests are skipped and say so, or fail where
TAILORKV_REQUIRE_NVCC=1 says that nvcc is expected.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from build_script import ROOT, setup_functions

ARCHS = ["80", "90"]

MOST_REGISTERS = {
    # Three blocks of 512 threads on a multiprocessor of 65536 registers.
    "select_tokens": 40,
}
"""Bounds that keep a multiprocessor as full as each kernel needs it."""


@pytest.fixture
def nvcc(monkeypatch):
    found = setup_functions(monkeypatch)["find_nvcc"]()
    if found is None:
        message = "nvcc was not found: the CUDA kernel was NOT compiled"
        if os.environ.get("TAILORKV_REQUIRE_NVCC") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return found


def resources(log: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` says of each kernel, by its mangled name."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        found[name] = {
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "registers": int(registers),
        }
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills(nvcc, monkeypatch, tmp_path, arch, record_property):
    flags = setup_functions(monkeypatch)["NVCC_FLAGS"]
    command = [str(nvcc), *flags, "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", f"-DTAILORKV_CUDA_ARCHS={arch}"]
    command += ["-c", str(ROOT / "csrc/cuda/launch.cu"), "-o", str(tmp_path / "launch.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = resources(result.stderr)
    assert len(kernels) == 1
    for name, used in kernels.items():
        record_property(name, used)
        kernel = next(kernel for kernel in MOST_REGISTERS if re.search(rf"\d{kernel}I", name))
        assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, (name, used)
        assert used["registers"] <= MOST_REGISTERS[kernel], (name, used)
    bounded = {
        kernel
        for kernel in MOST_REGISTERS
        if any(re.search(rf"\d{kernel}I", name) for name in kernels)
    }
    assert bounded == set(MOST_REGISTERS)


def test_every_source_is_compiled():
    """A header that launch.cu and the binding do not lead to would be tested by nothing."""
    seen, waiting = set(), ["launch.cu", "binding.cpp"]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            if name.startswith("../"):
                continue  # shared with the other extension
            seen.add(name)
            text = (ROOT / "csrc/cuda" / name).read_text()
            waiting += re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    assert seen == {path.name for path in (ROOT / "csrc/cuda").iterdir()}


def test_default_archs(nvcc, monkeypatch):
    monkeypatch.delenv("TAILORKV_CUDA_ARCHS", raising=False)
    archs = setup_functions(monkeypatch)["cuda_archs"](nvcc)
    assert {"80", "90"} <= set(archs)
    assert archs == sorted(archs, key=int)


@pytest.mark.parametrize("text", ["90 80", "80;90", " 80,90 "])
def test_archs_by_name(nvcc, monkeypatch, text):
    functions = setup_functions(monkeypatch, TAILORKV_CUDA_ARCHS=text)
    assert functions["cuda_archs"](nvcc) == ["80", "90"]


def test_unknown_arch(nvcc, monkeypatch):
    functions = setup_functions(monkeypatch, TAILORKV_CUDA_ARCHS="80 35")
    with pytest.raises(SystemExit, match="does not know 35; choose from"):
        functions["cuda_archs"](nvcc)


def hide_nvcc(monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name != "nvcc" and is_file(path))


def test_builds_without_nvcc(monkeypatch):
    hide_nvcc(monkeypatch)
    assert setup_functions(monkeypatch, TAILORKV_CUDA="auto")["cuda_extension"]() is None


def test_asked_for_without_nvcc(monkeypatch):
    hide_nvcc(monkeypatch)
    with pytest.raises(SystemExit, match="nvcc was not found; install the CUDA toolkit"):
        setup_functions(monkeypatch, TAILORKV_CUDA="1")


def test_left_out_on_request(monkeypatch):
    assert setup_functions(monkeypatch, TAILORKV_CUDA="0")["cuda_extension"]() is None


def test_unknown_switch(monkeypatch):
    with pytest.raises(SystemExit, match="TAILORKV_CUDA=yes is unknown"):
        setup_functions(monkeypatch, TAILORKV_CUDA="yes")


def test_named_folder_comes_first(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    functions = setup_functions(monkeypatch, TAILORKV_CUDA="0", CUDA_HOME=str(tmp_path))
    assert functions["find_nvcc"]() == tmp_path / "bin/nvcc"


def test_importing_costs_nothing():
    """Neither the extension nor a CUDA library is loaded before an op is wanted."""
    code = (
        "import sys; from vllm_tailorkv.kernels import cuda; "
        "print('vllm_tailorkv._cuda' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
