"""What a step does, against counts by hand, and against what the batch is told."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tailorkv.attention import counting, meters, metrics
from vllm_tailorkv.attention.counting import StepCounter, StepCounts
from vllm_tailorkv.attention.rows import completed_groups
from vllm_tailorkv.config import load_config
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

CONFIG = load_config({"preset": "fast", "full_attention_below": 0})
"""192 tokens: 8 first, 128 of 512, 56 newest; in full up to 192."""
CHANNELS = load_config({"preset": "fast", "full_attention_below": 0, "index": "channels"})
ROW = 2 * 64 * 2
"""Bytes of K of a token: two heads of 64 channels of 2 bytes."""

# Two decode steps among a prompt, a part of one, and a context that is short.
QUERY_LENS = torch.tensor([1, 100, 50, 1, 1], dtype=torch.int32)
LENGTHS = torch.tensor([700, 100, 200, 150, 256], dtype=torch.int32)
PREFILLING = torch.tensor([False, True, True, False, False])


@pytest.fixture(autouse=True)
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that start at 0 and stay in this process."""
    monkeypatch.delenv(meters.FOLDER, raising=False)
    meters._meter.cache_clear()
    meters._file.cache_clear()


def make_layout(kind: DerivedKind, group_size: int) -> PageLayout:
    by_channels = kind is DerivedKind.CHANNELS
    order = KeyLayout.CHANNEL_MAJOR if by_channels else KeyLayout.TOKEN_MAJOR
    return PageLayout(kind, 2, 64, 128, group_size, 2, 2, order)


DENSE = make_layout(DerivedKind.DENSE, 64)
ONEBIT = PageLayout(DerivedKind.ONEBIT, 2, 64, 128, 128, 1, 2)
EXTREMES = make_layout(DerivedKind.CHANNELS, 64)


def counts_of(layout: PageLayout, config: Any = CONFIG, **options: Any) -> StepCounts:
    return StepCounter(layout, config, 3, **options).of_rows(
        QUERY_LENS.numpy(), LENGTHS.numpy(), PREFILLING.numpy()
    )


def test_dense_layers() -> None:
    """Codes of 512 and 128 tokens are read, and the 188 and 128 after them in full."""
    record = 2 * (1024 + 2 * 128 + 1024 + 2 * 128)
    assert counts_of(DENSE) == StepCounts(
        decode_rows=2,
        exact_rows=151,
        context_tokens=956,
        selected_tokens=0,
        # The 64th of the prompt, the 192nd of the part, the 256th of the last.
        quantized_groups=3,
        host_read_decode=2 * (188 + 128) * ROW,
        host_read_exact=2 * (100 + 200 + 150) * ROW,
        host_read_derive=2 * 3 * 64 * ROW,
        host_written=2 * 153 * ROW,
        derived_read=10 * record,
        derived_written=3 * record,
    )


def test_sparse_layers() -> None:
    """Tails start at 640 and 200, so that 632 and 192 tokens lie between."""
    record = 2 * (1024 + 2 * 128)
    assert counts_of(ONEBIT) == StepCounts(
        decode_rows=2,
        exact_rows=151,
        context_tokens=956,
        selected_tokens=2 * 128,
        quantized_groups=1,
        # Sinks, tail and selected tokens; K of candidates, 512 and 192, that were dropped.
        host_read_decode=(2 * (68 + 64 + 256) + 512 + 192 - 256) * ROW,
        host_read_exact=2 * (100 + 200 + 150) * ROW,
        host_read_derive=128 * ROW,
        host_written=2 * 153 * ROW,
        derived_read=(5 + 2) * record,
        derived_written=record,
    )


def test_an_index_of_channels_reads_k() -> None:
    """8 channels of all tokens of 10 and 4 groups, beside what the other index has read."""
    counts = counts_of(EXTREMES, CHANNELS)
    rows = (2 * (68 + 64 + 256) + 512 + 192 - 256) * ROW
    assert counts.host_read_decode == rows + 14 * 64 * 8 * 2 * 2
    assert counts.derived_read == 14 * 2 * 2 * 64 * 2


def test_extremes_of_every_other_group() -> None:
    counter = StepCounter(EXTREMES, CHANNELS, 1)
    one = np.ones(1, dtype=np.int32)
    counts = counter.of_rows(one, one * (300 * 64 + 56), None)
    assert counts.derived_read == 150 * 2 * 2 * 64 * 2


def test_a_gpu_has_a_fresh_prompt_at_hand() -> None:
    assert counts_of(DENSE, on_gpu=True).host_read_exact == 2 * (200 + 150) * ROW


