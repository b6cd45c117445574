"""The peers' policies on small caches, against their definitions by hand."""

import pytest
import torch
from accuracy.policies import POLICIES, Policy, SnapKV, as_indices
from selection import GROUP, HEADS, TAIL, make_layer, true_weights

from vllm_tailorkv.attention.selection import retrieve
from vllm_tailorkv.layout import KeyLayout


@pytest.mark.parametrize("group", [1, GROUP, 7])
@pytest.mark.parametrize("name", POLICIES)
def test_choices_are_distinct_middle_tokens_within_budget(name, group):
    layer, rows, _, query = make_layer(group=group)
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


def test_loud_heads_do_not_drown_the_others():
    """A level that one head gives to all tokens alike changes nothing."""
    found = []
    for level in (0.0, 400.0):
        layer, rows, _, query = make_layer(level=level)
        query[:, ::GROUP, 0] = 1.0
        query[:, 1::GROUP, 0] = query[:, 2::GROUP, 0] = 0.0
        found.append(retrieve(query, layer, rows))
    assert torch.equal(*found)


def test_indices_are_sorted_and_padded():
    rows = [torch.tensor([[5, 2, 9], [-1, 4, 3]]), torch.tensor([[7], [1]])]
    assert as_indices(rows).tolist() == [[[2, 5, 9], [3, 4, -1]], [[7, -1, -1], [1, -1, -1]]]
