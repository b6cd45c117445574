"""Where every byte of a page lies. Pure arithmetic: no torch, no vLLM.

A *page* is what one layer keeps of one block of `block_size` tokens. It has two regions:

- **host**, the truth: `[num_kv_heads, 2, block_size * head_size]` elements of the
  model's dtype, K before V within a head. Behind V there may be K once more, token by token: decode
  steps gather single tokens, and where K is channel-major every element of a token lies on a cache
  line of its own.
- **derived**, a pure function of the host region: `[num_kv_heads, groups_per_block,
  record_bytes]` bytes, one *record* for every group of `group_size` tokens, so that a
  scan over one head reads consecutive bytes.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from math import ceil, prod

GIB = 1 << 30
"""Bytes of what messages and options call a GiB."""


class KeyLayout(Enum):
    """The order of K within a head of a host page."""

    CHANNEL_MAJOR = "channel_major"
    """`[head_size, block_size]`: a channel of a block is contiguous (an index of channels)."""
    TOKEN_MAJOR = "token_major"
    """`[block_size, head_size]`: a token's row is contiguous (one zero-copy read)."""


class DerivedKind(Enum):
    """What the derived region of a layer holds."""

    DENSE = "dense"
    """Low-bit codes of K and V (a dense layer)."""
    ONEBIT = "onebit"
    """1-bit codes of K (a sparse layer whose index is `onebit`)."""
    CHANNELS = "channels"
    """The extremes of every channel of K (a sparse layer whose index is `channels`)."""


@dataclass(frozen=True)
class Field:
    """One array inside a record.

    Args:
        offset: bytes from the start of the record.
        shape: elements of one record.
        itemsize: bytes of an element.
    """

    offset: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def num_bytes(self) -> int:
        """Bytes this array takes."""
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class PageLayout:
    """The layout of one layer's pages.

    Args:
        kind: what the derived region holds.
        num_kv_heads: KV heads on this rank.
        head_size: channels of a head.
        block_size: tokens of a block, a multiple of `group_size`.
        group_size: tokens (K) or channels (V) that share a scale and a zero.
        bits: bits of a code of a dense layer (the onebit index has 1).
        kv_itemsize: bytes of one element of K or V.
        key_layout: the order of K in the host region.
        key_rows: whether the host region holds K once more, token-major.
    """

    kind: DerivedKind
    num_kv_heads: int
    head_size: int
    block_size: int
    group_size: int
    bits: int
    kv_itemsize: int
    key_layout: KeyLayout = KeyLayout.TOKEN_MAJOR
    key_rows: bool = False

    def __post_init__(self) -> None:
        if self.block_size % self.group_size:
            raise ValueError(
                f"block_size {self.block_size} is no multiple of group_size {self.group_size}"
            )
        if self.group_size * self.bits % 8:
            raise ValueError(f"{self.group_size} codes of {self.bits} bits do not fill bytes")
        if self.key_rows and self.key_layout is KeyLayout.TOKEN_MAJOR:
            raise ValueError("key_rows of token-major K would be the same again")

    @property
    def groups_per_block(self) -> int:
        """Groups of a block."""
        return self.block_size // self.group_size

    @property
    def num_value_groups(self) -> int:
        """Groups of channels of one V row; the last one may be partial."""
        return ceil(self.head_size / self.group_size)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """The arrays of a record by name, in order, without gaps."""
        d, g = self.head_size, self.group_size
        shapes: list[tuple[str, tuple[int, ...], int]] = []
        if self.kind is DerivedKind.CHANNELS:
            shapes.append(("key_extremes", (2, d), self.kv_itemsize))
        else:
            bits = self.bits if self.kind is DerivedKind.DENSE else 1
            shapes.append(("key_codes", (d, g * bits // 8), 1))
            shapes.append(("key_scale", (d,), 2))
            shapes.append(("key_zero", (d,), 2))
        if self.kind is DerivedKind.DENSE:
            shapes.append(("value_codes", (g, ceil(d * self.bits / 8)), 1))
            shapes.append(("value_scale", (g, self.num_value_groups), 2))
            shapes.append(("value_zero", (g, self.num_value_groups), 2))
        fields, offset = {}, 0
        for name, shape, itemsize in shapes:
            fields[name] = Field(offset, shape, itemsize)
            offset += fields[name].num_bytes
        return fields

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a record, padded so that a page is whole elements per token and head."""
        used = sum(field.num_bytes for field in self.fields.values())
        unit = self.group_size * self.kv_itemsize
        return ceil(used / unit) * unit

    @property
    def full_bytes(self) -> int:
        """Bytes of K and V of one block, each once."""
        return self.num_kv_heads * 2 * self.block_size * self.head_size * self.kv_itemsize

    @property
    def host_bytes(self) -> int:
        """Bytes of the host region of one page."""
        return self.full_bytes // 2 * self.host_parts

    @property
    def host_parts(self) -> int:
        """Arrays of `[block_size, head_size]` elements that the host region has for each head."""
        return 3 if self.key_rows else 2

    @property
    def derived_bytes(self) -> int:
        """Bytes of the derived region of one page."""
        return self.num_kv_heads * self.groups_per_block * self.record_bytes

    @property
    def host_bytes_per_token(self) -> int:
        """Bytes of the host region for one token, all heads."""
        return self.host_bytes // self.block_size

    @property
    def derived_bytes_per_token(self) -> int:
        """Bytes of the derived region for one token, all heads, padding included."""
        return self.derived_bytes // self.block_size
