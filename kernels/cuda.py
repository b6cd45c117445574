"""What Triton does badly, in CUDA C++ (`csrc/cuda`): selection.

Importing this module costs nothing and needs no GPU. The op is that of `library.OPS` for CUDA
tensors once `unavailable()` or `load()` was called; it runs on torch's current stream, never waits
for the device, and a CUDA graph can capture it: its grid depends on shapes alone.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from vllm_tailorkv.kernels.library import OPS, compiled

_REMEDY = (
    "build it with `TAILORKV_CUDA=1 pip install --no-build-isolation .` where nvcc is installed"
)


def load() -> None:
    """Register the op, the schemas first; no GPU is needed.

    Raises:
        ImportError: an extension was not built.
    """
    importlib.import_module("vllm_tailorkv._cpu")
    importlib.import_module("vllm_tailorkv._cuda")


def unavailable() -> str | None:
    """Why the CUDA op cannot run here, or None."""
    try:
        load()
    except ImportError as error:
        return f"the CUDA extension cannot be loaded ({error}); {_REMEDY}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    device = torch.cuda.get_device_capability()
    return unsupported(device, OPS.cuda_archs())


def unsupported(capability: tuple[int, int], archs: str) -> str | None:
    """Why a build for `archs` does not run on a device, or None.

    Args:
        capability: major and minor compute capability.
        archs: what was compiled for, such as "80 90"; the last one as PTX too.
    """
    compiled = [(int(arch[:-1]), int(arch[-1])) for arch in re.findall(r"\d+", archs)]
    # Machine code runs on later minors of its major, PTX on everything later.
    runs = any(major == capability[0] and minor <= capability[1] for major, minor in compiled)
    if runs or capability >= compiled[-1]:
        return None
    return (
        f"the CUDA extension was built for {archs}, the device has compute capability "
        f"{capability[0]}.{capability[1]}; rebuild with TAILORKV_CUDA_ARCHS="
        f"{capability[0]}{capability[1]}"
    )


def __getattr__(op: str) -> Callable[..., Any]:
    """`select_topk` of `ops.py`.

    NaN is the largest score, or the smallest if negative. Calls on one device must
    come one after another, as those of one stream do: they share counters.
    """
    return compiled(op, "CUDA", __name__)
