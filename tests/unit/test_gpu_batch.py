"""Batches on a GPU: planned without its values, and what rows and groups they name."""

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_tailorkv.attention import staged
from vllm_tailorkv.attention.gpu_batch import GpuBatch, single_token_rows
from vllm_tailorkv.attention.staged import StagedRows, Staging
from vllm_tailorkv.attention.varlen import Varlen
from vllm_tailorkv.config import TailorKVConfig
from vllm_tailorkv.layout import DerivedKind

BLOCK, GROUP, LONGEST, ROWS = 128, 64, 4096, 16
CONFIG = TailorKVConfig(topk_tokens=40, full_attention_below=0)


def batch_on(device: str, kind: DerivedKind = DerivedKind.ONEBIT, capacity: int = 1000) -> GpuBatch:
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=LONGEST),
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS, max_num_batched_tokens=400),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8),
    )
    spec: Any = SimpleNamespace(layout=SimpleNamespace(kind=kind, group_size=GROUP))
    op = Varlen("none", True, lambda asked: None, lambda call: None)
    staging = Staging(op, 2, 64, torch.float16, vllm_config)
    assert staging.capacity == LONGEST
    staging.capacity = capacity
    return GpuBatch(spec, CONFIG, vllm_config, torch.device(device), staging)


def common_of(
    rows: list[tuple[int, int]],
    device: str,
    *,
    prefilling: list[bool] | None = None,
    padding: int = 0,
    optimism: int = 0,
) -> CommonAttentionMetadata:
    """A batch of vLLM's second runner.

    Args:
        rows: query tokens and tokens in context, of each request.
        padding: rows of a graph that no request has.
        optimism: how many tokens more than there are the CPU expects of rows with drafts.
    """
    counts = [count for count, _ in rows] + [0] * padding
    lengths = [length for _, length in rows] + [0] * padding
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    width = LONGEST // BLOCK
    table = [[1 + i * width + j for j in range(width)] for i in range(len(counts))]
    slots = [
        table[i][position // BLOCK] * BLOCK + position % BLOCK
        for i, (count, length) in enumerate(rows)
        for position in range(length - count, length)
    ] + [-1] * padding

    def there(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return CommonAttentionMetadata(
        query_start_loc=there(starts),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=there(lengths),
        seq_lens_cpu_upper_bound=torch.tensor(
            [length + optimism * (count > 1) for count, length in rows] + [0] * padding,
            dtype=torch.int32,
        ),
        num_reqs=len(counts),
        num_actual_tokens=len(slots),
        max_query_len=max(counts),
        max_seq_len=max(lengths),
        block_table_tensor=there(table),
        slot_mapping=there(slots, torch.int64),
        is_prefilling=torch.tensor(prefilling or [False] * len(rows)),
    )


BATCHES = {
    "decode": [(1, 300), (1, 64), (1, 4000)],
    "prompts": [(5, 5), (200, 200), (100, 900)],
    "mixed": [(1, 300), (1, 80), (60, 60), (70, 2000), (90, 3000)],
    "drafts": [(4, 700), (4, 90), (1, 300), (30, 30)],
}


@pytest.mark.parametrize("kind", [DerivedKind.DENSE, DerivedKind.ONEBIT])
@pytest.mark.parametrize("name", BATCHES)
def test_no_value_of_the_device_is_looked_at(name: str, kind: DerivedKind) -> None:
    """Tensors of the `meta` device have none; those of the CPU cannot be mixed with them."""
    rows = BATCHES[name]
    batch = batch_on("meta", kind)
    prefilling = [count > 1 for count, _ in rows]
    prefilling[0] = True
    for given_ in (None, prefilling):
        metadata = batch.build(common_of(rows, "meta", prefilling=given_))
        assert metadata.groups.is_meta
        if metadata.decode is not None:
            assert metadata.decode.tail_start.is_meta
            assert metadata.decode.tail_start.dtype == torch.int32
        if metadata.exact is not None:
            for pack in metadata.exact.packs:  # type: ignore[attr-defined]
                assert all(piece.contexts.context_start.is_meta for piece in pack.pieces)


def test_what_the_stand_in_refuses() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device="meta").tolist()
    with pytest.raises(RuntimeError):
        torch.zeros(3, device="meta") + torch.zeros(3)


def test_graphs_find_their_buffers_again() -> None:
    """Rows of padding are none; what a graph has captured is where the next step writes."""
    batch = batch_on("cpu")
    first = batch.build(common_of([(1, 1)] * 4, "cpu"))
    assert first.decode is not None
    captured = first.decode.tail_start, first.groups
    assert first.decode.tail_start.tolist() == [0] * 4
    assert first.groups.tolist() == [-1] * 4
    step = [(1, 640), (1, 1000), (1, 90)]
    again = batch.build(common_of(step, "cpu", padding=1))
    assert again.exact is None
    assert again.decode is not None
    assert again.decode.tokens == slice(0, 4)
    assert captured[0].tolist() == [640 - 56, 1000 - 56, 0, 0]
    assert captured[1].tolist() == [BLOCK // GROUP * 5 + 1, -1, -1, -1]
    assert again.decode.tail_start.data_ptr() == captured[0].data_ptr()
    assert again.groups.data_ptr() == captured[1].data_ptr()


@pytest.mark.parametrize("kind", [DerivedKind.DENSE, DerivedKind.ONEBIT])
def test_what_is_exact(kind: DerivedKind) -> None:
    """Contexts within the budget, and the last tokens of prompts, start their tail at 0."""
    budget = CONFIG.exact_below
    rows = [(1, budget), (1, budget + 200), (1, 700), (9, 500)]
    metadata = batch_on("cpu", kind).build(
        common_of(rows, "cpu", prefilling=[False, False, True, True])
    )
    assert metadata.decode is not None
    starts = metadata.decode.tail_start.tolist()
    assert starts[0] == starts[2] == 0
    assert starts[1] == (128 if kind is DerivedKind.DENSE else budget + 200 - 56)


counts_and_lengths = st.tuples(st.integers(1, 400), st.integers(0, 3500)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)


@given(
    singles=st.lists(st.integers(1, LONGEST), max_size=5),
    longer=st.lists(counts_and_lengths.filter(lambda pair: pair[0] > 1), max_size=5),
    drafts=st.integers(0, 3),
    optimism=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_every_token_has_its_place(
    singles: list[int], longer: list[tuple[int, int]], drafts: int, optimism: int, seed: int
) -> None:
    """Each query token is in one row or pack, and each pack's pieces are its contexts."""
    rng = random.Random(seed)
    with_drafts = [(4, rng.randrange(4, LONGEST - 3)) for _ in range(drafts)]
    rows = with_drafts + [(1, length) for length in singles] + sorted(longer)
    if not rows:
        return
    batch = batch_on("cpu", capacity=1000)
    common = common_of(rows, "cpu", optimism=optimism)
    metadata = batch.build(common)
    tokens = sum(count for count, _ in rows)
    seen = [0] * tokens
    if metadata.decode is not None:
        for token in range(*metadata.decode.tokens.indices(tokens)):  # type: ignore[union-attr]
            seen[token] += 1
    exact = metadata.exact
    assert exact is None or isinstance(exact, StagedRows)
    starts = common.query_start_loc_cpu.tolist()
    for pack in exact.packs if exact else []:
        for token in range(*pack.tokens.indices(tokens)):
            seen[token] += 1
        requests = [
            i for i in range(len(rows)) if pack.tokens.start <= starts[i] < pack.tokens.stop
        ]
        lengths = [rows[i][1] for i in requests]
        assert torch.equal(pack.block_table, common.block_table_tensor[requests])
        last = pack.pieces[-1]
        assert [piece.causal for piece in pack.pieces] == [False] * (len(pack.pieces) - 1) + [True]
        assert last.contexts.query_start.tolist() == [
            starts[i] - starts[requests[0]] for i in [*requests, requests[-1] + 1]
        ]
        if pack.fresh:
            assert lengths == [rows[i][0] for i in requests]
            continue
        covered = [0] * len(requests)
        for piece in pack.pieces:
            bounds = piece.contexts.context_start.tolist()
            assert piece.first_token == covered[0]
            assert bounds[0] == 0
            assert bounds[-1] <= batch.staging.capacity
            for i, (start, end) in enumerate(pairwise(bounds)):
                assert 0 < end - start <= piece.contexts.context_lens[i]
                covered[i] += end - start
        assert covered == lengths
        if len(pack.pieces) > 1:
            assert len(requests) == 1
            # All query tokens lie in the causal piece.
            assert lengths[0] - last.first_token >= rows[requests[0]][0]
    assert seen == [1] * tokens
    ended = {int(slot) // GROUP for slot in common.slot_mapping.tolist() if (slot + 1) % GROUP == 0}
    assert {group for group in metadata.groups.tolist() if group >= 0} == ended


@given(counts=st.lists(st.integers(0, 3), max_size=8))
def test_single_token_rows(counts: list[int]) -> None:
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    first, last = single_token_rows(starts)
    assert 0 <= first <= last <= len(counts)
    assert all(count <= 1 for count in counts[first:last])
    assert 1 not in counts[:first]
    if first < len(counts):
        assert counts[first] == 1


@pytest.mark.parametrize(("chosen", "factor"), [("cuda", 1), ("plain", 5)])
def test_memory_that_a_step_takes_is_there_when_vllm_measures(
    monkeypatch: pytest.MonkeyPatch, chosen: str, factor: int
) -> None:
    """Torch's selection takes more than the scores that it selects by."""
    taken: list[int] = []

    def empty(size: int, **_: Any) -> None:
        taken.append(size)

    monkeypatch.setattr(staged, "choose", lambda op, device: SimpleNamespace(name=chosen))
    monkeypatch.setattr(staged.torch, "empty", empty)
    staging = batch_on("cpu").staging
    staging.capacity = 1
    staging.reserve(torch.device("cpu"))
    assert taken[-1] == factor * 4 * ROWS * 2 * LONGEST
