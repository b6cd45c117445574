"""The CUDA kernels compiled for the host (`cuda_emulator.h`), as functions on CPU tensors.

Same signatures as `vllm_tailorkv.kernels.cuda`. Every tensor is copied to memory of its own
between two guard pages, at its end or at its start, with its address modulo 16 kept: a kernel
that reads or writes one vector too far ends in an error. Under sanitizers (`sanitize.py`) so does
one byte, around tensors and in what the threads of a block share.
"""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sanitize
import torch

ROOT = Path(__file__).parents[2]
PAGE = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Pages(ctypes.Structure):
    _fields_ = (("data", pointer), *((name, i64) for name in ("block", "head", "token", "channel")))


class SelectTopk(ctypes.Structure):
    _fields_ = (
        *((name, i32) for name in ("rows", "kv_heads", "k", "capacity", "sink_tokens")),
        ("indices", pointer),
        ("scores", pointer),
        ("scores_row", i64),
        ("scores_head", i64),
        ("tail_start", pointer),
    )


class GatherRows(ctypes.Structure):
    _fields_ = (
        *((name, i32) for name in ("rows", "kv_heads", "k", "block_size", "row_bytes")),
        ("key_rows", pointer),
        ("value_rows", pointer),
        ("key_cache", Pages),
        ("value_cache", Pages),
        ("indices", pointer),
        ("block_table", pointer),
        ("block_table_row", i64),
    )


class Codes(ctypes.Structure):
    _fields_ = (
        ("bits", i32),
        ("rows", i64),
        ("length", i64),
        ("codes", pointer),
        ("packed", pointer),
    )


class ReduceChannels(ctypes.Structure):
    _fields_ = (
        *(
            (name, i32)
            for name in ("item_bytes", "kv_heads", "head_size", "group_size", "groups_per_block")
        ),
        ("num_groups", i64),
        ("groups", pointer),
        ("key_cache", Pages),
        ("extremes", pointer),
        ("extremes_block", i64),
        ("extremes_head", i64),
        ("extremes_group", i64),
    )


def span_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last, gaps included."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.itemsize