def batch(query_lens: torch.Tensor, lengths: torch.Tensor, prefilling: torch.Tensor | None) -> Any:
    starts = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
    starts[1:] = query_lens.cumsum(0)
    return SimpleNamespace(
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=None,
        is_prefilling=prefilling,
    )


def value(metric: meters.Metric, *labels: str) -> float:
    return meters.meter(metric, *labels).value


def test_every_layer_and_step_counts() -> None:
    counter = StepCounter(ONEBIT, CONFIG, 3)
    counter.count(batch(QUERY_LENS, LENGTHS, PREFILLING))
    counter.count(batch(QUERY_LENS, LENGTHS, PREFILLING))
    assert value(metrics.DECODE_ROWS, "sparse") == 2 * 3 * 2
    assert value(metrics.EXACT_ROWS, "sparse") == 2 * 3 * 151
    assert value(metrics.SELECTED_TOKENS, "sparse") == 2 * 3 * 256
    assert value(metrics.HOST_READ, "sparse", "derive") == 2 * 3 * 128 * ROW
    assert value(metrics.HOST_READ, "sparse", "exact") == 2 * 3 * 2 * 450 * ROW
    assert value(metrics.HOST_WRITTEN, "sparse") == 2 * 3 * 2 * 153 * ROW


def test_layers_that_share_read_and_do_not_write() -> None:
    StepCounter(ONEBIT, CONFIG, 3, 2).count(batch(QUERY_LENS, LENGTHS, PREFILLING))
    assert value(metrics.DECODE_ROWS, "sparse") == 3 * 2
    assert value(metrics.HOST_READ, "sparse", "exact") == 3 * 2 * 450 * ROW
    assert value(metrics.HOST_READ, "sparse", "derive") == 128 * ROW
    assert value(metrics.HOST_WRITTEN, "sparse") == 2 * 153 * ROW
    assert value(metrics.QUANTIZED_GROUPS, "sparse") == 1


def test_other_ranks_count_bytes_alone() -> None:
    """They serve the same rows, by other heads."""
    StepCounter(DENSE, CONFIG, 1, first_rank=False).count(batch(QUERY_LENS, LENGTHS, PREFILLING))
    assert value(metrics.HOST_WRITTEN, "dense") > 0
    for metric in (metrics.DECODE_ROWS, metrics.EXACT_ROWS, metrics.QUANTIZED_GROUPS):
        assert value(metric, "dense") == 0


def test_padding_is_nothing() -> None:
    zeros = torch.zeros(3, dtype=torch.int32)
    padded = batch(torch.cat((QUERY_LENS, zeros)), torch.cat((LENGTHS, zeros)), PREFILLING)
    StepCounter(DENSE, CONFIG, 1).count(padded)
    assert value(metrics.DECODE_ROWS, "dense") == 2
    assert value(metrics.EXACT_ROWS, "dense") == 151


def test_a_run_without_requests_is_nothing() -> None:
    """vLLM's own, to warm up or to capture a graph: single tokens that are no prompt's first."""
    one = torch.ones(4, dtype=torch.int32)
    counter = StepCounter(DENSE, CONFIG, 1)
    counter.count(batch(one, one, torch.zeros(4, dtype=torch.bool)))
    assert value(metrics.EXACT_ROWS, "dense") == 0
    # A prompt of one token is a request.
    counter.count(batch(one, one, torch.ones(4, dtype=torch.bool)))
    assert value(metrics.EXACT_ROWS, "dense") == 4


@given(
    lengths=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 300)), min_size=1, max_size=8),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_groups_are_those_of_the_batch(lengths: list[tuple[int, int]], group_size: int) -> None:
    slots = [
        row * 1024 + token
        for row, (old, new) in enumerate(lengths)
        for token in range(old, old + new)
    ]
    groups = completed_groups(torch.tensor(slots), group_size)
    counter = StepCounter(make_layout(DerivedKind.DENSE, group_size), CONFIG, 1)
    query_lens = np.array([new for _, new in lengths], dtype=np.int32)
    ends = np.array([old + new for old, new in lengths], dtype=np.int32)
    counts = counter.of_rows(query_lens, ends, None)
    assert counts.quantized_groups == int((groups >= 0).sum())


def test_labels_are_those_of_the_layout() -> None:
    assert [counting.layer_kind(one) for one in (DENSE, ONEBIT, EXTREMES)] == [
        "dense",
        "sparse",
        "sparse",
    ]
