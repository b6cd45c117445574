"""Typed views of the two tiers, carved from raw bytes. Nothing is copied or owned here."""

from typing import NamedTuple

import torch

from vllm_tailorkv.kernels.types import (
    ChannelIndex,
    DenseCodes,
    DerivedPages,
    GroupCodes,
    OnebitIndex,
)
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout


class HostPages(NamedTuple):
    """K and V of every block in full precision.

    key, value: logical [NB, Hk, bs, d] views in the model's dtype (see `kernels.types`).
    key_rows: K once more, token-major [NB, Hk, bs, d], if the layout has it.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_rows: torch.Tensor | None

    @property
    def gathered_key(self) -> torch.Tensor:
        """K as single tokens are best read from: [NB, Hk, bs, d]."""
        return self.key if self.key_rows is None else self.key_rows


def host_pages(pages: torch.Tensor, layout: PageLayout, dtype: torch.dtype) -> HostPages:
    """View host regions.

    Args:
        pages: uint8 [NB, host_bytes], the last axis contiguous; the first may have gaps.
        layout: the layout of these pages.
        dtype: the model's dtype, of `layout.kv_itemsize` bytes.
    """
    size = layout.block_size * layout.head_size
    parts = pages.view(dtype).unflatten(1, (layout.num_kv_heads, layout.host_parts, size))
    arrays = [
        parts[:, :, i].unflatten(2, (layout.block_size, layout.head_size))
        for i in range(layout.host_parts)
    ]
    if layout.key_layout is KeyLayout.TOKEN_MAJOR:
        return HostPages(arrays[0], arrays[1], None)
    key = parts[:, :, 0].unflatten(2, (layout.head_size, layout.block_size)).transpose(2, 3)
    return HostPages(key, arrays[1], arrays[2] if layout.key_rows else None)


def derived_pages(pages: torch.Tensor, layout: PageLayout, dtype: torch.dtype) -> DerivedPages:
    """View derived regions.

    Args:
        pages: uint8 [NB, derived_bytes], the last axis contiguous; the first may have gaps.
        layout: the layout of these pages.
        dtype: the model's dtype.
    """
    records = pages.unflatten(
        1, (layout.num_kv_heads, layout.groups_per_block, layout.record_bytes)
    )

    def field(name: str, field_dtype: torch.dtype) -> torch.Tensor:
        spec = layout.fields[name]
        part = records[..., spec.offset : spec.offset + spec.num_bytes]
        return part.view(field_dtype).unflatten(3, spec.shape)

    def codes(prefix: str) -> GroupCodes:
        return GroupCodes(
            field(f"{prefix}_codes", torch.uint8),
            field(f"{prefix}_scale", torch.float16),
            field(f"{prefix}_zero", torch.float16),
        )

    if layout.kind is DerivedKind.CHANNELS:
        return ChannelIndex(field("key_extremes", dtype))
    if layout.kind is DerivedKind.ONEBIT:
        return OnebitIndex(codes("key"))
    return DenseCodes(codes("key"), codes("value"))
