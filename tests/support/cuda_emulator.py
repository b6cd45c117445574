"""The CUDA kernel compiled for the host (`cuda_emulator.h`), as a function on CPU tensors.

Same signature as in `vllm_tailorkv.kernels.cuda`. Every tensor is copied to memory of its own
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


class SelectTopk(ctypes.Structure):
    _fields_ = (
        *((name, i32) for name in ("rows", "kv_heads", "k", "capacity", "sink_tokens")),
        ("indices", pointer),
        ("scores", pointer),
        ("scores_row", i64),
        ("scores_head", i64),
        ("tail_start", pointer),
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


def build(folder: Path) -> ctypes.CDLL:
    """Compile the kernel with the host's compiler."""
    target = folder / "cuda_emulator.so"
    source = ROOT / "tests/support/cuda_emulator.cpp"
    command = ["c++", "-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    command += ["-fPIC", "-shared", f"-I{ROOT}/csrc/cuda", str(source), "-o", str(target)]
    if sanitize.active():
        command += sanitize.COMPILE_FLAGS
    subprocess.run(command, env=sanitize.without_preload(), check=True)
    library = ctypes.CDLL(str(target))
    library.emulate_select_topk.restype = ctypes.c_char_p
    library.key_of.restype = ctypes.c_uint32
    library.key_of.argtypes = [ctypes.c_float]
    library.prefix_of.restype = library.digit_of.restype = ctypes.c_uint32
    return library


class Emulated:
    """The op on the host; each call runs threads in another order."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.calls = 0

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
            failure = self.library.emulate_select_topk(self.calls, ctypes.byref(op), parts, threads)
            self.calls += 1
            if failure is not None:
                raise RuntimeError(failure.decode())
