"""Kernels that a layer's decode step launches: each costs a microsecond or more, in a graph too."""

import pytest
import torch
from launches import launches

from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.kernels import cuda, ops
from vllm_tailorkv.kernels.types import DenseCodes
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

HEADS, SIZE, BLOCK, LONGEST = 32, 128, 64, 131072


def built() -> bool:
    try:
        cuda.load()
    except ImportError:
        return False
    return True


pytestmark = pytest.mark.skipif(not built(), reason="no CUDA extension")


def step(kind: DerivedKind, rows: int, per_head: int, every_head: bool, candidates: int) -> None:
    """All ops of one layer's decode step."""
    heads = HEADS // per_head
    layout = PageLayout(kind, heads, SIZE, BLOCK, BLOCK, 1, 2, KeyLayout.TOKEN_MAJOR)
    blocks = 4 * LONGEST // BLOCK

    def ints(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    host = host_pages(ints(blocks, layout.host_bytes, dtype=torch.uint8), layout, torch.bfloat16)
    derived = derived_pages(
        ints(blocks, layout.derived_bytes, dtype=torch.uint8), layout, torch.bfloat16
    )
    query, output = (ints(rows, HEADS, SIZE, dtype=torch.bfloat16) for _ in range(2))
    key, value = (ints(rows, heads, SIZE, dtype=torch.bfloat16) for _ in range(2))
    slots, groups = (ints(rows, dtype=torch.int64) for _ in range(2))
    table, lengths, tail = ints(rows, LONGEST // BLOCK), ints(rows), ints(rows)
    ops.append_tokens(key, value, host.key, host.value, slots, groups, derived)
    pages = (output, query, host.key, host.value)
    if isinstance(derived, DenseCodes):
        ops.quantized_decode_attention(*pages, derived, table, lengths, tail, scale=0.1)
        return
    indices = ints(rows, heads, 504)
    ops.retrieve_topk(
        indices,
        query,
        derived,
        host.key,
        host.key,
        table,
        lengths,
        tail,
        sink_tokens=8,
        critical_channels=48,
        candidates=candidates,
        channels=SIZE,
        every_head=every_head,
        scale=0.1,
        max_tail_start=LONGEST,
    )
    ops.sparse_decode_attention(*pages, indices, table, lengths, tail, sink_tokens=8, scale=0.1)


@pytest.fixture
def count(monkeypatch):
    def run(*arguments):
        with launches(monkeypatch) as names:
            step(*arguments)  # makes what later steps find
            names.clear()
            step(*arguments)
        return names

    return run


@pytest.mark.parametrize("rows", [1, 64])
def test_dense(count, rows):
    assert count(DerivedKind.DENSE, rows, 4, True, 0) == ["_derive", "_attend_codes"]


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("every_head", [True, False])
def test_sparse(count, rows, every_head):
    assert count(DerivedKind.ONEBIT, rows, 4, every_head, 1008) == [
        "_derive",
        "_log_mass",
        "_score_codes",
        "select_tokens",
        "_score_candidates",
        "_attend_gathered",
    ]


def test_sparse_without_comparing_heads(count):
    ranked = ["_derive", "_score_codes", "select_tokens", "_score_candidates", "_attend_gathered"]
    assert count(DerivedKind.ONEBIT, 1, 1, True, 1008) == ranked
    assert count(DerivedKind.ONEBIT, 1, 4, False, 504) == [*ranked[:3], ranked[4]]


def test_sparse_by_channels(count):
    """Three kernels score: extremes of channels, which of them, products."""
    assert len(count(DerivedKind.CHANNELS, 1, 4, True, 1008)) == 8


def test_rows_that_take_turns_score_in_turn(count):
    """Their scores would need more than 256 MiB."""
    assert len(count(DerivedKind.ONEBIT, 128, 4, True, 1008)) == 8
