"""What the machine can do, and what of it our ops use."""

import math
import time

import psutil
import torch

from vllm_tailorkv.kernels.dispatch import choose


def read_bandwidth() -> float:
    """Bytes a second of a plain sum over 1 GB."""
    data = torch.ones(1 << 28)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def implementation(names: list[str]) -> dict[str, str | None]:
    """Which implementation serves these ops on the CPU, and with which instruction set."""
    chosen = sorted({choose(name, "cpu").name for name in names})
    isa = torch.ops.vllm_tailorkv.isa() if "cpu" in chosen else None
    return {"implementation": "+".join(chosen), "isa": isa}


def free_bytes() -> int:
    """Memory that can be had without swapping."""
    return psutil.virtual_memory().available
