"""Scratch memory that outlives a step, so that no step pays for fresh pages."""

from math import prod

import torch


class Workspace:
    """Buffers that grow and are handed out anew in every call.

    On a GPU they are torch's: it keeps memory itself, and a CUDA graph must own what it writes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor, valid until the next call with this name."""
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self._device)
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = torch.empty(size + size // 4, dtype=dtype)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)
