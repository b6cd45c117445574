"""Beyond the budget, in one engine: prefix hits, batches, and the tiers themselves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import LongCase, attention_layers, engine, greedy


@pytest.fixture(scope="module")
def tailored(random_llama: Path, case: LongCase) -> Iterator[Any]:
    with engine(random_llama, case.options) as llm:
        yield llm


def test_prefix_hits(tailored: Any, case: LongCase) -> None:
    assert greedy(tailored, case.prompts, 80) == case.tokens
    assert greedy(tailored, case.prompts, 80) == case.tokens


def test_batch_of_one(tailored: Any, case: LongCase) -> None:
    assert greedy(tailored, case.prompts[-1:], 80) == case.tokens[-1:]


def test_the_guard_changes_no_token(
    tailored: Any, case: LongCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_tailorkv.attention.guard import Guard

    seen = []
    saw = Guard.saw

    def note(guard: Guard, layer_name: str, error: float, lost: float | None) -> None:
        seen.append((guard.kind, error))
        saw(guard, layer_name, error, lost)

    monkeypatch.setattr(Guard, "saw", note)
    builders = metadata_builders(tailored)
    for builder in builders:
        config = builder.served.batch.config.model_copy(update={"guard_share": 0.25})
        builder.guard = Guard(builder.kv_cache_spec.layout, config, builder.layer_names)
    try:
        assert greedy(tailored, case.prompts, 80) == case.tokens
    finally:
        for builder in builders:
            builder.guard = None
    assert {kind for kind, _ in seen} == {"dense", "sparse"}
    assert all(0 < error < 1 for _, error in seen)


def metadata_builders(llm: Any) -> list[Any]:
    """What builds the metadata of its batches."""
    found: list[Any] = []

    def collect(worker: Any) -> None:
        for groups in worker.model_runner.attn_groups:
            found.extend(group.get_metadata_builder() for group in groups)

    llm.collective_rpc(collect)
    return found


def test_derived_tier_follows_the_host_tier(tailored: Any) -> None:
    from vllm_tailorkv.kernels import ops
    from vllm_tailorkv.kernels.types import ChannelIndex

    for layer in attention_layers(tailored).values():
        derived, host = layer.impl.pages.derived, layer.impl.pages.host
        records = derived.extremes if isinstance(derived, ChannelIndex) else derived.key.scale
        # A record that was ever written has scales; block 0 is vLLM's null block.
        written = records.flatten(3).ne(0).all(-1).all(1)
        written[0] = False
        groups = written.flatten().nonzero().flatten()
        assert len(groups) > 20
        if host.key_rows is not None:
            blocks = (groups // records.shape[2]).unique()
            assert torch.equal(host.key_rows[blocks], host.key[blocks])
        before = [tensor.clone() for tensor in tensors(derived)]
        ops.quantize_groups(groups, host.key, host.value, derived)
        for old, new in zip(before, tensors(derived), strict=True):
            assert torch.equal(old, new)


def tensors(derived: Any) -> list[torch.Tensor]:
    """All tensors of derived pages."""
    if isinstance(derived, torch.Tensor):
        return [derived]
    return [tensor for part in derived for tensor in tensors(part)]