@contextmanager
def guarded(tensor: torch.Tensor, at_end: bool, is_output: bool = False) -> Iterator[int]:
    """The address of a copy between guard pages; an output is copied back."""
    span, shift = span_bytes(tensor), tensor.data_ptr() % 16
    room = -(-(span + 16) // PAGE) * PAGE
    read_write, private_anonymous = 3, 0x22
    start = _libc.mmap(None, room + 2 * PAGE, read_write, private_anonymous, -1, 0)
    first = start + PAGE
    _libc.mprotect(start, PAGE, 0)
    _libc.mprotect(first + room, PAGE, 0)
    address = first + shift
    if at_end:
        address = first + room - span
        address -= (address - shift) % 16
    ctypes.memmove(address, tensor.data_ptr(), span)
    sanitize.poison(first, address - first)
    sanitize.poison(address + span, first + room - address - span)
    try:
        yield address
        if is_output:
            ctypes.memmove(tensor.data_ptr(), address, span)
    finally:
        sanitize.unpoison(first, room)
        _libc.munmap(start, room + 2 * PAGE)


def pages(address: int, tensor: torch.Tensor) -> Pages:
    return Pages(address, *(stride * tensor.itemsize for stride in tensor.stride()))


def build(folder: Path) -> ctypes.CDLL:
    """Compile the kernels with the host's compiler."""
    target = folder / "cuda_emulator.so"
    source = ROOT / "tests/support/cuda_emulator.cpp"
    command = ["c++", "-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    command += ["-fPIC", "-shared", f"-I{ROOT}/csrc/cuda", str(source), "-o", str(target)]
    if sanitize.active():
        command += sanitize.COMPILE_FLAGS
    subprocess.run(command, env=sanitize.without_preload(), check=True)
    library = ctypes.CDLL(str(target))
    for name in ("select_topk", "gather_rows", "pack_codes", "unpack_codes", "reduce_channels"):
        getattr(library, f"emulate_{name}").restype = ctypes.c_char_p
    library.key_of.restype = ctypes.c_uint32
    library.key_of.argtypes = [ctypes.c_float]
    library.prefix_of.restype = library.digit_of.restype = ctypes.c_uint32
    library.bytes_to.restype = i64
    library.bytes_to.argtypes = [ctypes.POINTER(Pages), i64, i64, i64]
    return library


class Emulated:
    """The ops on the host; each call runs threads in another order."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.calls = 0

    def _run(self, name: str, op: ctypes.Structure, *rest: int) -> None:
        failure = getattr(self.library, f"emulate_{name}")(self.calls, ctypes.byref(op), *rest)
        self.calls += 1
        if failure is not None:
            raise RuntimeError(failure.decode())

    def select_topk(self, indices, scores, tail_start, sink_tokens, parts=None, threads=64):
        rows, heads, k = indices.shape
        at_end = self.calls % 2 == 0
        with (
            guarded(indices, at_end, is_output=True) as to,
            guarded(scores, at_end) as data,
            guarded(tail_start, at_end) as tail,
        ):
            strides = scores.stride()[:2]
            op = SelectTopk(rows, heads, k, scores.shape[2], sink_tokens, to, data, *strides, tail)
            if parts is None:
                parts = self.library.parts_on(ctypes.byref(op), 132)
            self._run("select_topk", op, parts, threads)

    def gather_rows(self, key_rows, value_rows, key_cache, value_cache, indices, block_table):
        rows, heads, k = indices.shape
        row_bytes = key_cache.shape[3] * key_cache.itemsize
        at_end = self.calls % 2 == 0
        with (
            guarded(key_rows, at_end, is_output=True) as to_key,
            guarded(value_rows, at_end, is_output=True) as to_value,
            guarded(key_cache, at_end) as key,
            guarded(value_cache, at_end) as value,
            guarded(indices, at_end) as chosen,
            guarded(block_table, at_end) as table,
        ):
            shape = (rows, heads, k, key_cache.shape[2], row_bytes)
            both = (pages(key, key_cache), pages(value, value_cache))
            op = GatherRows(*shape, to_key, to_value, *both, chosen, table, block_table.stride(0))
            self._run("gather_rows", op)

    def pack_codes(self, codes, bits):
        length = codes.shape[-1]
        packed = codes.new_full((*codes.shape[:-1], -(-length * bits // 8)), 0xAA)
        at_end = self.calls % 2 == 0
        with guarded(codes, at_end) as data, guarded(packed, at_end, is_output=True) as to:
            rows = codes.shape[:-1].numel()
            self._run("pack_codes", Codes(bits, rows, length, data, to))
        return packed

    def unpack_codes(self, packed, bits, length):
        codes = packed.new_full((*packed.shape[:-1], length), 0xAA)
        at_end = self.calls % 2 == 0
        with guarded(packed, at_end) as data, guarded(codes, at_end, is_output=True) as to:
            rows = packed.shape[:-1].numel()
            self._run("unpack_codes", Codes(bits, rows, length, to, data))
        return codes

    def reduce_channels(self, groups, key_cache, index):
        extremes = index.extremes
        _, heads, block_size, head_size = key_cache.shape
        per_block = extremes.shape[2]
        at_end = self.calls % 2 == 0
        with (
            guarded(groups, at_end) as items,
            guarded(key_cache, at_end) as key,
            guarded(extremes, at_end, is_output=True) as to,
        ):
            shape = (key_cache.itemsize, heads, head_size, block_size // per_block, per_block)
            op = ReduceChannels(
                *shape, len(groups), items, pages(key, key_cache), to, *extremes.stride()[:3]
            )
            self._run("reduce_channels", op)
