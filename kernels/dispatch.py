"""Which implementation of an op runs, and why.

An implementation is a module with one function for each op it has, and a function
`unavailable() -> str | None` that gives the reason why it cannot run here.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vllm_tailorkv import envs
from vllm_tailorkv.errors import TailorKVError

OPS = (
    "write_kv",
    "quantize_groups",
    "quantized_decode_attention",
    "score_tokens",
    "select_topk",
    "refine_topk",
    "sparse_decode_attention",
    "dense_preference",
)

IMPLEMENTATIONS = {
    "cpu": "C++ with OpenMP",
    "triton": "Triton",
    "reference": "plain torch",
}
"""Names and what they are, fastest first."""

DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "reference": ("cpu", "cuda")}
"""Device types each implementation takes."""


@dataclass(frozen=True)
class Choice:
    """The implementation of one op on one device type, and why it was chosen."""

    op: str
    name: str
    reason: str
    function: Callable[..., Any]


def devices(name: str) -> tuple[str, ...]:
    """Device types the implementation `name` takes in this process."""
    if name == "triton" and envs.triton_interpreted():
        return ("cpu", "cuda")
    return DEVICES[name]


@cache
def unavailable(name: str) -> str | None:
    """Why the implementation `name` cannot run here, or None if it can."""
    module = importlib.import_module(f"vllm_tailorkv.kernels.{name}")
    reason: str | None = module.unavailable()
    return reason


@cache
def choose(op: str, device_type: str) -> Choice:
    """The implementation of `op` for tensors on `device_type`.

    Raises:
        TailorKVError: the one asked for by name is unknown, lacks the op or the device,
            or is unavailable; or no fast implementation is available and none was named.
    """
    wanted = envs.kernels()
    if wanted is not None and wanted not in IMPLEMENTATIONS:
        raise TailorKVError(
            f"VLLM_TAILORKV_KERNELS={wanted} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    reasons = []
    for name in [wanted] if wanted is not None else list(IMPLEMENTATIONS):
        if name in ("triton", "reference") and wanted is None and device_type == "cpu":
            # Thousands of times slower there: only ever on request.
            continue
        if device_type not in devices(name):
            reasons.append(f"{name} does not run on {device_type}")
            continue
        if why := unavailable(name):
            reasons.append(f"{name}: {why}")
            continue
        module = importlib.import_module(f"vllm_tailorkv.kernels.{name}")
        if not hasattr(module, op):
            reasons.append(f"{name} has no {op}")
            continue
        reason = "asked for by name" if wanted is not None else "the fastest available"
        return Choice(op, name, reason, getattr(module, op))
    raise TailorKVError(
        f"no implementation of {op} on {device_type}: {'; '.join(reasons)}. Build the extension "
        "(`pip install --no-build-isolation .` with a C++ compiler), or set "
        "VLLM_TAILORKV_KERNELS=reference to run without it, slowly"
    )


def implementation(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` for tensors where `tensor` is."""
    return choose(op, tensor.device.type).function
