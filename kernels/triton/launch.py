"""What launches need: how many programs share a row, counters of those, and codes as words."""

from functools import cache

import torch
import triton
import triton.language as tl

_CPU_SPLITS = 3
"""Enough in the interpreter to split rows unevenly."""
_COUNTERS = 1 << 14
"""Rows times heads, at least, that there are counters for."""

_counters: dict[torch.device, torch.Tensor] = {}
_outgrown: list[torch.Tensor] = []
"""Counters of graphs that were captured before more were needed."""


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


def counters(device: torch.device, count: int) -> torch.Tensor:
    """A counter for each of so many groups of programs, int32, all 0: see `is_last`.

    Launches leave them as they found them, and so share them: they must come one after another,
    as those of one stream do.
    """
    kept = _counters.get(device)
    if kept is not None and len(kept) >= count:
        return kept
    made = torch.zeros(max(_COUNTERS, count), dtype=torch.int32, device=device)
    # While a graph is being captured nothing is set to 0: only its own launches may count on it.
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        if kept is not None:
            _outgrown.append(kept)
        _counters[device] = made
    return made


@triton.jit
def is_last(counter, programs):
    """Whether all other programs of a group of so many have come here, and counted in `counter`.

    What they stored before may then be read, past this multiprocessor's own cache. It is safe: the
    barrier puts all threads' stores before the one thread that counts, which releases them, and
    acquires those of the programs that counted before; all threads get the count by a barrier.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        # No one else counts any more: ready for the next launch.
        tl.store(counter, 0)
    return last


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
