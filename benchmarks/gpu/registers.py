"""Registers and spills of every Triton kernel, compiled for GPUs that need not be there.

    python benchmarks/gpu/registers.py --json benchmarks/results/triton-registers.jsonl

Every op is called with small CPU tensors of real shapes; its launches are caught, and what
they would have compiled is compiled by Triton and its ptxas. One JSON object a kernel:

    kernel, case, arch, num_warps                 what was compiled
    registers, shared_bytes                       of a thread, of a block
    spill_bytes                                   stored and loaded, a thread
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vllm_tailorkv.cache.views import HostPages, derived_pages, host_pages
from vllm_tailorkv.kernels import triton as kernels
from vllm_tailorkv.kernels.triton import attend
from vllm_tailorkv.kernels.types import DenseCodes, HotRows, TokenIndex
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

ARCHS = (80, 90)
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One caught launch: what Triton would compile for it."""

    fn: JITFunction
    args: dict[str, Any]
    options: dict[str, Any]


def catch(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call` makes; none of them runs."""
    launches: list[Launch] = []

    def record(fn: JITFunction, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(fn.arg_names, args, strict=False))
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in fn.arg_names}
        launches.append(Launch(fn, named | kwargs, options))

    subscript = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda fn, grid: partial(record, fn)
    try:
        call()
    finally:
        JITFunction.__getitem__ = subscript
    return launches


def source(launch: Launch) -> ASTSource:
    """What Triton's launcher makes of the arguments: types, ones, multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for position, param in enumerate(launch.fn.params):
        value = launch.args[param.name]
        special = not param.do_not_specialize
        one = special and isinstance(value, int) and value == 1
        if param.is_constexpr or value is None or one:
            signature[param.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    return ASTSource(launch.fn, signature, constants, attributes)


def measure(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile one launch for one architecture and read what ptxas says of it."""
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source(launch), target=target, options=launch.options)
    text = binary.asm["ptx"]
    name = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert name is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(text)
        log = subprocess.run(
            [get_ptxas(arch).path, "-v", f"--gpu-name={name[1]}", ptx, "-o", f"{ptx}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if spilled is None or registers is None:
        raise SystemExit(f"ptxas said nothing of registers:\n{log}")
    return {
        "kernel": launch.fn.__name__,
        "arch": f"sm_{arch}",
        "num_warps": binary.metadata.num_warps,
        "registers": int(registers[1]),
        "spill_bytes": int(spilled[1]) + int(spilled[2]),
        "shared_bytes": binary.metadata.shared,
    }


@dataclass(frozen=True)
class Case:
    """Shapes of one layer."""

    head_size: int = 128
    per_head: int = 4
    dtype: torch.dtype = torch.bfloat16
    bits: int = 1
    key_layout: KeyLayout = KeyLayout.TOKEN_MAJOR
    group_size: int = 64

    @property
    def name(self) -> str:
        """Everything that changes what is compiled."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{dtype} d{self.head_size} G{self.per_head} g{self.group_size} b{self.bits} "
            f"{self.key_layout.value}"
        )


CASES = (
    Case(bits=1),
    Case(bits=2),
    Case(bits=4),
    Case(head_size=64, per_head=8, dtype=torch.float16),
    Case(head_size=256, per_head=1, bits=2),
    Case(head_size=80, dtype=torch.float32, bits=1),
    Case(group_size=128, bits=1),
    Case(per_head=16, bits=1),
    Case(head_size=256, group_size=128, bits=4),
    Case(group_size=32, bits=1, key_layout=KeyLayout.CHANNEL_MAJOR),
)


def hot_rows(heads: int, case: Case) -> HotRows:
    """Room for some."""
    return HotRows(
        torch.zeros(heads, 4096, dtype=torch.int32),
        torch.zeros(heads, 4096, 2, case.head_size, dtype=case.dtype),
        torch.zeros(2, dtype=torch.int64),
    )


def calls(case: Case) -> Iterator[Callable[[], Any]]:
    """Every op on tensors of these shapes."""
    heads, block_size, blocks = 8, 128, 2
    for kind in DerivedKind:
        layout = PageLayout(
            kind,
            heads,
            case.head_size,
            block_size,
            case.group_size,
            case.bits,
            case.dtype.itemsize,
            case.key_layout,
        )
        host = host_pages(
            torch.zeros(blocks, layout.host_bytes, dtype=torch.uint8), layout, case.dtype
        )
        derived = derived_pages(
            torch.zeros(blocks, layout.derived_bytes, dtype=torch.uint8), layout, case.dtype
        )
        rows = 2
        groups = torch.zeros(16, dtype=torch.int64)
        table = torch.zeros(rows, 16, dtype=torch.int32)
        lengths = torch.zeros(rows, dtype=torch.int32)
        query = torch.zeros(rows, heads * case.per_head, case.head_size, dtype=case.dtype)
        yield partial(kernels.quantize_groups, groups, host.key, host.value, derived)
        tokens = torch.zeros(16, heads, case.head_size, dtype=case.dtype)
        appended = (tokens, tokens, *host[:2], groups, groups, derived)
        yield partial(kernels.append_tokens, *appended)
        if isinstance(derived, DenseCodes):
            yield partial(kernels.write_kv, tokens, tokens, *host[:2], groups)
            staged = query.new_zeros(2, 32, heads, case.head_size)
            bounds = torch.tensor([0, 16, 32], dtype=torch.int32)
            yield partial(kernels.stage_rows, *staged, *host[:2], table, bounds, 0, 16)
            parts = attend.allocate_parts(query, heads, 64)  # more than the last program merges
            yield partial(attend.merge, query, parts)
            attention = (torch.empty_like(query), query, *host[:2], derived, table, lengths)
            yield partial(kernels.quantized_decode_attention, *attention, lengths, 0.1, 0.0)
            prompt = query.new_zeros(64, heads, case.head_size)
            queries = query.new_zeros(32, heads * case.per_head, case.head_size)
            yield partial(kernels.dense_preference, queries, prompt, 0.05, 0.1, 0.0)
            if case is CASES[0]:
                sinks = torch.zeros(heads * case.per_head)
                yield partial(attend.merge, query, parts, sinks)
                softmax = (0.1, 0.0, sinks)
                yield partial(kernels.quantized_decode_attention, *attention, lengths, *softmax)
                yield partial(kernels.dense_preference, queries, prompt, 0.05, *softmax)
            continue
        yield from sparse_calls(case, host, derived, table, lengths, query)


def sparse_calls(
    case: Case,
    host: HostPages,
    derived: TokenIndex,
    table: torch.Tensor,
    lengths: torch.Tensor,
    query: torch.Tensor,
) -> Iterator[Callable[[], Any]]:
    """The ops of a sparse layer's decode step."""
    rows, heads, block_size = len(table), *host.key.shape[1:3]
    scored = torch.zeros(rows, heads, case.per_head, case.head_size)
    scores = torch.zeros(rows, heads, 16 * block_size)
    found = torch.zeros(rows, heads, 128, dtype=torch.int32)
    for every_head in (True, False):
        arguments = (found, query, derived, host.key, host.key, table, lengths, lengths)
        options = (8, 8, 128, case.head_size, every_head, 0.1, 0.0, 16 * block_size)
        yield partial(kernels.retrieve_topk, *arguments, *options)
    if case.key_layout is KeyLayout.TOKEN_MAJOR:
        hot = hot_rows(heads, case)
        tokens = query.new_zeros(16, heads, case.head_size)
        groups = torch.zeros(16, dtype=torch.int64)
        appended = (tokens, tokens, *host[:2], groups, groups, derived)
        yield partial(kernels.append_tokens, *appended, True, hot)
        arguments = (query, query, derived, host.key, *host[:2], table, lengths, lengths)
        options = (8, 8, 128, 1008, case.head_size, True, 0.1, 0.0, 16 * block_size, None, hot)
        yield partial(kernels.retrieve_attention, *arguments, *options)
        if case is CASES[0]:
            sinks = torch.zeros(heads * case.per_head)
            yield partial(kernels.retrieve_attention, *arguments, *options[:-2], sinks)
    mass = query.new_zeros(query.shape[:2], dtype=torch.float32)
    arguments = (mass, query, host.key, table, lengths, lengths, 8, 0.1, 0.0)
    yield partial(kernels.log_mass, *arguments)
    offset = mass.view(scored.shape[:3])
    arguments = (scores, scored, derived, host.key, table, lengths, offset, 8, 8)
    yield partial(kernels.score_tokens, *arguments)
    indices = torch.zeros(rows, heads, 128, dtype=torch.int32)
    attention = (torch.empty_like(query), query, *host[:2], indices, table, lengths)
    yield partial(kernels.sparse_decode_attention, *attention, lengths, 8, 0.1, 0.0)
    for count in (1008, 8192):  # the default, and the most that spill nothing
        candidates = torch.zeros(rows, heads, count, dtype=torch.int32)
        for channels in (case.head_size, case.head_size * 3 // 8):
            arguments = (indices, candidates, query, host.key, table, mass, channels, 0.1, 0.0)
            yield partial(kernels.rerank_topk, *arguments)


def main() -> int:
    """Compile everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the records to this file")
    options = parser.parse_args()
    records, seen = [], set()
    for case in CASES:
        for call in calls(case):
            for launch in catch(call):
                for arch in ARCHS:
                    key = (arch, source(launch).hash(), str(launch.options))
                    if key in seen:
                        continue
                    seen.add(key)
                    record = {"case": case.name} | measure(launch, arch)
                    records.append(record)
                    print(
                        f"{record['arch']}  {record['registers']:3d} registers  "
                        f"{record['spill_bytes']:4d} B spilled  {record['shared_bytes']:6d} B "
                        f"shared  {record['num_warps']} warps  {record['kernel']}  {case.name}"
                    )
    if options.json:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    spills = sorted({record["kernel"] for record in records if record["spill_bytes"]})
    if spills:
        print(f"spills in {', '.join(spills)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
