"""Huge pages are asked for where they can be, and nothing else changes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_tailorkv.cache import huge_pages
from vllm_tailorkv.cache.host_pool import allocate_host_pool
from vllm_tailorkv.cache.huge_pages import advise_huge_pages, prepare_huge_pages
from vllm_tailorkv.layout import DerivedKind, PageLayout

HUGE = 2 << 20
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")

with_huge_pages = pytest.mark.skipif(
    not SYSTEM.is_file() or "[never]" in SYSTEM.read_text(), reason="the system has no huge pages"
)


def advised_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's storage in mappings that are advised to use huge pages (`hg`)."""
    begin = tensor.untyped_storage().data_ptr()
    end = begin + tensor.untyped_storage().nbytes()
    total, inside = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(text, 16) for text in header.groups())
            inside = max(0, min(high, end) - max(low, begin))
        elif line.startswith("VmFlags:") and " hg" in line:
            total += inside
    return total


@with_huge_pages
@pytest.mark.parametrize("offset", [0, 1, 4097])
@pytest.mark.parametrize("size", [2 * HUGE, 3 * HUGE + 12345])
def test_whole_huge_pages_are_advised(offset, size):
    storage = torch.randint(256, (offset + size,), dtype=torch.uint8)
    before = storage.clone()
    part = storage[offset:]
    assert advise_huge_pages(part) is None
    assert torch.equal(storage, before)
    whole = (part.data_ptr() + size) // HUGE - -(-part.data_ptr() // HUGE)
    assert advised_bytes(storage) >= whole * HUGE
    assert advise_huge_pages(part) is None


@with_huge_pages
def test_strided_views_of_one_storage():
    """As vLLM places layers: side by side in the blocks of one tensor."""
    storage = torch.randint(256, (4, 2, HUGE), dtype=torch.uint8)
    before = storage.clone()
    for layer in storage.unbind(1):
        assert advise_huge_pages(layer) is None
    assert torch.equal(storage, before)


@with_huge_pages
def test_memory_never_touched():
    assert advise_huge_pages(torch.empty(8 * HUGE, dtype=torch.uint8)) is None


@with_huge_pages
def test_host_pool():
    layout = PageLayout(DerivedKind.CHANNELS, 8, 128, 128, 64, 1, 2)
    pool = allocate_host_pool(16, layout, torch.device("cpu")).pages
    assert pool.shape == (16, layout.host_bytes)
    assert not pool.any()
    assert advised_bytes(pool) >= pool.nbytes - 2 * HUGE


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (1000,)])
def test_too_small(shape, monkeypatch, tmp_path):
    size = tmp_path / "hpage_pmd_size"
    size.write_text(f"{HUGE}\n")
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", size)
    monkeypatch.setattr(sys, "platform", "linux")
    assert "smaller than a huge page" in (advise_huge_pages(torch.zeros(shape)) or "")


def test_refusals(monkeypatch, tmp_path):
    tensor = torch.zeros(HUGE)
    assert "device" in (advise_huge_pages(tensor.to("meta")) or "")
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", tmp_path / "none")
    assert "no transparent huge pages" in (advise_huge_pages(tensor) or "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in (advise_huge_pages(tensor) or "")


@with_huge_pages
def test_the_system_says_never(monkeypatch, tmp_path):
    mode = tmp_path / "enabled"
    mode.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_MODE_FILE", mode)
    assert "says never" in (advise_huge_pages(torch.zeros(HUGE)) or "")


@with_huge_pages
def test_the_kernel_refuses(monkeypatch):
    monkeypatch.setattr(huge_pages, "_MADV_HUGEPAGE", -1)
    assert "refuses (Invalid argument)" in (advise_huge_pages(torch.zeros(HUGE)) or "")


@with_huge_pages
@pytest.mark.parametrize("chosen", [None, "0"])
def test_processes_started_later_allocate_in_huge_pages(monkeypatch, chosen):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if chosen is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", chosen)
    prepare_huge_pages()
    code = (
        "import sys, torch; sys.path.insert(0, 'tests/cache')\n"
        "from test_huge_pages import HUGE, advised_bytes\n"
        "print(advised_bytes(torch.zeros(4 * HUGE, dtype=torch.uint8)) > 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == str(chosen is None)
