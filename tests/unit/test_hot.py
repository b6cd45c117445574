"""Rows on the device: how many there are, who has none, and what the metrics are told."""

from types import SimpleNamespace

import pytest
import torch

from vllm_tailorkv.attention import hot
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.layout import DerivedKind, PageLayout
from vllm_tailorkv.plan import hot_sets, make_plan
from vllm_tailorkv.profile import ModelShape

CPU = torch.device("cpu")
MODEL = ModelShape("some-model", "LlamaForCausalLM", 4, 2, 64, num_heads=8)


def spec_of(kind: DerivedKind) -> SimpleNamespace:
    return SimpleNamespace(layout=PageLayout(kind, 2, 64, 64, 64, 1, 2), dtype=torch.bfloat16)


def test_sets_are_a_power_of_two() -> None:
    assert [hot_sets(n) for n in (1, 64, 65, 4096, 4097)] == [64, 64, 128, 4096, 8192]


def test_who_keeps_rows() -> None:
    assert hot.make_hot_rows(spec_of(DerivedKind.DENSE), 100, CPU) is None
    assert hot.make_hot_rows(spec_of(DerivedKind.ONEBIT), 0, CPU) is None
    found = hot.make_hot_rows(spec_of(DerivedKind.CHANNELS), 100, CPU)
    assert found is not None
    assert found.rows.shape == (2, 128, 2, 64)
    assert found.rows.dtype == torch.bfloat16
    assert found.tags.shape == (2, 128)
    assert (found.tags < 0).all()


def test_made_in_inference_mode_they_can_be_written_to_outside() -> None:
    hot.counts_on.cache_clear()
    with torch.inference_mode():
        found = hot.make_hot_rows(spec_of(DerivedKind.ONEBIT), 64, CPU)
    assert found is not None
    found.tags.fill_(3)
    found.counts.zero_()


def test_the_meter_tells_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "_SECONDS", 0)
    counts = hot.counts_on(CPU)
    counts.zero_()
    looks = hot.HotMeter(CPU)
    before = [one.value for one in looks._meters]
    counts += torch.tensor([5, 2])
    looks.look()
    assert [one.value for one in looks._meters] == before
    counts += torch.tensor([1, 0])
    looks.look()
    looks.look()
    assert [one.value - was for one, was in zip(looks._meters, before, strict=True)] == [6, 2]


def test_cpus_refuse_it() -> None:
    with pytest.raises(TailorKVError, match="hot_tokens=512 is for GPUs"):
        make_plan({"hot_tokens": 512}, MODEL)
    assert make_plan({"hot_tokens": 512}, MODEL, device="cuda").config.hot_tokens == 512
