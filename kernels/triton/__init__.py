"""The ops in Triton, for NVIDIA GPUs; on CPU tensors under `TRITON_INTERPRET=1`, to test them.

Kernels read host pages in place: a tensor of pinned memory seen from the device
(`cache.device_view`) is as good as one on the device. Grids follow from shapes and lengths
are read on the device, so that a CUDA graph can capture every op but `dense_preference`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from vllm_tailorkv import envs

_MODULES = {
    "write_kv": "write",
    "quantize_groups": "quantize",
    "append_tokens": "quantize",
    "quantized_decode_attention": "dense",
    "log_mass": "mass",
    "score_tokens": "score",
    "rerank_topk": "rerank",
    "retrieve_topk": "retrieve",
    "sparse_decode_attention": "sparse",
    "retrieve_attention": "retrieve",
    "stage_rows": "stage",
    "dense_preference": "preference",
}
"""Op to the module of its kernels: Triton is imported when the first one is asked for."""


def unavailable() -> str | None:
    """Why no kernel can run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; install it with `pip install triton`"
    if not torch.cuda.is_available() and not envs.triton_interpreted():
        return "there is no GPU (TRITON_INTERPRET=1 runs it on the CPU, very slowly)"
    return None


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no {name}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    function: Callable[..., Any] = getattr(module, name)
    return function
