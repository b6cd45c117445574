"""Which implementation runs, and what users read when none can."""

import os
import subprocess
import sys

import pytest
import torch

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels import cpu, cuda, dispatch, ops, triton


@pytest.fixture(autouse=True)
def fresh_choices():
    def clear():
        dispatch.forget()

    clear()
    yield
    clear()


def topk():
    indices = torch.zeros(1, 1, 1, dtype=torch.int32)
    scores = torch.tensor([[[0.0, 2.0, 1.0]]])
    ops.select_topk(indices, scores, torch.tensor([3], dtype=torch.int32), sink_tokens=0)
    return indices.item()


def test_unknown_name(monkeypatch):
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "fastest")
    with pytest.raises(TailorKVError, match="fastest is unknown"):
        topk()


def test_reference_by_name(monkeypatch):
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "reference")
    assert topk() == 1
    choice = dispatch.choose("select_topk", "cpu")
    assert (choice.name, choice.reason) == ("reference", "asked for by name")


def test_cpu_by_default(monkeypatch):
    monkeypatch.delenv("VLLM_TAILORKV_KERNELS", raising=False)
    if cpu.unavailable():
        pytest.skip("no C++ extension")
    assert topk() == 1
    assert dispatch.choose("select_topk", "cpu").name == "cpu"


def test_triton_on_cpu_tensors_by_name_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "triton")
    assert dispatch.choose("write_kv", "cpu").name == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch.forget()
    with pytest.raises(TailorKVError, match="triton does not run on cpu"):
        dispatch.choose("write_kv", "cpu")


def test_ops_that_the_named_one_lacks(monkeypatch):
    if cpu.unavailable():
        pytest.skip("no C++ extension")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "triton")
    assert topk() == 1
    choice = dispatch.choose("select_topk", "cpu")
    assert (choice.name, choice.reason) == ("cpu", "the fastest available; triton has none")


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU and every extension: what is chosen, not what it computes."""
    try:
        cuda.load()
    except ImportError:
        pytest.skip("no CUDA extension")
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unavailable", lambda: None)


@pytest.mark.parametrize("name", [None, "cuda", "triton", "reference"])
def test_gpus(monkeypatch, gpu, name):
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", name or "")
    for op in dispatch.GPU_OPS:
        choice = dispatch.choose(op, "cuda")
        has_it = "cuda" if op == "select_topk" else "triton"
        if name == "reference":
            has_it = "reference"
        # What was not asked for takes the place of nothing that is made of others.
        alone = op == "propose_topk"
        at_once = ("append_tokens", "retrieve_topk", "retrieve_attention")
        if alone or (op in at_once and name in ("cuda", "reference")):
            has_it = "composed"
        assert choice.name == has_it
        if name is None:
            assert choice.reason == "the fastest available"
        elif choice.name == name:
            assert choice.reason == "asked for by name"
        else:
            assert choice.reason == f"the fastest available; {name} has none"


@pytest.mark.parametrize("name", [None, "triton"])
def test_gpus_without_the_cuda_extension(monkeypatch, gpu, name):
    """nvcc is optional, and the reference no substitute: it waits for the device."""
    monkeypatch.setattr(cuda, "unavailable", lambda: "it was not built")
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", name or "")
    assert dispatch.choose("select_topk", "cuda").name == "plain"
    for op in dispatch.GPU_OPS:
        assert dispatch.choose(op, "cuda").name in ("triton", "composed", "plain")


def test_a_named_one_that_cannot_run_is_an_error_for_every_op(monkeypatch, gpu):
    monkeypatch.setattr(cuda, "unavailable", lambda: "it was not built")
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "cuda")
    for op in dispatch.OPS:
        with pytest.raises(TailorKVError, match="cuda: it was not built"):
            dispatch.choose(op, "cuda")
        with pytest.raises(TailorKVError, match="cuda does not run on cpu"):
            dispatch.choose(op, "cpu")


def test_triton_first_on_gpus(monkeypatch):
    monkeypatch.delenv("VLLM_TAILORKV_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # available without a GPU
    assert dispatch.choose("write_kv", "cuda").name == "triton"


def test_triton_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(TailorKVError, match="there is no GPU"):
        dispatch.choose("write_kv", "cuda")


def test_missing_extension_names_the_remedy(monkeypatch):
    monkeypatch.delenv("VLLM_TAILORKV_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, "vllm_tailorkv._cpu", None)
    with pytest.raises(TailorKVError, match="pip install --no-build-isolation"):
        topk()


@pytest.mark.parametrize("name", ["avx9000", "portable"])
def test_instruction_set_by_name(name):
    if cpu.unavailable():
        pytest.skip("no C++ extension")
    code = (
        "import torch; from vllm_tailorkv.kernels import cpu; "
        "print(cpu.unavailable()); print(torch.ops.vllm_tailorkv.isa())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_TAILORKV_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    if name == "portable":
        assert result.stdout.split() == ["None", "portable"]
    else:
        assert "TailorKVError: VLLM_TAILORKV_CPU_ISA=avx9000 is unknown" in result.stderr
