"""Pages by arithmetic: records without gaps or overlaps, sizes by formula."""

from itertools import product
from math import ceil

import pytest

from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

HEAD_SIZES = (64, 80, 96, 128, 256)
KEYS = [
    (KeyLayout.TOKEN_MAJOR, False),
    (KeyLayout.CHANNEL_MAJOR, False),
    (KeyLayout.CHANNEL_MAJOR, True),
]
CASES = [
    PageLayout(kind, heads, head_size, 128, group_size, bits, itemsize, *keys)
    for kind, heads, head_size, group_size, bits, itemsize, keys in product(
        DerivedKind, (1, 8), HEAD_SIZES, (32, 64, 128), (1, 2, 4), (2, 4), KEYS
    )
]


def used_bytes(layout: PageLayout) -> int:
    """The bytes of a record before padding, written out."""
    d, g, bits = layout.head_size, layout.group_size, layout.bits
    if layout.kind is DerivedKind.CHANNELS:
        return 2 * d * layout.kv_itemsize
    if layout.kind is DerivedKind.ONEBIT:
        return d * g // 8 + 2 * 2 * d
    keys = d * g * bits // 8 + 2 * 2 * d
    return keys + g * ceil(d * bits / 8) + 2 * 2 * g * ceil(d / g)


@pytest.mark.parametrize("kind", list(DerivedKind))
def test_fields(kind: DerivedKind) -> None:
    names = {
        DerivedKind.DENSE: [
            "key_codes",
            "key_scale",
            "key_zero",
            "value_codes",
            "value_scale",
            "value_zero",
        ],
        DerivedKind.ONEBIT: ["key_codes", "key_scale", "key_zero"],
        DerivedKind.CHANNELS: ["key_extremes"],
    }
    for layout in (case for case in CASES if case.kind is kind):
        assert list(layout.fields) == names[kind]
        end = 0
        for field in layout.fields.values():
            assert field.offset == end, layout
            assert field.offset % field.itemsize == 0, layout
            end = field.offset + field.num_bytes
        assert end == used_bytes(layout) <= layout.record_bytes, layout


def test_page_sizes() -> None:
    for layout in CASES:
        heads, size, d = layout.num_kv_heads, layout.kv_itemsize, layout.head_size
        assert layout.groups_per_block == 128 // layout.group_size
        assert layout.full_bytes == heads * 2 * 128 * d * size
        assert layout.host_bytes == heads * (3 if layout.key_rows else 2) * 128 * d * size
        unit = layout.group_size * size
        assert layout.record_bytes % unit == 0
        assert layout.record_bytes - used_bytes(layout) in range(unit)
        assert layout.derived_bytes == heads * layout.groups_per_block * layout.record_bytes
        assert layout.host_bytes_per_token * 128 == layout.host_bytes
        assert layout.derived_bytes_per_token * 128 == layout.derived_bytes


def test_pages_divide_into_cells() -> None:
    """vLLM counts a page in cells, one for each head and token, of whole elements."""
    for layout in CASES:
        cells = layout.num_kv_heads * layout.block_size
        for page in (layout.host_bytes + layout.derived_bytes, layout.derived_bytes):
            assert page % cells == 0, layout
            assert page // cells % layout.kv_itemsize == 0, layout


def test_regions_and_records_are_aligned() -> None:
    for layout in CASES:
        for offset in (layout.host_bytes, layout.derived_bytes, layout.record_bytes):
            assert offset % layout.kv_itemsize == 0, layout
            assert offset % 2 == 0, layout


@pytest.mark.parametrize(
    ("kind", "bits", "bytes_per_token"),
    [
        # Llama-3.1-8B: 8 KV heads of 128 channels, bfloat16, groups of 64. A head's token has
        # 512 bytes of K and V. Codes: 16 bytes a bit for each of K and V; scales and zeros: K
        # 512 bytes a group, V 8 bytes a token.
        (DerivedKind.DENSE, 1, 8 * (2 * 16 + 512 // 64 + 8)),
        (DerivedKind.DENSE, 2, 8 * (2 * 32 + 512 // 64 + 8)),
        (DerivedKind.DENSE, 4, 8 * (2 * 64 + 512 // 64 + 8)),
        (DerivedKind.ONEBIT, 2, 8 * (16 + 512 // 64)),
        (DerivedKind.CHANNELS, 2, 8 * 512 // 64),
    ],
)
def test_bytes_of_a_token(kind: DerivedKind, bits: int, bytes_per_token: int) -> None:
    layout = PageLayout(kind, 8, 128, 128, 64, bits, 2)
    assert layout.host_bytes_per_token == 8 * 512
    assert layout.derived_bytes_per_token == bytes_per_token


@pytest.mark.parametrize(("block_size", "group_size"), [(16, 64), (96, 64), (64, 128), (1, 32)])
def test_blocks_are_whole_groups(block_size: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size {block_size} is no multiple .* {group_size}"):
        PageLayout(DerivedKind.DENSE, 8, 128, block_size, group_size, 2, 2)


def test_groups_are_whole_bytes() -> None:
    with pytest.raises(ValueError, match="4 codes of 1 bits do not fill bytes"):
        PageLayout(DerivedKind.DENSE, 8, 128, 64, 4, 1, 2)


def test_token_major_keys_have_no_rows() -> None:
    with pytest.raises(ValueError, match="key_rows"):
        PageLayout(DerivedKind.ONEBIT, 1, 64, 128, 64, 1, 2, KeyLayout.TOKEN_MAJOR, key_rows=True)
