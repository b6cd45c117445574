"""The machine: its processor, its memory, and the pages that it comes in.

Imports of what may be missing wait for the checks, which say so.
"""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from vllm_tailorkv.doctor.finding import Finding
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import GIB

_CPUINFO = Path("/proc/cpuinfo")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_NODES = Path("/sys/devices/system/node")
_SWITCH = "/sys/kernel/mm/transparent_hugepage/enabled"
_LEAST_BYTES = 2 * GIB
"""Of memory, less than vLLM's processes take with the smallest model and cache."""


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def isa() -> str:
    """The instruction set that the C++ ops run with.

    Raises:
        TailorKVError: they do not run.
    """
    from vllm_tailorkv.kernels import cpu, library  # noqa: PLC0415  (torch)

    if (why := cpu.unavailable()) is not None:
        raise TailorKVError(why)
    name: str = library.OPS.isa()
    return name


def check_processor() -> Finding:
    """Its name, its cores, and what the C++ ops make of it."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE):
            name = found[1]
    words = f"{name}, {cores()} of {os.cpu_count()} cores"
    with suppress(OSError, ValueError):
        quota, period = map(int, _QUOTA.read_text().split())
        words += f", of which the container may use {quota / period:.3g}"
    try:
        ops = isa()
    except (ImportError, TailorKVError) as error:
        return Finding("processor", f"{words}; no C++ ops ({error})")
    hint = None
    if ops in ("avx2", "portable"):
        hint = "the ops are several times as fast where the processor has AVX-512"
    return Finding("processor", f"{words}; the C++ ops run with {ops}", hint=hint)


def check_memory() -> Finding:
    """What there is and what is left, and in how many parts it comes."""
    import psutil  # noqa: PLC0415

    from vllm_tailorkv.cache.memory import available_memory  # noqa: PLC0415

    left, total = available_memory(), psutil.virtual_memory().total
    nodes = max(1, len(list(_NODES.glob("node[0-9]*"))))
    words = f"{left / GIB:.1f} of {total / GIB:.1f} GiB available, {nodes} NUMA node"
    remedy = None
    if left < _LEAST_BYTES:
        remedy = f"free memory: vLLM alone takes more than {_LEAST_BYTES // GIB} GiB"
    return Finding("memory", words + ("s" if nodes > 1 else ""), remedy)


def check_huge_pages() -> Finding:
    """Whether the cache will lie in huge pages."""
    from vllm_tailorkv.cache.huge_pages import obstacle  # noqa: PLC0415

    why = obstacle()
    if why is None:
        return Finding("huge pages", "the cache gets them")
    return Finding("huge pages", f"none: {why}", hint=f"steps are faster with madvise in {_SWITCH}")
