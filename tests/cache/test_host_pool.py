"""The host pool of a GPU, with CUDA played: what is pinned, for how long, and what may fail."""

import ctypes
import gc
import math
import mmap
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_tailorkv.attention import impl as attention
from vllm_tailorkv.attention.impl import TailorKVImpl
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.cache import device_view, host_pool, memory, numa
from vllm_tailorkv.cache.host_pool import HostPool, allocate_host_pool
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

GIB = 1 << 30
PAGE = mmap.PAGESIZE
CUDA = torch.device("cuda", 1)
BLOCKS = 100
ODD = PageLayout(DerivedKind.ONEBIT, 1, 36, 64, 64, 1, 2, KeyLayout.TOKEN_MAJOR)
"""A block of 9,216 bytes: four begin on a page, the others within one."""
EVEN = PageLayout(DerivedKind.ONEBIT, 2, 64, 64, 64, 1, 2, KeyLayout.TOKEN_MAJOR)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def fields_of_mapping(address: int, file: str) -> list[str]:
    """What /proc says of the mapping that an address lies in; nothing where it lies in none."""
    found: list[str] = []
    for line in Path("/proc/self", file).read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            if found:
                break
            if begin <= address < end:
                found.append(line)
        elif found:
            found.append(line)
    return found


def is_mapped(address: int) -> bool:
    return bool(fields_of_mapping(address, "maps"))


class Driver:
    """Plays `torch.cuda.cudart()` as strictly as CUDA: pages are registered once.

    events: what was called, in order.
    pinned: bytes by address.
    pools: those of `layer`.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.pinned: dict[int, int] = {}
        self.history: list[tuple[int, int, int]] = []
        self.fails_at: int | None = None
        self.broken = False
        self.pools: list[HostPool] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.events.append("register")
        if len(self.history) == self.fails_at:
            return 2
        assert is_mapped(address)
        assert is_mapped(address + size - 1)
        first, last = address // PAGE, (address + size - 1) // PAGE
        for begin, length in self.pinned.items():
            if first <= (begin + length - 1) // PAGE and last >= begin // PAGE:
                return 712
        self.pinned[address] = size
        self.history.append((address, size, flags))
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.events.append("unregister")
        assert is_mapped(address), "unmapped while it is pinned"
        if self.broken:
            return 700
        return 0 if self.pinned.pop(address, None) else 713

    def cudaGetErrorString(self, status: int) -> str:
        return {2: "out of memory", 712: "already mapped"}[status]

    def synchronize(self) -> None:
        self.events.append("synchronize")
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class OnTheHost(device_view._Bytes):
    """Read by NumPy as torch reads it on a GPU."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.__cuda_array_interface__


