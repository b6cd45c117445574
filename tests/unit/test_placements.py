"""What a layer is bound to: two tiers in vLLM's page, or one there and one in our own pool."""

import gc
import weakref
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, compute_layer_kv_cache_shape_bytes

from vllm_tailorkv.attention.impl import Pages, TailorKVImpl
from vllm_tailorkv.attention.spec import TailorKVSpec, layer_spec
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.kernels import reference
from vllm_tailorkv.kernels.types import ChannelIndex, DenseCodes, OnebitIndex
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout
from vllm_tailorkv.plan import make_plan
from vllm_tailorkv.profile import ModelShape

BLOCKS, HEADS, HEAD_SIZE, BLOCK_SIZE, GROUP_SIZE = 4, 2, 80, 128, 64
LAYER = "model.layers.3.self_attn.attn"
VIEWS = {
    DerivedKind.DENSE: DenseCodes,
    DerivedKind.ONEBIT: OnebitIndex,
    DerivedKind.CHANNELS: ChannelIndex,
}

each_kind = pytest.mark.parametrize("kind", list(DerivedKind))
each_placement = pytest.mark.parametrize("split", [False, True], ids=["joint", "split"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def make_spec(kind: DerivedKind, split: bool, dtype: torch.dtype = torch.bfloat16) -> TailorKVSpec:
    fields: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "num_kv_heads": HEADS,
        "head_size": HEAD_SIZE,
        "dtype": dtype,
        "split": split,
    }
    rows = kind is DerivedKind.CHANNELS
    order = KeyLayout.CHANNEL_MAJOR if rows else KeyLayout.TOKEN_MAJOR
    layout = PageLayout(
        kind, HEADS, HEAD_SIZE, BLOCK_SIZE, GROUP_SIZE, 2, dtype.itemsize, order, rows
    )
    fields["layout"] = layout
    page = layout.derived_bytes + (0 if split else layout.host_bytes)
    assert page % (HEADS * BLOCK_SIZE) == 0
    return TailorKVSpec(**fields, state_content_bytes=page // (HEADS * BLOCK_SIZE))


def make_cache(spec: TailorKVSpec, raw: torch.Tensor | None = None) -> torch.Tensor:
    """A layer's cache as vLLM hands it over, all NaN."""
    shape = compute_layer_kv_cache_shape_bytes(spec, BLOCKS)
    if raw is None:
        raw = torch.empty(BLOCKS * spec.page_size_bytes, dtype=torch.uint8)
    raw.fill_(0xFF)
    return raw.view(shape).view(spec.dtype)


def make_impl(spec: TailorKVSpec | None) -> TailorKVImpl:
    impl = TailorKVImpl.__new__(TailorKVImpl)
    impl.spec, impl.pages, impl.hot, impl.owner = spec, None, None, None
    impl.config = TailorKVConfig()
    return impl


def bound(impl: TailorKVImpl) -> Pages:
    assert impl.pages is not None
    return impl.pages


def leaves(pages: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples."""
    if isinstance(pages, torch.Tensor):
        return [pages]
    return [leaf for part in pages for leaf in leaves(part)]


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


@each_kind
@each_placement
@each_dtype
def test_shapes(kind: DerivedKind, split: bool, dtype: torch.dtype) -> None:
    spec = make_spec(kind, split, dtype)
    impl, cache = make_impl(spec), make_cache(spec)
    impl.bind(LAYER, cache)
    host, derived = bound(impl).host, bound(impl).derived
    for pages in (host.key, host.value):
        assert pages.shape == (BLOCKS, HEADS, BLOCK_SIZE, HEAD_SIZE)
        assert pages.dtype == dtype
    by_channels = kind is DerivedKind.CHANNELS
    assert host.key.stride()[2:] == ((1, BLOCK_SIZE) if by_channels else (HEAD_SIZE, 1))
    assert host.value.stride()[2:] == (HEAD_SIZE, 1)
    assert isinstance(derived, VIEWS[kind])
    groups = BLOCK_SIZE // GROUP_SIZE
    for tensor in leaves(derived):
        assert tensor.shape[:3] == (BLOCKS, HEADS, groups)
    if isinstance(derived, ChannelIndex):
        assert derived.extremes.shape[3:] == (2, HEAD_SIZE)
        assert derived.extremes.dtype == dtype
    else:
        bits = 2 if kind is DerivedKind.DENSE else 1
        assert derived.key.codes.shape[3:] == (HEAD_SIZE, GROUP_SIZE * bits // 8)
        assert derived.key.scale.shape == derived.key.zero.shape
        assert derived.key.zero.shape[3:] == (HEAD_SIZE,)
    if isinstance(derived, DenseCodes):
        assert derived.value.codes.shape[3:] == (GROUP_SIZE, HEAD_SIZE * 2 // 8)
        assert derived.value.scale.shape == derived.value.zero.shape
        assert derived.value.zero.shape[3:] == (GROUP_SIZE, 2)


@each_kind
@each_placement
@each_dtype
def test_tiers_do_not_overlap(kind: DerivedKind, split: bool, dtype: torch.dtype) -> None:
    """Each byte is written through one view at most; joint views fill vLLM's page."""
    spec = make_spec(kind, split, dtype)
    impl, cache = make_impl(spec), make_cache(spec)
    impl.bind(LAYER, cache)
    host = [bound(impl).host.key, bound(impl).host.value]
    if (rows := bound(impl).host.key_rows) is not None:
        host.append(rows)
    derived = leaves(bound(impl).derived)
    for number, tensor in enumerate(host + derived):
        others = [raw_bytes(other) for other in host + derived if other is not tensor]
        tensor.fill_(number)
        kept = [other for other in host + derived if other is not tensor]
        for before, other in zip(others, kept, strict=True):
            assert torch.equal(raw_bytes(other), before)
    layout = spec.layout
    pages = cache.view(BLOCKS, -1).view(torch.uint8)
    assert pages.shape[1] == layout.derived_bytes + (0 if split else layout.host_bytes)
    if not split:
        assert not (pages[:, : layout.host_bytes] == 0xFF).any()
    used = sum(field.num_bytes for field in layout.fields.values())
    records = pages[:, -layout.derived_bytes :].view(BLOCKS, -1, layout.record_bytes)
    assert (records[..., used:] == 0xFF).all()  # padding is left alone
    assert all(torch.equal(tensor, torch.full_like(tensor, i)) for i, tensor in enumerate(host))


@each_kind
def test_split_host_pages_are_not_in_the_page(kind: DerivedKind) -> None:
    spec = make_spec(kind, split=True)
    impl, cache = make_impl(spec), make_cache(spec)
    before = raw_bytes(cache)
    impl.bind(LAYER, cache)
    host = bound(impl).host
    assert not host.key.any()  # our own pool starts with zeros
    assert not host.value.any()
    host.key.fill_(1)
    host.value.fill_(2)
    assert torch.equal(raw_bytes(cache), before)


@each_kind
def test_both_placements_hold_the_same(kind: DerivedKind) -> None:
    """The same K and V give the same records, wherever the tiers lie."""
    generator = torch.Generator().manual_seed(2)
    shape = (BLOCKS, HEADS, BLOCK_SIZE, HEAD_SIZE)
    key, value = torch.randn(2, *shape, generator=generator).bfloat16()
    groups = torch.arange(BLOCKS * BLOCK_SIZE // GROUP_SIZE)
    results = []
    caches = []  # alive, or the pages are let go
    for split in (False, True):
        spec = make_spec(kind, split)
        impl, cache = make_impl(spec), make_cache(spec)
        caches.append(cache)
        impl.bind(LAYER, cache)
        pages = bound(impl)
        pages.host.key.copy_(key)
        pages.host.value.copy_(value)
        reference.quantize_groups(groups, pages.host.key, pages.host.value, pages.derived)
        assert torch.equal(pages.host.key, key)
        assert torch.equal(pages.host.value, value)
        results.append([raw_bytes(tensor) for tensor in leaves(pages.derived)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_placement
def test_pages_with_gaps_between(split: bool) -> None:
    """Another layer's page may lie between two of ours."""
    spec = make_spec(DerivedKind.DENSE, split)
    shape = compute_layer_kv_cache_shape_bytes(spec, BLOCKS)
    both = torch.full((BLOCKS, 2, spec.page_size_bytes), 0xFF, dtype=torch.uint8)
    impl = make_impl(spec)
    cache = both[:, 1].view(shape).view(spec.dtype)
    impl.bind(LAYER, cache)
    for tensor in leaves(bound(impl).derived) + list(bound(impl).host[:2]):
        tensor.fill_(1)
    assert (both[:, 0] == 0xFF).all()
    assert (both[:, 1] != 0xFF).any()


@each_placement
def test_pages_live_as_long_as_the_cache(split: bool) -> None:
    spec = make_spec(DerivedKind.ONEBIT, split)
    memory = np.zeros(BLOCKS * spec.page_size_bytes, dtype=np.uint8)
    alive = weakref.ref(memory)
    impl, cache = make_impl(spec), make_cache(spec, torch.from_numpy(memory))
    del memory
    impl.bind(LAYER, cache)
    assert bound(impl).host.key.numel()
    assert alive() is not None
    del cache
    gc.collect()
    assert impl.pages is None
    assert alive() is None


@each_placement
def test_an_empty_cache_lets_go_of_the_pages(split: bool) -> None:
    """So vLLM releases a cache while the layer lives on."""
    impl = make_impl(make_spec(DerivedKind.ONEBIT, split))
    assert impl.spec is not None
    cache = make_cache(impl.spec)
    impl.bind(LAYER, cache)
    impl.bind(LAYER, torch.tensor([]))
    assert impl.pages is None


@each_placement
def test_bound_anew(split: bool) -> None:
    """The end of an earlier cache leaves the pages of the present one alone."""
    impl = make_impl(make_spec(DerivedKind.CHANNELS, split))
    assert impl.spec is not None
    first, second = make_cache(impl.spec), make_cache(impl.spec)
    impl.bind(LAYER, first)
    earlier = weakref.ref(bound(impl))
    impl.bind(LAYER, second)
    pages = bound(impl)
    del first
    assert impl.pages is pages
    assert earlier() is None
    del second
    assert impl.pages is None


def test_layer_of_another_kind() -> None:
    impl = make_impl(None)
    impl.bind(LAYER, torch.tensor([]))
    with pytest.raises(TailorKVError, match=f"the cache of {LAYER} .*not supported"):
        impl.bind(LAYER, torch.zeros(2, 2, 2, 2))


def config_with(dense: tuple[int, ...], **options: Any) -> Any:
    """What of vLLM's configuration says the plan of a model of eight layers."""
    model = ModelShape("test", "LlamaForCausalLM", 8, 3, 256)
    plan = make_plan({"profile": {"dense_layers": dense}, **options}, model)
    return SimpleNamespace(additional_config={"tailorkv_plan": plan.as_json()})


@pytest.mark.parametrize(
    ("dense", "index", "kind"),
    [
        ((3,), "channels", DerivedKind.DENSE),
        ((0,), "channels", DerivedKind.CHANNELS),
        ((0,), "onebit", DerivedKind.ONEBIT),
    ],
)
def test_spec_of_a_layer(dense: tuple[int, ...], index: str, kind: DerivedKind) -> None:
    """The layer's kind follows from the plan; vLLM's page has exactly our bytes."""
    cases = product((64, 80, 96, 128, 256), (32, 64, 128), (1, 2, 4), (False, True))
    name = "index_group_size" if kind is DerivedKind.ONEBIT else "group_size"
    for head_size, group_size, bits, split in cases:
        options = {"index": index, name: group_size, "bits": bits}
        config = config_with(dense, **options, placement="split" if split else "joint")
        given = FullAttentionSpec(
            block_size=128, num_kv_heads=3, head_size=head_size, dtype=torch.float32
        )
        spec = layer_spec(given, LAYER, config)
        layout = spec.layout
        assert (layout.kind, layout.group_size, layout.bits) == (kind, group_size, bits)
        assert spec.split == split
        assert spec.page_size_bytes == layout.derived_bytes + (0 if split else layout.host_bytes)
        assert spec.state_content_size_bytes % torch.float32.itemsize == 0


@pytest.mark.parametrize(("block_size", "group_size"), [(64, 64), (128, 128), (192, 64), (32, 32)])
def test_groups_of_the_index_fit_the_block(block_size: int, group_size: int) -> None:
    given = FullAttentionSpec(
        block_size=block_size, num_kv_heads=3, head_size=64, dtype=torch.bfloat16
    )
    assert layer_spec(given, LAYER, config_with(())).layout.group_size == group_size


def test_spec_of_unlike_heads() -> None:
    config: Any = None
    given = FullAttentionSpec(
        block_size=128, num_kv_heads=2, head_size=192, head_size_v=128, dtype=torch.bfloat16
    )
    with pytest.raises(TailorKVError, match=f"{LAYER} has V heads of 128 .*K heads of 192"):
        layer_spec(given, LAYER, config)


def test_specs_of_one_group_are_equal() -> None:
    dense, other = make_spec(DerivedKind.DENSE, False), make_spec(DerivedKind.ONEBIT, False)
    merged = TailorKVSpec.merge([dense, dense])
    assert merged == dense
    assert merged is not dense
    with pytest.raises(AssertionError):  # what vLLM takes as "not uniform"
        TailorKVSpec.merge([dense, other])


def test_a_copy_with_other_blocks_has_their_layout() -> None:
    """vLLM makes such copies to compute page sizes."""
    spec = make_spec(DerivedKind.DENSE, False)
    half = spec.copy_with_new_block_size(BLOCK_SIZE // 2)
    assert half.layout.block_size == BLOCK_SIZE // 2
    assert half.layout.groups_per_block == spec.layout.groups_per_block // 2
