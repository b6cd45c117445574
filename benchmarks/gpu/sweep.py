"""How fast the kernels of codes are by their launch options: warps, stages, programs an SM.

    python benchmarks/gpu/sweep.py --json sweep.jsonl
    python benchmarks/gpu/sweep.py --device cpu --tiny     # rehearsal, under the interpreter

Kernels are compiled by several processes first; then each combination is timed in turn. One JSON
object a line: kernel, bits, context, batch, num_warps, num_stages, per_sm, ms. `per_sm` is how
many programs share one multiprocessor where rows and heads are too few to fill the chip.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from layers import Pool, make_host_bytes, make_pool, make_request, run_dense_layer, score
from timing import Timer
from triton.runtime.jit import JITFunction

from vllm_tailorkv.kernels.triton import dense as dense_kernels
from vllm_tailorkv.kernels.triton import launch
from vllm_tailorkv.kernels.triton import score as score_kernels
from vllm_tailorkv.layout import DerivedKind

COMPILERS = 12
TURNS = 4


class Options(NamedTuple):
    """Launch options of one kernel."""

    num_warps: int
    num_stages: int
    per_sm: int


class Subject(NamedTuple):
    """A kernel, the pages it reads, the module that launches it, and what is tried."""

    kernel: str
    kind: DerivedKind
    bits: int
    module: Any
    num_warps: tuple[int, ...]
    num_stages: tuple[int, ...]
    per_sm: tuple[int, ...]

    def options(self) -> Iterator[Options]:
        """Every combination, what must be compiled anew outermost."""
        for values in itertools.product(self.num_warps, self.num_stages, self.per_sm):
            yield Options(*values)


SUBJECTS = (
    Subject(
        "_score_codes",
        DerivedKind.ONEBIT,
        1,
        score_kernels,
        (1, 2, 4, 8),
        (1, 2, 3, 4),
        (4, 6, 8, 12, 16, 24),
    ),
    *(
        Subject(
            "_attend_codes",
            DerivedKind.DENSE,
            bits,
            dense_kernels,
            (1, 2, 4, 8),
            (1, 2, 3),
            (2, 4, 6, 8),
        )
        for bits in (1, 2)
    ),
)


@contextmanager
def launched_with(subject: Subject, options: Options) -> Iterator[None]:
    """Launch the kernel with these options, whatever its module says."""
    run, split = JITFunction.run, launch.split_count

    def with_options(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__name__ == subject.kernel:
            kwargs |= {"num_warps": options.num_warps, "num_stages": options.num_stages}
        return run(self, *args, **kwargs)

    JITFunction.run = with_options
    subject.module.split_count = lambda device, outer, most, _: split(
        device, outer, most, options.per_sm
    )
    try:
        yield
    finally:
        JITFunction.run, subject.module.split_count = run, split


def calls_of(subject: Subject, pool: Pool, context: int, batch: int) -> list[Callable[[], object]]:
    """Calls of the kernel on requests that take turns."""
    call = score if subject.kind is DerivedKind.ONEBIT else run_dense_layer
    requests = [make_request(pool, context, batch) for _ in range(TURNS)]
    for request in requests:
        request.mass.zero_()
    return [partial(call, pool, request) for request in requests]


def compile_part(device: torch.device, part: int, blocks: int) -> None:
    """Every `COMPILERS`-th kernel, on little data."""
    host = make_host_bytes(blocks, device)
    jobs = [
        (subject, pair)
        for subject in SUBJECTS
        for pair in itertools.product(subject.num_warps, subject.num_stages)
    ]
    for subject, (warps, stages) in jobs[part::COMPILERS]:
        pool = make_pool(host, subject.kind, subject.bits)
        with launched_with(subject, Options(warps, stages, subject.per_sm[0])):
            for call in calls_of(subject, pool, 320, 1)[:1]:
                attempt(call)


def attempt(call: Callable[[], Any]) -> Any:
    """The call's result, or None where the chip has not the memory for these options."""
    try:
        return call()
    except Exception as error:  # Triton's, which moves between versions
        if "out of resource" not in str(error):
            raise
        return None


def main() -> int:
    """Compile, time, print the best of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="one combination, small shapes")
    parser.add_argument("--json", type=Path, help="append the records to this file")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; rehearse with --device cpu --tiny")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for rehearsals: add --tiny")
    device = torch.device(options.device)
    blocks = 4 if options.tiny else 8192
    if options.compile is not None:
        compile_part(device, options.compile, 4)
        return 0
    if not options.tiny:
        command = [sys.executable, __file__, "--device", options.device, "--compile"]
        children = [subprocess.Popen([*command, str(i)]) for i in range(COMPILERS)]
        if any(child.wait() for child in children):
            return 1
    timer, host = Timer(device), make_host_bytes(blocks, device)
    best: dict[tuple[Any, ...], tuple[float, Options]] = {}
    for subject in SUBJECTS:
        pool = make_pool(host, subject.kind, subject.bits)
        cases = [(320, 1)] if options.tiny else [(131072, 1), (32768, 8)]
        for context, batch in cases:
            calls = calls_of(subject, pool, context, batch)
            tried = list(subject.options())[: 1 if options.tiny else None]
            for choice in tried:
                with launched_with(subject, choice):
                    ms = attempt(partial(timer.milliseconds, calls))
                if ms is None:
                    continue
                case = {"kernel": subject.kernel, "bits": subject.bits}
                case |= {"context": context, "batch": batch}
                if options.json is not None:
                    with options.json.open("a") as file:
                        file.write(json.dumps(case | choice._asdict() | {"ms": ms}) + "\n")
                key = tuple(case.values())
                best[key] = min(best.get(key, (ms, choice)), (ms, choice))
    for key, (ms, choice) in best.items():
        print(*key, f"{ms:.4f} ms", *choice._asdict().items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
