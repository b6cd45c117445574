"""The bytes of a cache, counted, are those that its tensors take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_tailorkv.attention.budget import cache_sizing
from vllm_tailorkv.attention.spec import TailorKVSpec
from vllm_tailorkv.cache.host_pool import allocate_host_pool
from vllm_tailorkv.cache.sizing import GIB, CacheSizing, size_cache, together
from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

BLOCKS = 5
CPU = torch.device("cpu")


def layout_of(kind: DerivedKind, bits: int = 2) -> PageLayout:
    rows = kind is DerivedKind.CHANNELS
    order = KeyLayout.CHANNEL_MAJOR if rows else KeyLayout.TOKEN_MAJOR
    return PageLayout(kind, 2, 80, 128, 64, bits, 2, order, rows)


LAYOUTS = {
    0: layout_of(DerivedKind.DENSE),
    1: layout_of(DerivedKind.DENSE),
    2: layout_of(DerivedKind.CHANNELS),
    7: layout_of(DerivedKind.ONEBIT),
}


def sizing_of(**changes: Any) -> CacheSizing:
    fields: dict[str, Any] = {
        "dense_layers": (0,),
        "sparse_layers": (1,),
        "block_size": 128,
        "full_bytes": 1000,
        "host_bytes": 1000,
        "derived_bytes": 100,
        "other_bytes": 0,
        "split": False,
        "num_kv_heads": 2,
        "head_size": 80,
    }
    return CacheSizing(**(fields | changes))


def leaves(pages: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples."""
    if isinstance(pages, torch.Tensor):
        return [pages]
    return [leaf for part in pages for leaf in leaves(part)]


@pytest.mark.parametrize("split", [False, True])
def test_sum_of_the_layers(split: bool) -> None:
    sizing = size_cache(LAYOUTS, 12, split=split)
    assert (sizing.dense_layers, sizing.sparse_layers) == ((0, 1), (2, 7))
    assert sizing.full_bytes == sum(layout.full_bytes for layout in LAYOUTS.values())
    assert sizing.host_bytes == sum(layout.host_bytes for layout in LAYOUTS.values())
    assert sizing.host_bytes == sizing.full_bytes + LAYOUTS[2].full_bytes // 2
    assert sizing.derived_bytes == sum(layout.derived_bytes for layout in LAYOUTS.values())
    assert (sizing.block_size, sizing.num_kv_heads, sizing.head_size) == (128, 2, 80)
    host = 0 if split else sizing.host_bytes
    assert sizing.pool_bytes == host + sizing.derived_bytes + 12


def test_order_of_the_layers() -> None:
    backwards = dict(reversed(LAYOUTS.items()))
    assert size_cache(backwards, 0, split=False) == size_cache(LAYOUTS, 0, split=False)


def test_bytes_are_those_of_the_tensors() -> None:
    """Every byte of the host tier is K or V, and of the derived tier a field or padding."""
    sizing = size_cache(LAYOUTS, 0, split=True)
    host_bytes = derived_bytes = 0
    for layout in LAYOUTS.values():
        host = allocate_host_pool(BLOCKS, layout, CPU).pages
        assert host.dtype == torch.uint8
        assert not host.any()
        pages = host_pages(host, layout, torch.bfloat16)
        rows = 0 if pages.key_rows is None else pages.key_rows.nbytes
        assert pages.key.nbytes + pages.value.nbytes + rows == host.nbytes
        host_bytes += host.nbytes
        derived = torch.zeros(BLOCKS, layout.derived_bytes, dtype=torch.uint8)
        viewed = leaves(derived_pages(derived, layout, torch.bfloat16))
        used = sum(tensor.nbytes for tensor in viewed)
        padding = layout.record_bytes - sum(field.num_bytes for field in layout.fields.values())
        records = BLOCKS * layout.num_kv_heads * layout.groups_per_block
        assert used + records * padding == derived.nbytes
        derived_bytes += derived.nbytes
    assert host_bytes == BLOCKS * sizing.host_bytes
    assert derived_bytes == BLOCKS * sizing.derived_bytes


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.kind.value)
def test_views_of_fields_do_not_overlap(layout: PageLayout) -> None:
    """Each byte of a record belongs to one field at most, and all fields lie within it."""
    derived = torch.zeros(BLOCKS, layout.derived_bytes, dtype=torch.uint8)
    for tensor in leaves(derived_pages(derived, layout, torch.bfloat16)):
        before = derived.clone()
        tensor.view(torch.uint8).bitwise_or_(0x80)
        assert int((derived != before).sum()) == tensor.nbytes


def test_host_pool_beyond_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(TailorKVError, match=r"0\.00 GiB .*lower host_pool_gib"):
        allocate_host_pool(BLOCKS, LAYOUTS[0], CPU)


