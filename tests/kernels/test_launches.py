"""Kernels that a layer's decode step launches: each costs a microsecond or more, in a graph too."""

import pytest
import torch
from launches import launches

from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.kernels import cuda, ops
from vllm_tailorkv.kernels.types import DenseCodes, HotRows
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

HEADS, SIZE, BLOCK, LONGEST = 32, 128, 64, 131072


def built() -> bool:
    try:
        cuda.load()
    except ImportError:
        return False
    return True


pytestmark = pytest.mark.skipif(not built(), reason="no CUDA extension")


def step(
    kind: DerivedKind,
    rows: int,
    per_head: int,
    every_head: bool,
    candidates: int,
    hot_tokens: int = 0,
) -> None:
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
    hot = None
    if hot_tokens:
        kept = ints(heads, hot_tokens, 2, SIZE, dtype=torch.bfloat16)
        hot = HotRows(ints(heads, hot_tokens), kept, ints(2, dtype=torch.int64))
    ops.append_tokens(key, value, host.key, host.value, slots, groups, derived, hot=hot)
    pages = (output, query, host.key, host.value)
    if isinstance(derived, DenseCodes):
        ops.quantized_decode_attention(*pages, derived, table, lengths, tail, scale=0.1)
        return
    ops.retrieve_attention(
        output,
        query,
        derived,
        host.key,
        host.key,
        host.value,
        table,
        lengths,
        tail,
        sink_tokens=8,
        critical_channels=48,
        topk=504,
        candidates=candidates,
        channels=SIZE,
        every_head=every_head,
        scale=0.1,
        max_tail_start=LONGEST,
        hot=hot,
    )


@pytest.fixture
def count(monkeypatch):
    def run(*arguments):
        with launches(monkeypatch) as names:
            step(*arguments)  # makes what later steps find
            names.clear()
            step(*arguments)
        return names

    return run


def test_dense(count):
    assert count(DerivedKind.DENSE, 64, 4, True, 0) == ["_derive", "_attend_codes"]
    # So many programs share one row that the last would merge for longer than a launch takes.
    few = count(DerivedKind.DENSE, 1, 4, True, 0)
    assert few == ["_derive", "_attend_codes", "_merge_parts"]


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


def test_rows_kept_on_the_device(count):
    """One launch fetches what is missing; a token that is written is forgotten by the same one."""
    assert count(DerivedKind.ONEBIT, 4, 4, True, 1008, 4096) == [
        "_derive",
        "_log_mass",
        "_score_codes",
        "select_tokens",
        "_score_candidates",
        "_keep_rows",
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
