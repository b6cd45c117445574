"""Huge pages for the cache. A decode step reads short runs that lie far apart, so with pages of
4 KB nearly every run costs a page walk as well.

Best effort: it changes how memory is mapped, never what it holds, and only on Linux.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

_SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MODE_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# From the kernel's uapi/asm-generic/mman-common.h.
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
# Read by torch's allocator at its first use in a process.
_TORCH_SWITCH = "THP_MEM_ALLOC_ENABLE"


def prepare_huge_pages() -> None:
    """Let torch allocate in huge pages in the processes that start from now on.

    What they allocate then need not be copied by `advise_huge_pages`. What the user set stays.
    """
    os.environ.setdefault(_TORCH_SWITCH, "1")


def obstacle() -> str | None:
    """Why no memory of this machine comes in huge pages, or None."""
    if sys.platform != "linux":
        return f"{sys.platform} has no transparent huge pages"
    try:
        int(_SIZE_FILE.read_text())
    except (OSError, ValueError):
        return "the kernel has no transparent huge pages"
    # The kernel accepts advice that it will not follow.
    if "[never]" in _mode():
        return f"{_MODE_FILE} says never"
    return None


def advise_huge_pages(tensor: torch.Tensor) -> str | None:
    """Ask the kernel to map a tensor's memory with huge pages, what is in use already included.

    The whole huge pages between its first and its last byte are asked for, gaps of a strided
    tensor included. Memory in use is copied, a second or more for every GB, unless
    `prepare_huge_pages` came before; memory never touched gets its huge pages when it is.

    Args:
        tensor: of any dtype and strides.

    Returns:
        Why small pages are kept, or None.
    """
    if tensor.device.type != "cpu":
        return "the memory is a device's"
    if (why := obstacle()) is not None:
        return why
    size = int(_SIZE_FILE.read_text())
    span = 0
    if tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = (1 + sum((n - 1) * stride for n, stride in steps)) * tensor.element_size()
    begin = -(-tensor.data_ptr() // size) * size
    length = (tensor.data_ptr() + span) // size * size - begin
    if length <= 0:
        return f"it is smaller than a huge page of {size:,} bytes"
    return _advise(begin, length)


def _mode() -> str:
    """What the system says of huge pages; nothing where it cannot be read."""
    try:
        return _MODE_FILE.read_text()
    except OSError:
        return ""


def _advise(begin: int, length: int) -> str | None:
    """The same for whole huge pages: an address and bytes."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(begin, length, _MADV_HUGEPAGE):
        return f"the kernel refuses ({os.strerror(ctypes.get_errno())})"
    # Refused by kernels before 6.1 and for memory that was never touched: the advice stands.
    madvise(begin, length, _MADV_COLLAPSE)
    return None
