"""What is said of a selection, against the same by hand."""

import pytest
import torch
from accuracy.attention_level import Observer
from accuracy.policies import Oracle, StreamingLLM, context_of
from selection import GROUP, HEADS, LENGTH, TAIL, make_layer, true_weights


def kept_by(indices: torch.Tensor):
    return lambda query, layer, rows: indices


def observe(indices: torch.Tensor, times: int = 1, every: int = 1):
    layer, rows, key, query = make_layer()
    observer = Observer(kept_by(indices), every)
    for step in range(times):
        observer(query * (1 + step), layer, rows)
    return observer.quality("x", 3, "prose"), key, query


def test_share_is_of_what_the_oracle_keeps_with_as_many_tokens() -> None:
    """The first head selects 5 tokens, the second 2."""
    chosen = [[9, 40, 100, 200, 300], [50, 60]]
    indices = torch.tensor([[chosen[0], [*chosen[1], -1, -1, -1]]], dtype=torch.int32)
    quality, key, query = observe(indices)
    weights = true_weights(key, query)
    kept = [weights[h, torch.tensor(c) - 8].sum().item() for h, c in enumerate(chosen)]
    best = [weights[h].topk(len(c)).values.sum().item() for h, c in enumerate(chosen)]
    assert quality.heads == pytest.approx([k / b for k, b in zip(kept, best, strict=True)])
    assert quality.of_oracle == pytest.approx(sum(kept) / sum(best))
    assert 0 < quality.of_oracle < 0.9
    assert (quality.method, quality.layer, quality.kind) == ("x", 3, "prose")


def test_mass_and_error_by_hand() -> None:
    indices = torch.tensor([[[9, 40], [50, 60]]], dtype=torch.int32)
    quality, key, query = observe(indices)
    grouped = query[0].unflatten(0, (HEADS, GROUP))
    weights = (torch.einsum("hgd,hnd->hgn", grouped, key) * 0.125).softmax(-1)
    kept = torch.zeros(HEADS, LENGTH)
    kept[:, :8] = kept[:, TAIL:] = 1
    kept[0, [9, 40]] = kept[1, [50, 60]] = 1
    partial = weights * kept[:, None]
    assert quality.mass == pytest.approx(partial.sum(-1).mean().item())
    layer, rows, _, _ = make_layer()
    value = context_of(layer.pages.host.value, rows.block_table[0], LENGTH)
    full, ours = weights @ value, partial / partial.sum(-1, keepdim=True) @ value
    error = (ours - full).norm(dim=-1) / full.norm(dim=-1)
    assert quality.error == pytest.approx(error.mean().item(), rel=1e-4)


def test_the_oracle_keeps_all_that_can_be_kept() -> None:
    layer, rows, _, query = make_layer()
    observer = Observer(Oracle())
    observer(query, layer, rows)
    quality = observer.quality("oracle", 0, "prose")
    assert quality.recall == 1 and quality.of_oracle == pytest.approx(1)
    blind = Observer(StreamingLLM())
    blind(query, layer, rows)
    assert blind.quality("blind", 0, "prose").of_oracle < 0.7


def test_only_some_steps_are_looked_at() -> None:
    indices = torch.tensor([[[9], [50]]], dtype=torch.int32)
    one, third, both = (observe(indices, n, every)[0] for n, every in ((1, 1), (2, 2), (2, 1)))
    assert one == third != both


def test_nothing_seen_is_nothing() -> None:
    assert Observer(StreamingLLM()).quality("x", 0, "prose") is None
