"""The host tier of the `split` placement: one pool a layer, ours."""

import logging
import math
import mmap
import socket
import weakref
from functools import cache

import torch

from vllm_tailorkv.cache.device_view import device_view
from vllm_tailorkv.cache.huge_pages import advise_huge_pages
from vllm_tailorkv.cache.memory import available_memory
from vllm_tailorkv.cache.numa import node_of, prefer_node
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.failures import is_first_to_say
from vllm_tailorkv.layout import GIB, PageLayout

logger = logging.getLogger("vllm.tailorkv")

_SLICE_BYTES = 16 * GIB
"""What is registered with CUDA at once, at most."""
_SPARE_BYTES = GIB
"""What a machine must have left behind a pool: the process goes on to need memory."""
# From CUDA's driver_types.h: registered for every device, and mapped into their addresses.
_PORTABLE, _MAPPED = 1, 2


class HostPool:
    """Host regions for every block of one layer; a pool that is dropped is released.

    pages: uint8 [num_blocks, host_bytes] as the kernels see it, zeros at first; empty once
        released. Views of it keep its memory mapped, but the GPU may not use them after that.
    """

    def __init__(
        self, pages: torch.Tensor, registered: list[torch.Tensor], device: torch.device
    ) -> None:
        self.pages = pages
        self._unregister = weakref.finalize(self, _unregister, registered, device)

    def release(self) -> None:
        """Let go of the memory, when the GPU is done with it. Never raises; again does nothing."""
        self._unregister()
        self.pages = torch.empty(0, dtype=torch.uint8)


def allocate_host_pool(num_blocks: int, layout: PageLayout, device: torch.device) -> HostPool:
    """A pool of host memory for the kernels of one device.

    For a GPU the memory is pinned, on the memory node next to it.

    Args:
        num_blocks: at least one.
        layout: the layout of the layer's pages.
        device: where the kernels run.

    Raises:
        TailorKVError: the memory is not there, or CUDA may not pin it.
    """
    if device.type != "cuda":
        return HostPool(_pageable(num_blocks, layout), [], device)
    memory = _untouched(num_blocks * layout.host_bytes)
    if (node := node_of(device)) is not None and (reason := prefer_node(memory, node)):
        _warn_once(f"TailorKV: the host pool may lie far from its GPU: {reason}.")
    registered: list[torch.Tensor] = []
    try:
        with torch.cuda.device(device):
            _register(memory, layout, registered)
            pages = memory[: num_blocks * layout.host_bytes].view(num_blocks, layout.host_bytes)
            return HostPool(device_view(pages), registered, device)
    except BaseException:
        _unregister(registered, device)
        raise


def _pageable(num_blocks: int, layout: PageLayout) -> torch.Tensor:
    """Memory for CPUs: uint8 [num_blocks, host_bytes], zeros."""
    try:
        pool = torch.empty(num_blocks, layout.host_bytes, dtype=torch.uint8)
        advise_huge_pages(pool)
        return pool.zero_()
    except RuntimeError as error:
        # torch has no type of its own for this on CPUs.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _no_memory(num_blocks * layout.host_bytes) from None


def _untouched(size: int) -> torch.Tensor:
    """Whole pages that the kernel fills with zeros when they are touched: uint8 [size or more].

    Unmapped when the last tensor that shares them dies.
    """
    available = available_memory()
    # Pinning more would not fail, it would have the kernel kill a process.
    if size + _SPARE_BYTES > available:
        raise _no_memory(
            size, f"{max(0, available - _SPARE_BYTES) / GIB:.2f} GiB can be spared there"
        )
    try:
        mapping = mmap.mmap(
            -1,
            math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        )
    except OSError as error:
        raise _no_memory(size, str(error.strerror)) from None
    # A fork would copy pinned pages at once, for a child that cannot use CUDA anyhow.
    mapping.madvise(mmap.MADV_DONTFORK)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    advise_huge_pages(memory)
    return memory


def _register(memory: torch.Tensor, layout: PageLayout, registered: list[torch.Tensor]) -> None:
    """Have CUDA pin memory and map it into the current device's addresses.

    Args:
        memory: whole pages, contiguous bytes.
        layout: of the blocks in it.
        registered: gets every slice that is pinned, also where a later one fails.

    Raises:
        TailorKVError: CUDA refuses.
    """
    runtime = torch.cuda.cudart()
    # A page can be registered once, and CUDA copies no block that lies in two registrations.
    unit = math.lcm(layout.host_bytes, mmap.PAGESIZE)
    for part in memory.split(_SLICE_BYTES // unit * unit):
        status = runtime.cudaHostRegister(part.data_ptr(), part.nbytes, _PORTABLE | _MAPPED)
        if int(status):
            raise TailorKVError(
                f"CUDA cannot pin {memory.nbytes / GIB:.2f} GiB of a layer's host pool on "
                f"{socket.gethostname()} ({runtime.cudaGetErrorString(status)}, error "
                f"{int(status)}): too little memory, or a limit of the container or the user "
                "(its memory, or RLIMIT_MEMLOCK); lower host_pool_gib, or raise the limit "
                "(ulimit -l unlimited, docker run --ulimit memlock=-1)"
            )
        registered.append(part)


def _unregister(registered: list[torch.Tensor], device: torch.device) -> None:
    """Have CUDA forget slices. Their memory stays mapped until then, because they are arguments.

    It raises nothing: the garbage collector runs it, and the interpreter at exit, when CUDA may be
    gone or an error may have ended it.
    """
    if not registered:
        return
    try:
        # A thread of its own has another current device.
        with torch.cuda.device(device):
            runtime = torch.cuda.cudart()
            try:
                torch.cuda.synchronize()
            finally:
                kept = [int(runtime.cudaHostUnregister(part.data_ptr())) for part in registered]
        if any(kept):
            _warn_once(f"TailorKV: a host pool stays pinned (CUDA error {max(kept)}).")
    except Exception as error:
        _warn_once(f"TailorKV: the end of a host pool failed: {error}")


def _no_memory(size: int, reason: str = "") -> TailorKVError:
    """What to raise where a pool of `size` bytes does not fit."""
    return TailorKVError(
        f"no memory for {size / GIB:.2f} GiB of a layer's host pool on {socket.gethostname()}"
        f"{reason and f' ({reason})'}; lower host_pool_gib"
    )


@cache
def _warn_once(message: str) -> None:
    """Warn once of what is so for every layer, and in every worker of this machine."""
    if is_first_to_say(message):
        logger.warning(message)
