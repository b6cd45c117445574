"""Beyond the budget: placements, budgets and chunks change no token, and bytes are as told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import LongCase, attention_layers, engine, greedy, long_case


def test_split_equals_joint(case: LongCase, random_llama: Path) -> None:
    with engine(random_llama, {**case.options, "placement": "split"}) as llm:
        assert greedy(llm, case.prompts, 80) == case.tokens


def test_split_pool_of_its_own(case: LongCase, random_llama: Path) -> None:
    from vllm_tailorkv.kernels.types import DenseCodes

    own = {**case.options, "placement": "split", "host_pool_gib": 0.0625}
    with engine(random_llama, own) as llm:
        assert greedy(llm, case.prompts, 80) == case.tokens
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        layers = attention_layers(llm).values()
        plan = [isinstance(layer.impl.pages.derived, DenseCodes) for layer in layers]
        dense, sparse = plan.count(True), plan.count(False)
        assert dense > 0
        assert sparse > 0
        # K and V, with K's rows for an index of channels; 2 heads x 64 channels x 4 bytes x 128
        parts = 3 if case.options["index"] == "channels" else 2
        assert blocks == (64 << 20) // ((2 * dense + parts * sparse) * 2 * 64 * 4 * 128)


def test_without_key_rows(random_llama: Path) -> None:
    """Without a second ranking the same tokens are gathered, from other places."""
    case = long_case(random_llama, "channels")
    options = {**case.options, "rerank_factor": 1}
    with engine(random_llama, options) as llm:
        expected = greedy(llm, case.prompts, 80)
    with engine(random_llama, {**options, "key_rows": False}) as llm:
        assert all(
            layer.impl.pages.host.key_rows is None for layer in attention_layers(llm).values()
        )
        assert greedy(llm, case.prompts, 80) == expected


@pytest.fixture
def smooth_scores() -> Iterator[None]:
    """Scores of one-bit codes in floats, not by tables of bytes.

    A chunk changes the last bits of K and of the query; tables of bytes round those to whole
    units, and a step of a unit may change which tokens are nearly chosen.
    """
    before = torch.ops.vllm_tailorkv.isa()
    if before not in ("avx512", "avx2", "portable"):
        torch.ops.vllm_tailorkv.set_isa("avx512")
    yield
    torch.ops.vllm_tailorkv.set_isa(before)


@pytest.mark.usefixtures("smooth_scores")
def test_chunks(case: LongCase, random_llama: Path) -> None:
    with engine(random_llama, case.options) as llm:
        whole = greedy(llm, case.prompts, 80)
    arguments = {"max_num_batched_tokens": 100, "max_num_seqs": 8}
    with engine(random_llama, case.options, **arguments) as llm:
        assert greedy(llm, case.prompts, 80) == whole


@pytest.mark.parametrize(("placement", "index"), [("joint", "onebit"), ("split", "channels")])
def test_reported_bytes_are_the_tensors(random_llama: Path, placement: str, index: str) -> None:
    from vllm_tailorkv.attention import budget

    reported: list[Any] = []
    original = budget.CacheSizing.describe

    def describe(self: Any, num_blocks: int, max_model_len: int) -> list[str]:
        reported.append((self, num_blocks))
        return original(self, num_blocks, max_model_len)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget.CacheSizing, "describe", describe)
        with engine(random_llama, {"placement": placement, "index": index}) as llm:
            found = attention_layers(llm)
            sizing, num_blocks = reported[-1]
            in_pool = sum(layer.kv_cache.nbytes for layer in found.values())
            pages = [layer.impl.pages.host for layer in found.values()]
            rows = [page.key_rows for page in pages if page.key_rows is not None]
            assert len(rows) == (len(sizing.sparse_layers) if index == "channels" else 0)
            assert sizing.sparse_layers
            full = sum(page.key.nbytes + page.value.nbytes for page in pages)
            assert full == num_blocks * sizing.full_bytes
            host = full + sum(row.nbytes for row in rows)
            assert host == num_blocks * sizing.host_bytes
            assert in_pool == num_blocks * sizing.pool_bytes
            own = host if placement == "split" else 0
            assert in_pool + own == num_blocks * (sizing.host_bytes + sizing.derived_bytes)


def test_memory_is_released(random_llama: Path) -> None:
    import gc
    import weakref

    with engine(random_llama, {"placement": "split"}) as llm:
        impl = next(iter(attention_layers(llm).values())).impl
        pool = weakref.ref(impl.pages.host.key.untyped_storage())
        del impl
    del llm
    gc.collect()
    assert pool() is None
