"""The peers' policies on small caches, against their definitions by hand."""

import pytest
import torch
from accuracy.policies import POLICIES, Policy, SnapKV, as_indices

from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.selection import Layer, Pages, retrieve
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.config import load_config
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.layout import DerivedKind, KeyLayout, PageLayout

HEADS, GROUP, SIZE, BLOCK, LENGTH, TAIL = 2, 3, 64, 128, 500, 440
OPTIONS = {"topk_tokens": 32, "rerank_factor": 1}


def make_layer(
    key_layout: KeyLayout = KeyLayout.CHANNEL_MAJOR, **options: object
) -> tuple[Layer, DecodeRows, torch.Tensor, torch.Tensor]:
    """A layer with one row of tokens in scattered blocks; its K [Hk, L, d] and a query."""
    layout = PageLayout(DerivedKind.ONEBIT, HEADS, SIZE, BLOCK, 64, 1, 4, key_layout)
    raw = torch.full((5, layout.host_bytes + layout.derived_bytes), 0xFF, dtype=torch.uint8)
    host = host_pages(raw[:, : layout.host_bytes], layout, torch.float32)
    derived = derived_pages(raw[:, layout.host_bytes :], layout, torch.float32)
    table = torch.tensor([[3, 0, 4, 1]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, LENGTH, HEADS, SIZE, generator=generator)
    positions = torch.arange(LENGTH)
    slots = table[0, positions // BLOCK].long() * BLOCK + positions % BLOCK
    ops.write_kv(key, value, host.key, host.value, slots)
    groups = torch.tensor([b * 2 + g for b in table[0].tolist() for g in (0, 1)][: LENGTH // 64])
    ops.quantize_groups(groups, host.key, host.value, derived)
    config = load_config({"index": "onebit", **OPTIONS, **options})
    layer = Layer(Pages(host, derived), config, 0.125, 0.0, Workspace())
    lengths = torch.tensor([LENGTH], dtype=torch.int32)
    rows = DecodeRows(None, lengths, table, torch.tensor([TAIL], dtype=torch.int32), TAIL)
    query = torch.randn(1, HEADS * GROUP, SIZE, generator=generator)
    return layer, rows, key.transpose(0, 1), query


def true_weights(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Attention over the middle, summed over the heads of a KV head: [Hk, TAIL - 8]."""
    grouped = query[0].unflatten(0, (HEADS, GROUP))
    scores = torch.einsum("hgd,hnd->hgn", grouped, key[:, 8:TAIL]) * 0.125
    return scores.softmax(-1).sum(1)


@pytest.mark.parametrize("name", POLICIES)
def test_choices_are_distinct_middle_tokens_within_budget(name):
    layer, rows, _, query = make_layer()
    policy = POLICIES[name]()
    if isinstance(policy, Policy) and policy.stateful:
        policy.restart(1)
        policy(query, layer, rows)
    indices = policy(query, layer, rows)
    assert indices.dtype == torch.int32 and indices.is_contiguous()
    for head in indices[0].tolist():
        chosen = [i for i in head if i >= 0]
        assert chosen == sorted(set(chosen))
        assert 17 <= len(chosen) <= 32 and min(chosen) >= 8 and max(chosen) < TAIL


def test_oracle_takes_the_heaviest():
    layer, rows, key, query = make_layer()
    best = true_weights(key, query).topk(32).indices.sort().values + 8
    assert torch.equal(POLICIES["oracle"]()(query, layer, rows)[0].long(), best)


def test_streaming_takes_the_newest():
    layer, rows, _, query = make_layer()
    indices = POLICIES["streaming_llm"]()(query, layer, rows)
    assert indices[0, 0].tolist() == list(range(TAIL - 32, TAIL))


def test_quest_takes_pages_whose_bound_is_highest():
    layer, rows, key, query = make_layer()
    indices = POLICIES["quest"]()(query, layer, rows)
    for head in range(HEADS):
        bounds = []
        for begin in range(8, TAIL, 16):
            page = key[head, begin : min(begin + 16, TAIL)]
            low, high = page.amin(0), page.amax(0)
            grouped = query[0].unflatten(0, (HEADS, GROUP))[head]
            bounds.append(torch.maximum(grouped * low, grouped * high).sum(-1).amax().item())
        best = sorted(sorted(range(len(bounds)), key=lambda i: -bounds[i])[:2])
        expected = [t for i in best for t in range(8 + 16 * i, min(8 + 16 * i + 16, TAIL))]
        assert [i for i in indices[0, head].tolist() if i >= 0] == expected


def test_snapkv_sees_all_of_the_question_and_then_keeps_its_choice():
    layer, rows, _, query = make_layer()
    policy = SnapKV()
    policy.restart(2)
    assert policy(query, layer, rows).shape[2] == TAIL - 8
    assert policy(query * 2, layer, rows).shape[2] == TAIL - 8
    kept = policy(query, layer, rows)
    assert torch.equal(policy(-query, layer, rows), kept)


def test_reranking_is_as_good_as_the_oracle_when_everything_is_a_candidate():
    # Only rows that lie together are ranked by all their channels.
    layer, rows, key, query = make_layer(KeyLayout.TOKEN_MAJOR, rerank_factor=16)
    best = true_weights(key, query).topk(32).indices.sort().values + 8
    assert torch.equal(retrieve(query, layer, rows)[0].long(), best)


def test_reranking_keeps_more_of_the_attention():
    kept = []
    for factor in (1, 4):
        layer, rows, key, query = make_layer(rerank_factor=factor)
        indices = retrieve(query, layer, rows)[0].long() - 8
        kept.append(true_weights(key, query).gather(1, indices).sum().item())
    assert kept[1] > 1.05 * kept[0]


def test_indices_are_sorted_and_padded():
    rows = [torch.tensor([[5, 2, 9], [-1, 4, 3]]), torch.tensor([[7], [1]])]
    assert as_indices(rows).tolist() == [[[2, 5, 9], [3, 4, -1]], [[7, -1, -1], [1, -1, -1]]]
