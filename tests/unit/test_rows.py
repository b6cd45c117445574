"""The rows of a batch against loops over its requests and tokens."""

import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_tailorkv.attention.rows import (
    completed_groups,
    decode_mask,
    tail_starts,
)
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.layout import DerivedKind

# Requests as (tokens before this step, tokens of this step); padding has none at all.
requests = st.lists(
    st.tuples(st.integers(0, 700), st.integers(0, 300)).filter(lambda r: r[0] == 0 or r[1] > 0),
    min_size=1,
    max_size=8,
)


@given(
    lengths=requests,
    prefilling=st.one_of(st.none(), st.lists(st.booleans(), min_size=8, max_size=8)),
    exact_below=st.sampled_from([0, 1, 192, 500]),
)
def test_decode_mask(
    lengths: list[tuple[int, int]], prefilling: list[bool] | None, exact_below: int
) -> None:
    mask = decode_mask(
        torch.tensor([new for _, new in lengths], dtype=torch.int32),
        torch.tensor([old + new for old, new in lengths], dtype=torch.int32),
        None if prefilling is None else torch.tensor(prefilling[: len(lengths)]),
        exact_below,
    )
    assert mask.dtype == torch.bool
    for i, (old, new) in enumerate(lengths):
        prompt = prefilling is not None and prefilling[i]
        assert bool(mask[i]) == (new == 1 and old + new > exact_below and not prompt)


def test_decode_mask_boundary() -> None:
    """A context of exactly the budget is attended in full."""
    one = torch.ones(2, dtype=torch.int32)
    assert decode_mask(one, torch.tensor([192, 193]), None, 192).tolist() == [False, True]


@given(
    lengths=requests,
    sizes=st.sampled_from([(32, 32), (32, 128), (64, 64), (64, 128), (128, 128), (64, 192)]),
    order=st.randoms(use_true_random=False),
)
def test_completed_groups(
    lengths: list[tuple[int, int]], sizes: tuple[int, int], order: random.Random
) -> None:
    group_size, block_size = sizes
    width = 1000 // block_size + 2
    free = list(range(len(lengths) * width))
    order.shuffle(free)
    slots, expected = [], []
    for i, (old, new) in enumerate(lengths):
        blocks = free[i * width : (i + 1) * width]
        for token in range(old, old + new):
            block, offset = blocks[token // block_size], token % block_size
            slots.append(block * block_size + offset)
            group = block * (block_size // group_size) + offset // group_size
            expected.append(group if (token + 1) % group_size == 0 else -1)
        if order.random() < 0.5:  # padding
            slots.append(-1)
            expected.append(-1)
    groups = completed_groups(torch.tensor(slots, dtype=torch.int64), group_size)
    assert groups.dtype == torch.int64
    assert groups.is_contiguous()
    assert groups.tolist() == expected


@pytest.mark.parametrize("kind", list(DerivedKind))
@given(
    length=st.integers(1, 2000),
    group_size=st.sampled_from([32, 64, 128]),
    residual=st.integers(0, 300),
    recent=st.integers(1, 300),
)
def test_where_the_exact_tail_starts(
    kind: DerivedKind, length: int, group_size: int, residual: int, recent: int
) -> None:
    """What lies before it is in complete groups, and the newest tokens lie after it."""
    config = TailorKVConfig(
        residual_tokens=residual,
        recent_tokens=recent,
        sink_tokens=0,
        topk_tokens=1,
        full_attention_below=0,
    )
    assume(length > config.exact_below)  # else it is attended in full
    lengths = torch.tensor([length], dtype=torch.int32)
    found = tail_starts(lengths, kind, group_size, config)
    assert found.dtype == torch.int32
    start = int(found)
    complete = length // group_size * group_size
    assert 0 <= start <= complete
    if kind is DerivedKind.DENSE:
        assert start % group_size == 0
        assert start <= max(0, length - residual) < start + group_size
    else:
        assert start == min(complete, length - recent)
