"""The tensors that the ops share. Symbols:

    NB  blocks in the cache          R  rows (requests with one query token)
    Hk  KV heads                     H  query heads, a multiple of Hk
    bs  block_size, tokens           d  head_size, channels
    g   group_size                   G  groups per block, bs / g
    b   bits of a code               Vg groups of channels of a V row, ceil(d / g)

`key_cache` and `value_cache` are always *logical* `[NB, Hk, bs, d]` views of the host
pages: `key_cache[block, head, token, channel]`. Their strides say how the page stores
them (K may be channel-major), so every op takes either layout.
"""

from typing import NamedTuple

import torch

SPREAD_GROUPS = 256
"""Groups, at most, that tell how far a channel spreads over a context: `ops.score_tokens`."""


STAGED_PADDING = 256
"""Places behind staged rows that `ops.stage_rows` sets to 0: no attention op has longer tiles."""


class HotRows(NamedTuple):
    """Rows of a layer's host pages that lie on the device too.

    tags: int32 [Hk, sets]; the slot whose row a place holds, or a negative number; `sets` is a
        power of two.
    rows: [Hk, sets, 2, d], K and V in the caches' dtype.
    counts: int64 [2]; rows that were found there, and rows that were fetched, so far.
    """

    tags: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor


class GroupCodes(NamedTuple):
    """Asymmetric low-bit codes: `x ~ zero + code * scale` (KIVI; TailorKV section 3.2).

    K (per channel, a group is g tokens):
        codes uint8 [NB, Hk, G, d, g*b/8], scale and zero float16 [NB, Hk, G, d].
    V (per token, a group is g channels, the last may be partial):
        codes uint8 [NB, Hk, G, g, ceil(d*b/8)], scale and zero float16 [NB, Hk, G, g, Vg].

    Code i of a run lies in byte `i*b // 8`, at bit `i*b % 8`, least significant first.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


class DenseCodes(NamedTuple):
    """The derived pages of a dense layer."""

    key: GroupCodes
    value: GroupCodes


class OnebitIndex(NamedTuple):
    """The derived pages of a sparse layer with `index="onebit"`: K at one bit."""

    key: GroupCodes


class ChannelIndex(NamedTuple):
    """The derived pages of a sparse layer with `index="channels"`.

    extremes: the smallest and the largest `K[t, channel]` of each group, [NB, Hk, G, 2, d], K's
        dtype (exact).
    """

    extremes: torch.Tensor


TokenIndex = OnebitIndex | ChannelIndex
DerivedPages = DenseCodes | OnebitIndex | ChannelIndex