def seen_from_the_device(pinned: torch.Tensor) -> torch.Tensor:
    assert pinned.is_contiguous()
    return torch.from_numpy(np.asarray(OnTheHost(pinned))).view(pinned.shape)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    played = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: played)
    monkeypatch.setattr(torch.cuda, "synchronize", played.synchronize)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(host_pool, "device_view", seen_from_the_device)
    monkeypatch.setattr(host_pool, "available_memory", lambda: 64 * GIB)
    monkeypatch.setattr(host_pool, "node_of", lambda device: None)
    return played


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the log."""
    lines: list[str] = []
    monkeypatch.setattr(
        host_pool.logger, "warning", lambda text, *values: lines.append(text % values)
    )
    host_pool._warn_once.cache_clear()
    return lines


@pytest.mark.parametrize("layout", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("pages_a_slice", [40, 102, 1 << 20])
def test_every_byte_is_pinned_once(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, layout: PageLayout, pages_a_slice: int
) -> None:
    limit = pages_a_slice * PAGE
    monkeypatch.setattr(host_pool, "_SLICE_BYTES", limit)
    pool = allocate_host_pool(BLOCKS, layout, CUDA)
    assert pool.pages.shape == (BLOCKS, layout.host_bytes)
    assert pool.pages.dtype == torch.uint8
    assert not pool.pages.any()
    at = base = pool.pages.data_ptr()
    assert base % PAGE == 0
    for address, size, flags in driver.history:
        assert address == at
        assert address % PAGE == 0
        assert (address - base) % layout.host_bytes == 0
        assert size <= limit
        assert flags == 3
        at += size
    # The last slice ends with the page that the last byte lies on.
    assert at == base + math.ceil(pool.pages.nbytes / PAGE) * PAGE
    assert len(driver.history) == math.ceil((at - base) / driver.history[0][1])
    assert (len(driver.history) > 1) == (pages_a_slice * PAGE < at - base)
    pool.release()
    assert not driver.pinned


def test_slices_of_16_gib() -> None:
    """Of a pool that no test can have: its slices are counted, not made."""
    unit = math.lcm(ODD.host_bytes, PAGE)
    sizes = []

    def register(address: int, size: int, flags: int) -> int:
        sizes.append(size)
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register)
    blocks = 40 * GIB // ODD.host_bytes // 4 * 4
    pool = torch.empty(blocks * ODD.host_bytes, dtype=torch.uint8, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "cudart", lambda: runtime)
        host_pool._register(pool, ODD, [])
    assert sum(sizes) == len(pool)
    assert len(sizes) == 3
    assert all(16 * GIB - unit < size <= 16 * GIB for size in sizes[:2])


def test_the_mapping(driver: Driver) -> None:
    """Private, with huge pages where they are, and not copied when the process forks."""
    pool = allocate_host_pool(4096, EVEN, CUDA)
    flags = next(
        line.split()[1:]
        for line in fields_of_mapping(pool.pages.data_ptr() + pool.pages.nbytes // 2, "smaps")
        if line.startswith("VmFlags:")
    )
    assert "dc" in flags
    assert "sh" not in flags
    pool.release()


def test_a_failure_in_the_middle_leaves_nothing(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_pool, "_SLICE_BYTES", 36 * PAGE)
    driver.fails_at = 3
    with pytest.raises(TailorKVError) as caught:
        allocate_host_pool(BLOCKS * 1000, ODD, CUDA)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("0.86 GiB", "out of memory", "error 2", "MEMLOCK", "lower host_pool_gib"):
        assert part in message
    assert driver.events == ["register"] * 4 + ["synchronize"] + ["unregister"] * 3
    assert not driver.pinned
    address = driver.history[0][0]
    del caught
    gc.collect()
    assert not is_mapped(address)


def test_a_failing_view_leaves_nothing(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pinned: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such view")

    monkeypatch.setattr(host_pool, "device_view", fail)
    with pytest.raises(ValueError, match="no such view"):
        allocate_host_pool(BLOCKS, EVEN, CUDA)
    assert driver.history
    assert not driver.pinned


def test_released_once_and_after_the_gpu_is_done(driver: Driver) -> None:
    pool = allocate_host_pool(BLOCKS, EVEN, CUDA)
    address = pool.pages.data_ptr()
    for _ in range(3):
        pool.release()
        assert driver.events == ["register", "synchronize", "unregister"]
        assert not pool.pages.numel()
    assert not is_mapped(address)


def test_a_dropped_pool_is_released(driver: Driver) -> None:
    allocate_host_pool(BLOCKS, EVEN, CUDA)
    assert driver.events == ["register", "synchronize", "unregister"]


def test_views_outlive_the_pool(driver: Driver) -> None:
    """Whoever still has a view may read it on the host; the last view takes the memory along."""
    pool = allocate_host_pool(BLOCKS, EVEN, CUDA)
    view = pool.pages.view(torch.bfloat16)[1:, 7]
    view.fill_(3)
    pool.release()
    del pool
    assert not driver.pinned
    assert is_mapped(view.data_ptr())
    assert (view == 3).all()
    address = view.data_ptr()
    del view
    assert not is_mapped(address)


def test_nothing_is_left_of_twenty_pools(driver: Driver) -> None:
    def state() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]
        return int(maps) >> 10, len(driver.pinned), len(weakref.finalize._registry)

    def once() -> None:
        pool = allocate_host_pool(16 * 64, EVEN, CUDA)
        pool.pages.fill_(1)
        pool.release()

    once()
    size, pinned, finalizers = state()
    for _ in range(20):
        once()
    later = state()
    assert later[0] - size < 32  # MiB; a pool has 32
    assert later[1:] == (pinned, finalizers)


def test_a_broken_gpu_is_only_logged(driver: Driver, warnings: list[str]) -> None:
    pool = allocate_host_pool(BLOCKS, EVEN, CUDA)
    driver.broken = True
    pool.release()
    assert driver.events[-2:] == ["synchronize", "unregister"]
    assert len(warnings) == 1
    assert "illegal memory access" in warnings[0]


def test_what_stays_pinned_is_logged(driver: Driver, warnings: list[str]) -> None:
    pool = allocate_host_pool(BLOCKS, EVEN, CUDA)
    driver.pinned.clear()
    pool.release()
    assert len(warnings) == 1
    assert "error 713" in warnings[0]


@pytest.mark.parametrize("gone", [False, True])
def test_exit_of_the_interpreter(gone: bool) -> None:
    """A pool that is alive at exit is unregistered then; without CUDA only the log says so."""
    code = f"""
