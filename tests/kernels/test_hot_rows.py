"""Rows kept on the device change no result, are read there, and never outlive what they copy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_tailorkv.kernels import triton as triton_module
from vllm_tailorkv.kernels.types import HotRows
from vllm_tailorkv.layout import DerivedKind, KeyLayout

pytestmark = pytest.mark.interpreted

LENGTHS = [150, 1, 0, 131]
SINKS, TOPK = 8, 24

CASES = [
    # dtype, heads, queries a head, head_size, candidates, softcap
    (torch.bfloat16, 2, 4, 128, 50, 0.0),
    (torch.float16, 1, 7, 80, 24, 20.0),
    (torch.float32, 2, 1, 64, 50, 0.0),
]


class Served:
    """A sparse layer's pages and rows of one query token, as the ops take them."""

    def __init__(self, build_context: Callable[..., Any], kernels: Any, case: Any) -> None:
        dtype, heads, per_head, head_size, candidates, softcap = case
        self.kernels, self.candidates, self.softcap = kernels, candidates, softcap
        self.context = build_context(
            LENGTHS,
            kind=DerivedKind.ONEBIT,
            heads=heads,
            head_size=head_size,
            dtype=dtype,
            key_layout=KeyLayout.TOKEN_MAJOR,
        )
        self.host = self.context.cache.host
        self.query = torch.randn(len(LENGTHS), heads * per_head, head_size).to(dtype)
        # All of the first context is attended, as that of a prompt's last token is.
        self.tail = self.context.complete.clone()
        self.tail[0] = 0

    def hot(self, sets: int) -> HotRows:
        """No rows yet."""
        _, heads, _, head_size = self.host.key.shape
        rows = torch.full((heads, sets, 2, head_size), torch.nan, dtype=self.query.dtype)
        tags = torch.full((heads, sets), -1, dtype=torch.int32)
        return HotRows(tags, rows, torch.zeros(2, dtype=torch.int64))

    def attend(self, hot: HotRows | None) -> torch.Tensor:
        """One decode step."""
        output = torch.full_like(self.query, torch.nan)
        self.kernels.retrieve_attention(
            output,
            self.query,
            self.context.cache.derived,
            self.host.key,
            self.host.key,
            self.host.value,
            self.context.block_table,
            self.context.seq_lens,
            self.tail,
            SINKS,
            8,
            TOPK,
            self.candidates,
            self.query.shape[2],
            True,
            0.2,
            self.softcap,
            max(LENGTHS),
            None,
            hot,
        )
        return output

    def slot(self, row: int, token: int) -> int:
        """Where a token lies."""
        size = self.host.key.shape[2]
        return int(self.context.block_table[row, token // size]) * size + token % size


@pytest.fixture(params=CASES, ids=str)
def served(request, build_context, placed):
    return Served(build_context, placed(triton_module), request.param)


@pytest.mark.parametrize("sets", [16, 4096])
def test_results_are_the_same(served, sets):
    """Cold and warm, also where most tokens have no place of their own."""
    expected = served.attend(None)
    hot = served.hot(sets)
    for _ in range(2):
        assert torch.equal(served.attend(hot), expected)
    assert (hot.tags >= 0).any()
    assert int(hot.counts.sum()) > 0
    assert not (hot.tags < -1).any()


def test_kept_rows_are_those_of_their_slots(served):
    served.attend(hot := served.hot(64))
    size = served.host.key.shape[2]
    for head, place in (hot.tags >= 0).nonzero().tolist():
        block, offset = divmod(int(hot.tags[head, place]), size)
        assert torch.equal(hot.rows[head, place, 0], served.host.key[block, head, offset])
        assert torch.equal(hot.rows[head, place, 1], served.host.value[block, head, offset])


def test_rows_are_read_where_they_are_kept(served):
    """A second step fetches nothing, and does not look at the pages of what it attends to."""
    expected = served.attend(hot := served.hot(4096))
    found, fetched = hot.counts.tolist()
    assert (found, fetched > 0) == (0, True)
    # V is read of nothing but what is kept.
    served.host.value.fill_(torch.nan)
    assert torch.equal(served.attend(hot), expected)
    assert hot.counts.tolist() == [fetched, fetched]
    heads = served.host.key.shape[1]
    # All of the first two contexts; of others sinks, selected tokens and tail.
    others = sum(
        SINKS + TOPK + length - int(tail)
        for length, tail in zip(LENGTHS[3:], served.tail[3:], strict=True)
    )
    assert fetched == heads * (LENGTHS[0] + LENGTHS[1] + others)


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_written_is_forgotten(served, at_once):
    served.attend(hot := served.hot(4096))
    slots = torch.tensor([served.slot(0, 149), -1, served.slot(3, 130)])
    shape = (len(slots), *served.host.key.shape[1::2])
    key, value = (torch.randn(shape).to(served.query.dtype) for _ in range(2))
    pages = (key, value, served.host.key, served.host.value, slots)
    if at_once:
        none = torch.full((len(slots),), -1)
        served.kernels.append_tokens(*pages, none, served.context.cache.derived, True, hot)
    else:
        served.kernels.write_kv(*pages, None, hot)
    kept = set(hot.tags.flatten().tolist())
    assert not kept & {int(slots[0]), int(slots[2])}
    assert served.slot(0, 148) in kept
    assert torch.equal(served.attend(hot), served.attend(None))


def test_a_long_tail_does_not_take_every_place(served, monkeypatch):
    """The last token of a long prompt attends to all of it, once."""
    from vllm_tailorkv.kernels.triton import hot as hot_module

    monkeypatch.setattr(hot_module, "_MOST_TAIL", 20)
    expected = served.attend(None)
    hot = served.hot(4096)
    assert torch.equal(served.attend(hot), expected)
    tags = set(hot.tags[0].tolist())
    assert served.slot(0, 130) in tags
    assert served.slot(0, 129) not in tags
