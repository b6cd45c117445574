"""The op `select_topk` beside the CUDA extension, without a GPU: schema, fake, argument checks.

`torch.library.opcheck` needs results, which the C++ kernel gives on the CPU: it shows that the
schema names every tensor that is written and no other, that the fake implementation fits, and that
torch.compile traces the op.
"""

import os
import sys

import pytest
import torch
from build_script import setup_functions
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from vllm_tailorkv.kernels import cuda

OPS = torch.ops.vllm_tailorkv


def not_built() -> str | None:
    try:
        cuda.load()
    except ImportError as error:
        return f"the CUDA extension was NOT built: {error}"
    return None


REASON = not_built()


needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def test_built_where_nvcc_is(monkeypatch):
    """So that the skips below can hide nothing."""
    if os.environ.get("TAILORKV_CUDA") == "0":
        pytest.skip("TAILORKV_CUDA=0 leaves the CUDA extension out")
    if setup_functions(monkeypatch)["find_nvcc"]() is not None:
        assert REASON is None, f"{REASON}; run `pip install --no-build-isolation -e .`"


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def good_arguments() -> dict[str, object]:
    """On the CPU, by name: 2 rows, 2 KV heads."""
    return {
        "indices": torch.empty(2, 2, 7, dtype=torch.int32),
        "scores": torch.randn(2, 2, 100),
        "tail_start": ints(100, 11),
        "sink_tokens": 8,
    }


META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


@needs_library
def test_opcheck():
    opcheck(OPS.select_topk.default, tuple(good_arguments().values()))


@needs_library
def test_compile():
    """Traced whole, without a graph break, and with the same effect."""
    torch.manual_seed(0)
    eager = good_arguments()
    compiled = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in eager.items()
    }
    OPS.select_topk(**eager)
    torch.compile(OPS.select_topk, backend="aot_eager", fullgraph=True)(**compiled)
    for key, value in eager.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, compiled[key]), key


@needs_library
def test_fake():
    """Nothing runs, not even a check of the device."""
    with FakeTensorMode() as mode:
        arguments = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in good_arguments().items()
        }
        assert OPS.select_topk(**arguments) is None


def strided(*shape, dtype=torch.int32):
    """Of this shape, but not contiguous."""
    return torch.zeros(*shape[:-1], shape[-1] * 2, dtype=dtype)[..., ::2]


BAD = [
    ("indices", torch.zeros(2, 2, 7).long(), "indices must be int32"),
    ("indices", torch.zeros(2, 14).int(), r"indices must be \[R, Hk, k\]"),
    ("indices", strided(2, 2, 7), "indices must be contiguous"),
    ("scores", torch.zeros(2, 2, 100).half(), "scores must be float32"),
    ("scores", torch.zeros(2, 3, 100), r"scores must be \[R=2, Hk=2, S"),
    (
        "scores",
        strided(2, 2, 100, dtype=torch.float32),
        "scores must be contiguous in its last axis",
    ),
    ("tail_start", ints(1, 2, 3), r"tail_start must be \[R=2\], is \[3\]"),
    ("tail_start", ints(1, 2).long(), "tail_start must be int32"),
    ("sink_tokens", -1, "sink_tokens must be from 0"),
]


@needs_library
@pytest.mark.parametrize(("argument", "value", "message"), BAD)
def test_bad_argument(argument, value, message):
    """The contract comes before the device: fakes have it as well."""
    arguments = good_arguments() | {argument: value}
    with pytest.raises(RuntimeError, match=f"vllm_tailorkv::select_topk: {message}"):
        OPS.select_topk.default.redispatch(META, *arguments.values())


@needs_library
def test_archs():
    assert {"80", "90"} <= set(OPS.cuda_archs().split())


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_unavailable_without_a_device():
    assert cuda.unavailable() == "torch sees no CUDA device"


def test_missing_extension_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_tailorkv._cuda", None)
    reason = cuda.unavailable()
    assert reason is not None
    assert "TAILORKV_CUDA=1 pip install --no-build-isolation" in reason


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), "80 90", True),
        ((8, 6), "80 90", True),
        ((8, 0), "86 90", False),
        ((7, 5), "80 90", False),
        ((12, 0), "80 90", True),
        ((12, 1), "80 120", True),
        ((10, 0), "90 120", False),
        ((10, 3), "90 100 120", True),
    ],
)
def test_which_devices_a_build_runs_on(capability, archs, runs):
    reason = cuda.unsupported(capability, archs)
    assert (reason is None) == runs
    if reason is not None:
        assert f"TAILORKV_CUDA_ARCHS={capability[0]}{capability[1]}" in reason
