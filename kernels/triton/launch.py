"""What every launch needs: how many programs share a row, and codes as words."""

from functools import cache

import torch

_CPU_SPLITS = 3
"""Enough in the interpreter to split rows unevenly."""


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def split_count(device: torch.device, outer: int, most: int, per_sm: int) -> int:
    """Programs that share the tokens of one row and head, from shapes alone.

    Args:
        device: where the kernel runs.
        outer: rows times heads.
        most: parts that the longest row can be cut into.
        per_sm: programs that one multiprocessor holds at a time.
    """
    if device.type == "cpu":
        return max(1, min(_CPU_SPLITS, most))
    wanted = per_sm * _multiprocessors(device.index or 0) // max(1, outer)
    return max(1, min(wanted, most))


def as_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes as the widest integers that their rows and strides allow.

    Args:
        codes: uint8, the last axis contiguous.

    Returns:
        int32, int16 or uint8, the last axis shorter accordingly.
    """
    sizes = (codes.shape[-1], codes.storage_offset(), *codes.stride()[:-1])
    for dtype in (torch.int32, torch.int16):
        if not any(size % dtype.itemsize for size in sizes):
            return codes.view(dtype)
    return codes
