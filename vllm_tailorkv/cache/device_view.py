"""Pinned host memory as the GPU sees it: read and written in place, over the bus."""

from typing import Any

import torch


class _Bytes:
    """Memory described by the CUDA array interface; keeps its owner alive."""

    def __init__(self, pinned: torch.Tensor) -> None:
        self._pinned = pinned

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self._pinned.numel(),),
            "typestr": "|u1",
            "data": (self._pinned.data_ptr(), False),
            "version": 3,
        }


def device_view(pinned: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of the current CUDA device; nothing is copied.

    Pinned memory has one address for host and device (unified addressing).

    Args:
        pinned: uint8, contiguous, pinned; kept alive by the view.

    Raises:
        ValueError: the tensor is not pinned, contiguous bytes.
    """
    if pinned.dtype != torch.uint8 or not pinned.is_contiguous() or not pinned.is_pinned():
        raise ValueError("pinned must be contiguous bytes in pinned memory")
    if not pinned.numel():
        return torch.empty(pinned.shape, dtype=torch.uint8, device="cuda")
    return torch.as_tensor(_Bytes(pinned), device="cuda").view(pinned.shape)
