"""The ops in C++ with OpenMP (`csrc/cpu`): AVX-512, AVX2 or portable, chosen at run time."""

import importlib
from collections.abc import Callable
from typing import Any

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels import library


def unavailable() -> str | None:
    """Why the extension cannot be loaded, or None.

    Raises:
        TailorKVError: VLLM_TAILORKV_CPU_ISA asks for what the processor lacks.
    """
    try:
        importlib.import_module("vllm_tailorkv._cpu")
    except ImportError as error:
        return (
            f"the C++ extension cannot be loaded ({error}); "
            "build it with `pip install --no-build-isolation .`"
        )
    try:
        library.OPS.isa()
    except RuntimeError as error:
        raise TailorKVError(str(error).splitlines()[0]) from error
    return None


def __getattr__(op: str) -> Callable[..., Any]:
    return library.compiled(op, "CPU", __name__)
