"""What Triton does badly, in CUDA C++ (`csrc/cuda`): selection, gathering, packing.

Importing this module costs nothing and needs no GPU. The ops are those of `library.OPS` for CUDA
tensors once `unavailable()` or `load()` was called; they run on torch's current stream, never wait
for the device, and a CUDA graph can capture them: grids depend on shapes alone.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from vllm_tailorkv.kernels.library import OPS, compiled
from vllm_tailorkv.kernels.types import ChannelIndex

_REMEDY = (
    "build it with `TAILORKV_CUDA=1 pip install --no-build-isolation .` where nvcc is installed"
)


def load() -> None:
    """Register the ops, their schemas first; no GPU is needed.

    Raises:
        ImportError: an extension was not built.
    """
    importlib.import_module("vllm_tailorkv._cpu")
    importlib.import_module("vllm_tailorkv._cuda")


def unavailable() -> str | None:
    """Why the CUDA ops cannot run here, or None."""
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
    """The ops of `ops.py`.

    `select_topk`: NaN is the largest score, or the smallest if negative. Calls on one device must
    come one after another, as those of one stream do: they share counters.
    """
    return compiled(op, "CUDA", __name__)


def gather_rows(
    key_rows: torch.Tensor,
    value_rows: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    indices: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """Copy the K and V rows of selected tokens from host pages, read in place over PCIe.

    Args:
        key_rows, value_rows: [R, Hk, k, d] on the device, the caches' dtype, contiguous; row
            j belongs to token `indices[..., j]`, and is zeros where that is negative.
        key_cache, value_cache: [NB, Hk, bs, d], token-major (the last axis contiguous), in
            pinned host memory or on the device; rows of whole 16 bytes.
        indices: int32 [R, Hk, k] as `select_topk` leaves them.
        block_table: int32 [R, max_blocks].

    Raises:
        RuntimeError: a shape, dtype, stride or device breaks this contract.
    """
    OPS.gather_rows(key_rows, value_rows, key_cache, value_cache, indices, block_table)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the last axis, code i at bit `i*b % 8` of byte `i*b // 8` (`reference.pack_codes`).

    Args:
        codes: uint8 [..., n], each below `2^bits`, contiguous.
        bits: 1, 2 or 4.

    Returns:
        uint8 [..., ceil(n * bits / 8)].
    """
    packed = codes.new_empty((*codes.shape[:-1], -(-codes.shape[-1] * bits // 8)))
    OPS.pack_codes(_rows(packed), _rows(codes), bits)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The inverse of `pack_codes`: uint8 [..., ceil(length*bits/8)] to uint8 [..., length]."""
    codes = packed.new_empty((*packed.shape[:-1], length))
    OPS.unpack_codes(_rows(codes), _rows(packed), bits)
    return codes


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """All axes but the last as one."""
    return tensor.view(tensor.shape[:-1].numel(), tensor.shape[-1])


def reduce_channels(groups: torch.Tensor, key_cache: torch.Tensor, index: ChannelIndex) -> None:
    """`ops.quantize_groups` for an index of channels: the extremes of K in each group, exact.

    Args:
        groups: int64 [N] on the device, `block * G + group within the block`, negative for none.
        key_cache: [NB, Hk, bs, d] in either layout, in pinned host memory or on the device.
        index: the records to write, on the device.

    Raises:
        RuntimeError: a shape, dtype, stride or device breaks this contract.
    """
    OPS.reduce_channels(groups, key_cache, index.extremes)
