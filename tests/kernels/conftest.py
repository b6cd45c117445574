"""Caches, contexts and implementations for the op tests.

Every byte of a cache starts as 0xFF, which is NaN in each dtype: whatever an op reads
outside the addressed tokens shows in its result.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_tailorkv.cache.device_view import device_view
from vllm_tailorkv.cache.views import HostPages, derived_pages, host_pages
from vllm_tailorkv.kernels import cpu as cpu_module
from vllm_tailorkv.kernels import reference
from vllm_tailorkv.kernels import triton as triton_module
from vllm_tailorkv.kernels.types import DerivedPages
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

# Good values must pass these checks as well.
os.environ.setdefault("VLLM_TAILORKV_CHECK_VALUES", "1")

ITEMSIZE = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


BF16_ISAS = ("amx", "avx512_bf16")
"""Like `avx512_gfni` but for `exact_attention`."""


def available_isas() -> list[str]:
    if cpu_module.unavailable() is not None:
        return []
    names = []
    for name in (*BF16_ISAS, "avx512_gfni", "avx512", "avx2", "portable"):
        try:
            torch.ops.vllm_tailorkv.set_isa(name)
        except RuntimeError:
            continue
        names.append(name)
    if names:
        torch.ops.vllm_tailorkv.set_isa(names[0])
    return names


EXACT_ISAS = available_isas()
ISAS = [name for name in EXACT_ISAS if name not in BF16_ISAS]
TRITON = ["triton-device", "triton-pinned"] if torch.cuda.is_available() else ["triton-interpreted"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what Triton's interpreter takes long for, two of three cases are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("interpreted") and "triton-interpreted" in item.name:
            test = item.nodeid.partition("[")[0]
            if seen[test] % 3:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@dataclass(frozen=True)
class Moved:
    """Bytes of a storage: the test's, the copy, and the copy as the device sees it."""

    original: torch.Tensor
    copy: torch.Tensor
    seen: torch.Tensor


class OnDevice:
    """An implementation for GPUs, called with CPU tensors: its arguments go there and back.

    Storages are moved whole, so views keep their strides, their gaps and what they share.

    Args:
        module: the implementation.
        where: `device`, or `pinned` for host memory that the GPU reads in place.
    """

    def __init__(self, module: ModuleType, where: str) -> None:
        self.module = module
        self.where = where

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self.module, op))

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        moved: dict[int, Moved] = {}
        result = function(*(self._move(arg, moved) for arg in args))
        torch.cuda.synchronize()
        for storage in moved.values():
            storage.original.copy_(storage.copy)
        return result.cpu() if isinstance(result, torch.Tensor) else result

    def _move(self, arg: Any, moved: dict[int, Moved]) -> Any:
        if isinstance(arg, tuple):
            return type(arg)(*(self._move(part, moved) for part in arg))
        if not isinstance(arg, torch.Tensor):
            return arg
        storage = arg.untyped_storage()
        if not storage.nbytes():
            return arg.cuda()
        if storage.data_ptr() not in moved:
            original = torch.empty(0, dtype=torch.uint8).set_(storage)
            copy = original.pin_memory() if self.where == "pinned" else original.cuda()
            seen = device_view(copy) if self.where == "pinned" else copy
            moved[storage.data_ptr()] = Moved(original, copy, seen)
        seen = moved[storage.data_ptr()].seen.untyped_storage()
        empty = torch.empty(0, dtype=arg.dtype, device="cuda")
        return empty.set_(seen, arg.storage_offset(), arg.shape, arg.stride())


