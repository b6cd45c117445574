"""On which memory node the host tier lies: next to the GPU that reads it.

Best effort: it changes how fast memory is read, never what it holds, and only on Linux.
"""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch

_SYSFS = Path("/sys")
# Numbers of the system call, which has no name in libc; the policy is from uapi/linux/mempolicy.h.
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1
_LONG_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def node_of(device: torch.device) -> int | None:
    """The memory node next to a GPU; None where there is only one, or the system does not say."""
    if len(list(_SYSFS.glob("devices/system/node/node[0-9]*"))) < 2:
        return None
    gpu: Any = torch.cuda.get_device_properties(device)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int((_SYSFS / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer_node(memory: torch.Tensor, node: int) -> str | None:
    """Have memory that was never touched come from one node, as long as that node has any.

    Args:
        memory: contiguous; begins on a page.
        node: the node's number.

    Returns:
        Why memory comes from any node, or None.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"not known how to ask on {platform.machine()}"
    mask = (ctypes.c_ulong * (node // _LONG_BITS + 1))()
    mask[node // _LONG_BITS] = 1 << node % _LONG_BITS
    # The policy is the mapping's and not the thread's: whichever thread of the driver touches it.
    # The kernel reads one bit less than it is told.
    refused = ctypes.CDLL(None, use_errno=True).syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(memory.data_ptr()),
        ctypes.c_ulong(memory.nbytes),
        ctypes.c_long(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(len(mask) * _LONG_BITS + 1),
        ctypes.c_ulong(0),
    )
    return f"the kernel refuses ({os.strerror(ctypes.get_errno())})" if refused else None