import torch
from contextlib import nullcontext
from types import SimpleNamespace
from vllm_tailorkv.cache import host_pool
from vllm_tailorkv.layout import DerivedKind, PageLayout
def synchronize():
    if {gone}:
        raise RuntimeError("driver shutting down")
def unregister(address):
    print("unregistered", flush=True)
    return 4 if {gone} else 0
torch.cuda.cudart = lambda: SimpleNamespace(
    cudaHostRegister=lambda *_: 0, cudaHostUnregister=unregister)
torch.cuda.synchronize, torch.cuda.device = synchronize, nullcontext
host_pool.device_view = lambda pinned: pinned
layout = PageLayout(DerivedKind.ONEBIT, 2, 64, 64, 64, 1, 2)
host_pool.node_of = lambda device: None
host_pool.available_memory = lambda: 1 << 40
pool = host_pool.allocate_host_pool(10, layout, torch.device("cuda"))
view = pool.pages[3:]
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "unregistered\n"
    lines = result.stderr.splitlines()
    assert lines == (
        ["TailorKV: the end of a host pool failed: driver shutting down"] if gone else []
    )


def test_too_little_memory(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that would leave too little for the process itself is refused, before it is made."""
    size = 16 * 64 * EVEN.host_bytes
    monkeypatch.setattr(host_pool, "available_memory", lambda: GIB + size - 1)
    with pytest.raises(
        TailorKVError, match=r"0\.03 GiB .*on \S+ \(0\.03 GiB .*; lower host_pool_gib"
    ):
        allocate_host_pool(16 * 64, EVEN, CUDA)
    monkeypatch.setattr(host_pool, "available_memory", lambda: GIB // 2)
    with pytest.raises(TailorKVError, match=r"\(0\.00 GiB"):
        allocate_host_pool(16 * 64, EVEN, CUDA)
    assert not driver.events
    monkeypatch.setattr(host_pool, "available_memory", lambda: GIB + size)
    allocate_host_pool(16 * 64, EVEN, CUDA).release()


def test_more_than_the_kernel_maps(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pool, "available_memory", lambda: 1 << 62)
    with pytest.raises(TailorKVError, match=r"GiB .*annot allocate memory.*lower host_pool_gib"):
        allocate_host_pool((1 << 60) // EVEN.host_bytes, EVEN, CUDA)
    assert not driver.events


def test_on_a_cpu_nothing_is_pinned(driver: Driver) -> None:
    pool = allocate_host_pool(BLOCKS, EVEN, torch.device("cpu"))
    assert pool.pages.shape == (BLOCKS, EVEN.host_bytes)
    assert not pool.pages.any()
    pages = weakref.ref(pool.pages)
    pool.release()
    pool.release()
    assert not pool.pages.numel()
    assert pages() is None
    assert not driver.events


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    """Host and device see each other's bytes across slices, and nothing stays pinned."""
    monkeypatch.setattr(host_pool, "_SLICE_BYTES", 36 * PAGE)
    for _ in range(3):
        pool = allocate_host_pool(BLOCKS, ODD, torch.device("cuda"))
        assert pool.pages.is_cuda
        assert not pool.pages.any()
        address, size = pool.pages.data_ptr(), pool.pages.numel()
        host = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
        pool.pages.view(-1).copy_(torch.arange(size, device="cuda") % 251)
        torch.cuda.synchronize()
        assert torch.equal(host, (torch.arange(size) % 251).to(torch.uint8))
        host[16 * ODD.host_bytes :] = 7
        assert int((pool.pages[16:] != 7).sum()) == 0
        assert host.is_pinned()
        view = pool.pages[3]
        pool.release()
        assert not host.is_pinned()
        del view
        assert not is_mapped(address)
    assert not warnings


# ---- The layer that owns a pool. ----


@pytest.fixture
def layer(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> TailorKVImpl:
    """A layer whose pools are those of a GPU."""

    def allocate(num_blocks: int, layout: PageLayout, device: torch.device) -> HostPool:
        assert device.type == "cpu"
        driver.pools.append(allocate_host_pool(num_blocks, layout, CUDA))
        return driver.pools[-1]

    monkeypatch.setattr(attention, "allocate_host_pool", allocate)
    layer = TailorKVImpl.__new__(TailorKVImpl)
    layer.pages = layer.hot = layer.owner = None
    layer.config = TailorKVConfig()
    layer.spec = TailorKVSpec(
        block_size=EVEN.block_size,
        num_kv_heads=EVEN.num_kv_heads,
        head_size=EVEN.head_size,
        dtype=torch.bfloat16,
        page_size_padded=EVEN.derived_bytes,
        layout=EVEN,
        split=True,
    )
    return layer


def make_cache(blocks: int = 3) -> torch.Tensor:
    raw = torch.zeros(blocks, EVEN.derived_bytes, dtype=torch.uint8).view(torch.bfloat16)
    return raw.view(blocks, EVEN.num_kv_heads, EVEN.block_size, -1)


def test_the_layer_releases_with_its_cache(driver: Driver, layer: TailorKVImpl) -> None:
    cache = make_cache()
    layer.bind("layer", cache)
    assert layer.pages is not None
    address = layer.pages.host.key.data_ptr()
    assert list(driver.pinned) == [address]
    del cache
    assert layer.pages is None
    assert driver.events == ["register", "synchronize", "unregister"]
    assert not is_mapped(address)


def test_the_layer_releases_when_it_is_bound_anew(driver: Driver, layer: TailorKVImpl) -> None:
    first, second = make_cache(3), make_cache(5)
    layer.bind("layer", first)
    layer.bind("layer", second)
    assert driver.events == ["register", "synchronize", "unregister", "register"]
    del first
    assert layer.pages is not None
    assert layer.pages.host.value.shape[0] == 5
    assert len(driver.pinned) == 1
    layer.bind("layer", torch.tensor([]))
    assert layer.pages is None
    assert not driver.pinned
    del second
    assert driver.events == ["register", "synchronize", "unregister"] * 2


# ---- The memory node. ----


@pytest.fixture
def sysfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two memory nodes, and a GPU that is next to node 1."""
    for node in ("node0", "node1", "power"):
        (tmp_path / "devices/system/node" / node).mkdir(parents=True)
    gpu = tmp_path / "bus/pci/devices/0001:af:0b.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("1\n")
    monkeypatch.setattr(numa, "_SYSFS", tmp_path)
    properties = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xAF, pci_device_id=0x0B)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {CUDA: properties}.__getitem__)
    return gpu / "numa_node"


def test_node_of_a_gpu(sysfs: Path) -> None:
    assert numa.node_of(CUDA) == 1


@pytest.mark.parametrize("text", ["-1\n", "", "none\n"])
def test_a_system_that_does_not_know_the_node(sysfs: Path, text: str) -> None:
    sysfs.write_text(text)
    assert numa.node_of(CUDA) is None


def test_a_system_without_the_file(sysfs: Path) -> None:
    sysfs.unlink()
    assert numa.node_of(CUDA) is None


def test_one_node_only(sysfs: Path) -> None:
    (numa._SYSFS / "devices/system/node/node1").rmdir()
    assert numa.node_of(CUDA) is None


def test_the_pool_prefers_the_node(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    if not Path("/proc/self/numa_maps").exists():
        pytest.skip("the kernel has no memory nodes")
    asked: list[torch.device] = []

    def node_of(device: torch.device) -> int:
        asked.append(device)
        return 0

    def register(address: int, size: int, flags: int) -> int:
        lines = Path("/proc/self/numa_maps").read_text().splitlines()
        policies.extend(line.split()[1] for line in lines if int(line.split()[0], 16) == address)
        return original(address, size, flags)

    original = driver.cudaHostRegister
    policies: list[str] = []
    monkeypatch.setattr(host_pool, "node_of", node_of)
    monkeypatch.setattr(driver, "cudaHostRegister", register)
    pool = allocate_host_pool(4096, EVEN, CUDA)
    if warnings and "Operation not permitted" in warnings[0]:
        pytest.skip("this container may not choose")
    assert asked == [CUDA]
    # Before it is pinned, or its pages are there already.
    assert policies == ["prefer:0"]
    assert not warnings
    pool.release()


def test_a_refused_node_is_logged_once(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """The kernel knows no such node; a container that forbids the call looks the same."""
    monkeypatch.setattr(host_pool, "node_of", lambda device: 900)
    for _ in range(2):
        pool = allocate_host_pool(BLOCKS, EVEN, CUDA)
        assert driver.pinned
        pool.release()
    assert len(warnings) == 1
    assert "far from its GPU: the kernel refuses (" in warnings[0]


def test_a_machine_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    assert "s390x" in (numa.prefer_node(torch.zeros(PAGE, dtype=torch.uint8), 0) or "")


# ---- The memory that is left. ----


@pytest.fixture
def cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB)
    )
    return tmp_path


def test_memory_without_a_limit(cgroups: Path) -> None:
    assert memory.available_memory() == 100 * GIB
    (cgroups / "memory.max").write_text("max\n")
    (cgroups / "memory.current").write_text(f"{90 * GIB}\n")
    (cgroups / "memory.stat").write_text("")
    assert memory.available_memory() == 100 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container(cgroups: Path, version: int) -> None:
    names = ("memory.max", "memory.current", "memory.stat")
    prefix = ""
    if version == 1:
        (cgroups / "memory").mkdir()
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        names, prefix = tuple(f"memory/{name}" for name in names), "total_"
    limit, used, sums = (cgroups / name for name in names)
    limit.write_text(f"{40 * GIB}\n")
    used.write_text(f"{35 * GIB}\n")
    sums.write_text(
        f"active_file 7\n{prefix}anon 9\n{prefix}active_file {2 * GIB}\n"
        f"{prefix}inactive_file {8 * GIB}\n"
    )
    # What only caches files can be had.
    assert memory.available_memory() == 15 * GIB
    limit.write_text(f"{20 * GIB}\n")
    assert memory.available_memory() == 0
    limit.write_text(f"{1 << 62}\n")
    assert memory.available_memory() == 100 * GIB
