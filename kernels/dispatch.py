"""Which implementation of an op runs, and why.

An implementation is a module with one function for each op it has, and a function
`unavailable() -> str | None` that gives the reason why it cannot run here. Some have a few ops
only: one that is asked for by name runs the ops that it has, those that are made of others are
made of them, and the fastest available one runs the rest.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from vllm_tailorkv import envs
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels.library import checked

OPS = (
    "write_kv",
    "quantize_groups",
    "append_tokens",
    "quantized_decode_attention",
    "log_mass",
    "score_tokens",
    "select_topk",
    "propose_topk",
    "rerank_topk",
    "retrieve_topk",
    "sparse_decode_attention",
    "stage_rows",
    "retrieve_attention",
    "exact_attention",
    "dense_preference",
)

ON_CPUS = ("exact_attention",)
"""Ops that CPUs alone need: on GPUs libraries attend to prompts."""

GPU_OPS = tuple(op for op in OPS if op not in ON_CPUS)
"""Ops that GPUs need."""

IMPLEMENTATIONS = {
    "cpu": "C++ with OpenMP",
    "cuda": "CUDA C++",
    "triton": "Triton",
    "composed": "other ops, one after another",
    "plain": "a few calls of torch",
    "reference": "plain torch",
}
"""Names and what they are, fastest first."""

COMPILED = ("cpu", "cuda")
"""Those behind torch's dispatcher."""

DEVICES = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "composed": ("cpu", "cuda"),
    "plain": ("cuda",),
    "reference": ("cpu", "cuda"),
}
"""Device types each implementation takes."""

NAMED = tuple(name for name in IMPLEMENTATIONS if name not in ("composed", "plain"))
"""What VLLM_TAILORKV_KERNELS may ask for: not what stands in for others."""


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


def obstacle(name: str, device_type: str) -> str | None:
    """Why the implementation `name` can run no op for tensors on `device_type`, or None."""
    if device_type not in devices(name):
        return f"{name} does not run on {device_type}"
    why = unavailable(name)
    return f"{name}: {why}" if why else None


def choose(op: str, device_type: str) -> Choice:
    """The implementation of `op` for tensors on `device_type`.

    Raises:
        TailorKVError: the one asked for by name is unknown, unavailable or not for the
            device; or no fast implementation is available and none was named.
    """
    return _choose(op, device_type, envs.kernels())


def forget() -> None:
    """Choose anew: what is available may have changed."""
    _choose.cache_clear()
    unavailable.cache_clear()


@cache
def _choose(op: str, device_type: str, wanted: str | None) -> Choice:
    if wanted is not None and wanted not in NAMED:
        raise TailorKVError(
            f"VLLM_TAILORKV_KERNELS={wanted} is unknown; choose one of {', '.join(NAMED)}"
        )
    # Thousands of times slower on CPUs, these run there on request alone.
    slow = ("triton", "reference") if device_type == "cpu" else ()
    names = [name for name in IMPLEMENTATIONS if name not in slow]
    if wanted is not None:
        # Where it cannot run at all, no other one takes its place.
        others = [] if obstacle(wanted, device_type) else ["composed", *names]
        names = list(dict.fromkeys([wanted, *others]))
    reasons = []
    for name in names:
        if why := obstacle(name, device_type):
            reasons.append(why)
            continue
        module = importlib.import_module(f"vllm_tailorkv.kernels.{name}")
        if not hasattr(module, op):
            reasons.append(f"{name} has no {op}")
            continue
        reason = "the fastest available"
        if wanted is not None:
            reason = "asked for by name" if name == wanted else f"{reason}; {wanted} has none"
        function = getattr(module, op)
        # The C++ ops check their arguments themselves.
        if name not in COMPILED:
            function = checked(op, function)
        return Choice(op, name, reason, function)
    remedy = (
        "Build the extension (`pip install --no-build-isolation .` with a C++ compiler), or set "
        "VLLM_TAILORKV_KERNELS=reference to run without it, slowly"
    )
    if wanted is not None:
        remedy = "Unset VLLM_TAILORKV_KERNELS"
    raise TailorKVError(
        f"no implementation of {op} on {device_type}: {'; '.join(reasons)}. {remedy}"
    )


def implementation(op: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` for tensors where `tensor` is."""
    return choose(op, tensor.device.type).function