def test_other_errors_of_the_host_pool_are_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(torch, "empty", broken)
    with pytest.raises(RuntimeError, match="of another kind"):
        allocate_host_pool(BLOCKS, LAYOUTS[0], CPU)


def spec_of(layout: PageLayout, *, split: bool) -> TailorKVSpec:
    page = layout.derived_bytes + (0 if split else layout.host_bytes)
    return TailorKVSpec(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_size,
        dtype=torch.bfloat16,
        layout=layout,
        split=split,
        state_content_bytes=page // (layout.num_kv_heads * layout.block_size),
    )


@pytest.mark.parametrize("split", [False, True])
def test_specs_of_a_worker(split: bool) -> None:
    """What vLLM counts for its pool is what we count for it."""
    specs: dict[str, Any] = {
        f"model.layers.{i}.self_attn.attn": spec_of(layout, split=split)
        for i, layout in LAYOUTS.items()
    }
    window = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=80, dtype=torch.bfloat16)
    specs["model.layers.3.self_attn.attn"] = window
    sizing = cache_sizing(specs)
    assert sizing == size_cache(LAYOUTS, window.page_size_bytes, split=split)
    assert sizing is not None
    assert sizing.pool_bytes == sum(spec.page_size_bytes for spec in specs.values())


def test_worker_without_our_layers() -> None:
    window = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=80, dtype=torch.bfloat16)
    assert cache_sizing({"model.layers.3.self_attn.attn": window}) is None
    assert cache_sizing({}) is None


@pytest.mark.parametrize("host_pool", [None, 5000])
def test_memory_of_joint_pages(host_pool: int | None) -> None:
    assert sizing_of().memory_for_vllm(123_456, host_pool) == 123_456


@given(
    available=st.integers(0, 10**12),
    host=st.integers(1, 10**7),
    derived=st.integers(1, 10**7),
    other=st.integers(0, 10**6),
)
def test_share_of_the_memory(available: int, host: int, derived: int, other: int) -> None:
    """Both tiers of as many blocks as fit together."""
    sizing = sizing_of(host_bytes=host, derived_bytes=derived, other_bytes=other, split=True)
    blocks = sizing.memory_for_vllm(available, None) // sizing.pool_bytes
    assert blocks == available // (host + derived + other)


@given(
    available=st.integers(0, 10**12),
    pool=st.integers(0, 10**12),
    host=st.integers(1, 10**7),
    derived=st.integers(1, 10**7),
)
def test_memory_with_a_host_pool(available: int, pool: int, host: int, derived: int) -> None:
    """As many blocks as both budgets hold."""
    sizing = sizing_of(host_bytes=host, derived_bytes=derived, split=True)
    memory = sizing.memory_for_vllm(available, pool)
    assert memory <= available
    assert memory // sizing.pool_bytes == min(available // derived, pool // host)


def test_description() -> None:
    sizing = sizing_of(full_bytes=GIB, host_bytes=GIB, derived_bytes=GIB // 8)
    assert sizing.describe(9, 4096) == [
        "host tier: 8,388,608 bytes a token in vLLM's pages, 9.00 GiB in all",
        "derived tier: 1,048,576 bytes a token (12.5% of K and V), 1.12 GiB in all",
        "9 blocks of 128 tokens: 1,024 tokens; one request may have 1,024",
    ]


def test_workers_share_blocks_and_have_bytes_of_their_own() -> None:
    first = sizing_of(full_bytes=128, host_bytes=256, derived_bytes=64, other_bytes=32)
    second = replace(first, dense_layers=(7,), sparse_layers=(8, 9), derived_bytes=128)
    all_of_them = together([first, second])
    assert all_of_them.dense_layers == (*first.dense_layers, 7)
    assert all_of_them.sparse_layers == (*first.sparse_layers, 8, 9)
    assert (all_of_them.full_bytes, all_of_them.host_bytes) == (256, 512)
    assert (all_of_them.derived_bytes, all_of_them.other_bytes) == (192, 64)
    assert all_of_them.block_size == first.block_size
    assert together([first]) == first


def test_description_of_split_pages_and_other_layers() -> None:
    sizing = sizing_of(
        full_bytes=128_000,
        host_bytes=160_000,
        derived_bytes=12_800,
        other_bytes=1280 * 128,
        split=True,
    )
    assert sizing.describe(1001, 4096) == [
        "host tier: 1,250 bytes a token in a pool of our own, 250 of them K once more (key_rows), "
        "0.15 GiB in all",
        "derived tier: 100 bytes a token (10.0% of K and V), 0.01 GiB in all",
        "other layers: 1,280 bytes a token",
        "1,001 blocks of 128 tokens: 128,000 tokens; one request may have 4,096",
    ]