@pytest.fixture(params=ISAS or [pytest.param("", marks=pytest.mark.skip("no C++ extension"))])
def cpu(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The C++ implementation, once for each instruction set of this processor."""
    torch.ops.vllm_tailorkv.set_isa(request.param)
    yield cpu_module
    torch.ops.vllm_tailorkv.set_isa(ISAS[0])


@pytest.fixture(params=EXACT_ISAS or [pytest.param("", marks=pytest.mark.skip("no C++ extension"))])
def exact_cpu(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The same, with those that differ in `exact_attention` alone."""
    torch.ops.vllm_tailorkv.set_isa(request.param)
    yield cpu_module
    torch.ops.vllm_tailorkv.set_isa(ISAS[0])


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in ISAS), *TRITON])
def fast(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Every implementation but the reference, each where it can run in this process."""
    name, _, where = request.param.partition("-")
    if name == "triton":
        yield triton_module if where == "interpreted" else OnDevice(triton_module, where)
        return
    torch.ops.vllm_tailorkv.set_isa(where)
    yield cpu_module
    torch.ops.vllm_tailorkv.set_isa(ISAS[0])


@pytest.fixture(params=TRITON)
def placed(request: pytest.FixtureRequest) -> Callable[[ModuleType], Any]:
    """A function of modules that launch Triton's kernels: they run where these can."""
    _, _, where = request.param.partition("-")
    if where == "interpreted":
        return lambda module: module
    return partial(OnDevice, where=where)


@pytest.fixture(params=[False, True], ids=["plain", "sinks"])
def sinks_of(request: pytest.FixtureRequest) -> Callable[[int], torch.Tensor | None]:
    """Sink logits of so many query heads, next to none, zero and large ones among them; or none."""

    def make(heads: int) -> torch.Tensor | None:
        values = torch.tensor([2.0, -1e30, 0.0, 60.0]).repeat(-(-heads // 4))[:heads]
        return values.contiguous() if request.param else None

    return make


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass
class Cache:
    """Pages of one layer: host and derived regions side by side in each page."""

    layout: PageLayout
    raw: torch.Tensor
    host: HostPages
    derived: DerivedPages

    def clone(self) -> "Cache":
        return view_pages(self.raw.clone(), self.layout, self.host.key.dtype)


def view_pages(raw: torch.Tensor, layout: PageLayout, dtype: torch.dtype) -> Cache:
    host = host_pages(raw[:, : layout.host_bytes], layout, dtype)
    derived = derived_pages(raw[:, layout.host_bytes :], layout, dtype)
    return Cache(layout, raw, host, derived)


def make_cache(
    kind: DerivedKind = DerivedKind.DENSE,
    heads: int = 2,
    head_size: int = 64,
    block_size: int = 128,
    group_size: int = 64,
    bits: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    key_layout: KeyLayout = KeyLayout.TOKEN_MAJOR,
    num_blocks: int = 8,
    key_rows: bool = False,
) -> Cache:
    if key_rows:
        key_layout = KeyLayout.CHANNEL_MAJOR
    layout = PageLayout(
        kind, heads, head_size, block_size, group_size, bits, ITEMSIZE[dtype], key_layout, key_rows
    )
    size = layout.host_bytes + layout.derived_bytes
    raw = torch.full((num_blocks, size), 0xFF, dtype=torch.uint8)
    return view_pages(raw, layout, dtype)


@dataclass
class Context:
    """A cache that holds rows of tokens in scattered blocks, and their complete groups."""

    cache: Cache
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def complete(self) -> torch.Tensor:
        """Tokens of complete groups of each row, int32 [R]."""
        size = self.cache.layout.group_size
        return self.seq_lens // size * size


def make_context(lengths: list[int], seed: int = 0, **kwargs: object) -> Context:
    """A context of the test's own."""
    made = _context(tuple(lengths), seed, tuple(kwargs.items()))
    return Context(made.cache.clone(), made.block_table.clone(), made.seq_lens.clone())


# The reference is slow, and a test asks for the same context with every implementation.
@lru_cache(maxsize=32)
def _context(
    lengths: tuple[int, ...], seed: int, options: tuple[tuple[str, object], ...]
) -> Context:
    kwargs = dict(options)
    generator = torch.Generator().manual_seed(seed)
    block_size = int(str(kwargs.get("block_size", 128)))
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    cache = make_cache(num_blocks=num_blocks, **kwargs)  # type: ignore[arg-type]
    layout, dtype = cache.layout, cache.host.key.dtype
    order = torch.randperm(num_blocks, generator=generator).tolist()
    # Entries beyond a row's blocks name a block full of NaN.
    width = max(counts, default=0) + 1
    table = torch.full((len(lengths), width), order.pop(), dtype=torch.int32)
    per_block = layout.groups_per_block
    groups = []
    shape = (layout.num_kv_heads, layout.head_size)
    bias = torch.randn(shape, generator=generator) * 2
    for row, length in enumerate(lengths):
        blocks = [order.pop() for _ in range(counts[row])]
        numbers = torch.tensor(blocks, dtype=torch.int64)
        table[row, : len(blocks)] = numbers
        position = torch.arange(length)
        where = numbers[position // block_size]
        key = torch.randn(length, *shape, generator=generator) + bias
        value = torch.randn(length, *shape, generator=generator)
        cache.host.key[where, :, position % block_size] = key.to(dtype)
        cache.host.value[where, :, position % block_size] = value.to(dtype)
        groups += [
            blocks[i // per_block] * per_block + i % per_block
            for i in range(length // layout.group_size)
        ]
    reference.quantize_groups(
        torch.tensor(groups, dtype=torch.int64), cache.host.key, cache.host.value, cache.derived
    )
    return Context(cache, table, torch.tensor(lengths, dtype=torch.int32))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all elements together; infinite if anything is NaN."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(1e-30)
    return float("inf") if error.isnan() else error.item()


@pytest.fixture
def build_cache() -> Callable[..., Cache]:
    return make_cache


@pytest.fixture
def build_context() -> Callable[..., Context]:
    return make_context


@pytest.fixture
def error_of() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_error
