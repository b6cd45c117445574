"""A layer of one row for tests of selection, and what its attention truly is."""

import torch

from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.selection import Layer, Pages
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.config import load_config
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

HEADS, GROUP, SIZE, BLOCK, LENGTH, TAIL = 2, 3, 64, 128, 500, 440
OPTIONS = {"topk_tokens": 32, "rerank_factor": 1}


def make_layer(
    key_layout: KeyLayout = KeyLayout.CHANNEL_MAJOR,
    group: int = GROUP,
    level: float = 0.0,
    **options: object,
) -> tuple[Layer, DecodeRows, torch.Tensor, torch.Tensor]:
    """A layer with one row of tokens in scattered blocks; its K [Hk, L, d] and a query.

    Args:
        level: channel 0 of K, in every token.
    """
    layout = PageLayout(DerivedKind.ONEBIT, HEADS, SIZE, BLOCK, 64, 1, 4, key_layout)
    raw = torch.full((5, layout.host_bytes + layout.derived_bytes), 0xFF, dtype=torch.uint8)
    host = host_pages(raw[:, : layout.host_bytes], layout, torch.float32)
    derived = derived_pages(raw[:, layout.host_bytes :], layout, torch.float32)
    table = torch.tensor([[3, 0, 4, 1]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, LENGTH, HEADS, SIZE, generator=generator)
    key[..., 0] = level
    positions = torch.arange(LENGTH)
    slots = table[0, positions // BLOCK].long() * BLOCK + positions % BLOCK
    ops.write_kv(key, value, host.key, host.value, slots)
    groups = torch.tensor([b * 2 + g for b in table[0].tolist() for g in (0, 1)][: LENGTH // 64])
    ops.quantize_groups(groups, host.key, host.value, derived)
    config = load_config({"index": "onebit", **OPTIONS, **options})
    layer = Layer(Pages(host, derived), config, 0.125, 0.0, Workspace(torch.device("cpu")))
    lengths = torch.tensor([LENGTH], dtype=torch.int32)
    rows = DecodeRows(
        slice(0, len(lengths)), lengths, table, torch.tensor([TAIL], dtype=torch.int32), TAIL
    )
    query = torch.randn(1, HEADS * group, SIZE, generator=generator)
    return layer, rows, key.transpose(0, 1), query


def true_weights(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Attention on the middle, of all, summed over the heads of a KV head: [Hk, TAIL - 8]."""
    grouped = query[0].unflatten(0, (HEADS, GROUP))
    scores = torch.einsum("hgd,hnd->hgn", grouped, key) * 0.125
    return scores.softmax(-1)[..., 8:TAIL].sum(1)
