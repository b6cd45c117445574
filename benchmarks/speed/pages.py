"""Pages of one layer full of random tokens, enough of them to defeat the caches."""

import math
from dataclasses import dataclass

import torch

from speed.inputs import Inputs
from speed.machine import free_bytes
from speed.shapes import BLOCK_SIZE, DTYPE
from vllm_tailorkv.cache.huge_pages import advise_huge_pages
from vllm_tailorkv.cache.views import HostPages, derived_pages, host_pages
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.types import DerivedPages
from vllm_tailorkv.layout import PageLayout

MIN_ROTATED_BYTES = 128 << 20
MAX_PAGES_BYTES = 10 << 30


@dataclass
class PageSet:
    """The pages of one layer, full of tokens."""

    host: HostPages
    derived: DerivedPages
    block_table: torch.Tensor


def make_sets(inputs: Inputs, layout: PageLayout, bytes_read: int) -> list[PageSet]:
    """Random pages, huge where the system has them; K's channels differ much, as models' do.

    Args:
        bytes_read: by a step; sets are so many that steps on all of them read more than the
            last-level cache holds.
    """
    blocks = math.ceil(inputs.context / BLOCK_SIZE)
    page_bytes = layout.host_bytes + layout.derived_bytes
    set_bytes = blocks * inputs.batch * page_bytes
    count = math.ceil(MIN_ROTATED_BYTES / bytes_read)
    count = max(1, min(count, min(MAX_PAGES_BYTES, free_bytes() // 2) // set_bytes))
    bias = torch.randn(inputs.shape.head_size) * 2
    sample = torch.randn(64, inputs.shape.kv_heads, BLOCK_SIZE, inputs.shape.head_size)
    sets = []
    for _ in range(count):
        raw = torch.empty(blocks * inputs.batch, page_bytes, dtype=torch.uint8)
        advise_huge_pages(raw)
        host = host_pages(raw[:, : layout.host_bytes], layout, DTYPE)
        derived = derived_pages(raw[:, layout.host_bytes :], layout, DTYPE)
        for start in range(0, raw.shape[0], 64):
            n = min(64, raw.shape[0] - start)
            noise = sample[torch.randperm(64)[:n]]
            host.key[start : start + n].copy_(noise.roll(start, 2) + bias)
            host.value[start : start + n].copy_(noise.roll(start + 5, 3))
        table = torch.randperm(raw.shape[0], dtype=torch.int32).view(inputs.batch, blocks)
        plant(inputs, host, table)
        if host.key_rows is not None:
            host.key_rows.copy_(host.key)
        groups = torch.arange(raw.shape[0] * layout.groups_per_block)
        ops.quantize_groups(groups, host.key, host.value, derived)
        sets.append(PageSet(host, derived, table))
    return sets


def plant(inputs: Inputs, host: HostPages, block_table: torch.Tensor) -> None:
    """Make the planted tokens of every row and KV head heavy."""
    for row in range(inputs.batch):
        for head in range(inputs.shape.kv_heads):
            tokens = inputs.planted[row, head]
            places = (block_table[row, tokens // BLOCK_SIZE].long(), head, tokens % BLOCK_SIZE)
            heavy = host.key[places].float() + inputs.planted_key[row, head]
            host.key[places] = heavy.to(DTYPE)
