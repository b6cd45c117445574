"""Host memory that the GPU reads in place: what pinning costs, and what the bus then gives.

    python benchmarks/gpu/pinned.py --gib 8 --json pinned.jsonl
    python benchmarks/gpu/pinned.py --device cpu --gib 0.01     # rehearsal

Memory is allocated pageable and registered in slices, as a pool of tens of GiB must be (torch's
own pinned allocator rounds up to a power of two). Then rows of it, drawn at random, are read by
the GPU in place. One JSON object a line:

    what "pin"    slice_gib, gib, allocate_s, register_s, unregister_s
    what "read"   row_bytes, rows, ms, gb_s
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Timer

from vllm_tailorkv.cache.device_view import device_view

GIB = 1 << 30
ROW_BYTES = (64, 128, 256, 512, 4096)
BYTES_OF_A_READ = 64 << 20


def check(status: Any) -> None:
    """Raise unless a CUDA call succeeded."""
    if int(status) != 0:
        raise SystemExit(f"CUDA refuses: {torch.cuda.cudart().cudaGetErrorString(status)}")


@contextmanager
def registered(size: int, slice_size: int, device: torch.device) -> Iterator[tuple[Any, dict]]:
    """Zeros, pinned in slices: the bytes, and what that cost; unpinned at the end."""
    cost: dict[str, Any] = {"gib": size / GIB, "slice_gib": slice_size / GIB}
    start = time.perf_counter()
    memory = torch.empty(size, dtype=torch.uint8).zero_()
    cost["allocate_s"] = time.perf_counter() - start
    pinned = []
    if device.type == "cuda":
        runtime = torch.cuda.cudart()
        starts = range(0, size, slice_size)
        pinned = [memory[at : at + slice_size] for at in starts]
        start = time.perf_counter()
        for part in pinned:
            check(runtime.cudaHostRegister(part.data_ptr(), part.numel(), 0))
        cost["register_s"] = time.perf_counter() - start
    try:
        yield memory, cost
    finally:
        if pinned:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for part in pinned:
                check(runtime.cudaHostUnregister(part.data_ptr()))
            cost["unregister_s"] = time.perf_counter() - start


def main() -> int:
    """Pin, check both ways, read, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--json", type=Path, help="append the records to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; rehearse with --device cpu")
    device = torch.device(options.device)
    timer = Timer(device)
    size = int(options.gib * GIB) // 4096 * 4096
    if size <= 0:
        parser.error(f"--gib {options.gib:g} is too little")

    def write(**record: Any) -> None:
        print(json.dumps(record), flush=True)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps(record) + "\n")

    for slice_size in (min(size, GIB), min(size, 4 * GIB)):
        with registered(size, slice_size, device) as (memory, cost):
            view = device_view(memory) if device.type == "cuda" else memory
            memory[-1] = 7
            if int(view[-1]) != 7:
                raise SystemExit("the device does not see what the host wrote")
            view[0] = 9
            if device.type == "cuda":
                torch.cuda.synchronize()
            if int(memory[0]) != 9:
                raise SystemExit("the host does not see what the device wrote")
            for row_bytes in ROW_BYTES:
                rows = view.view(torch.float32).view(-1, row_bytes // 4)
                count = min(len(rows), BYTES_OF_A_READ // row_bytes)
                at = torch.randint(len(rows), (count,), device=device)
                out = torch.empty(count, row_bytes // 4, device=device)
                call = partial(torch.index_select, rows, 0, at, out=out)
                ms = timer.milliseconds([call])
                speed = count * row_bytes / ms / 1e6
                write(what="read", row_bytes=row_bytes, rows=count, ms=ms, gb_s=round(speed, 2))
            del view
        write(what="pin", **cost)
    return 0


if __name__ == "__main__":
    sys.exit(main())
