"""The k best tokens as a set, ties to the lower position, in ascending order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_tailorkv.kernels import cpu as cpu_module
from vllm_tailorkv.kernels import ops, plain, reference


def run(function, scores, tail_start, k, sink_tokens=8):
    indices = torch.full((*scores.shape[:2], k), 12345, dtype=torch.int32)
    function(indices, scores, torch.tensor(tail_start, dtype=torch.int32), sink_tokens)
    return indices


def by_hand(scores, tail_start, k, sink_tokens=8):
    rows = []
    for row, end in enumerate(tail_start):
        for head in range(scores.shape[1]):
            values = scores[row, head].tolist()
            order = sorted(range(sink_tokens, max(end, sink_tokens)), key=lambda i: (-values[i], i))
            best = sorted(order[:k])
            rows.append(best + [-1] * (k - len(best)))
    return torch.tensor(rows, dtype=torch.int32).view(*scores.shape[:2], k)


def make_scores(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    if name == "ties":
        scores = (scores * 2).round()  # -0.0 among them
    elif name == "rising":
        scores = torch.arange(scores.numel()).float().view(shape)
    elif name == "falling":
        scores = -torch.arange(scores.numel()).float().view(shape)
    elif name == "equal":
        scores = torch.zeros(shape)
    elif name == "infinite":
        scores = torch.where(scores > 2, float("inf"), scores)
        scores = torch.where(scores < 0.5, -float("inf"), scores)
    return scores


@pytest.mark.parametrize("name", ["normal", "ties", "rising", "falling", "equal", "infinite"])
@pytest.mark.parametrize("k", [1, 128, 3000])
def test_equals_definition(cpu, name, k):
    tail_start = [0, 8, 9, 136, 137, 5000]
    scores = make_scores(name, (6, 2, 5000))
    expected = by_hand(scores, tail_start, k)
    for row, end in enumerate(tail_start):
        scores[row, :, :8] = float("nan")
        scores[row, :, end:] = float("nan")
    for module in (cpu, plain, reference):
        assert torch.equal(run(module.select_topk, scores, tail_start, k), expected)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", ["normal", "ties", "rising"])
def test_split_over_threads(cpu, threads, name, count):
    scores = make_scores(name, (1, 1, 60000))
    threads(count)
    actual = run(cpu.select_topk, scores, [60000], 200)
    assert torch.equal(actual, by_hand(scores, [60000], 200))


def test_strided_scores(cpu):
    scores = make_scores("ties", (3, 4, 600))[:, 1:3, :555]
    expected = by_hand(scores, [555] * 3, 64)
    for module in (cpu, plain):
        assert torch.equal(run(module.select_topk, scores, [555] * 3, 64), expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0]), min_size=1, max_size=200), st.data())
def test_any_ties(values, data):
    if cpu_module.unavailable():
        pytest.skip("no C++ extension")
    k = data.draw(st.integers(1, len(values) + 2))
    sinks = data.draw(st.integers(0, 10))
    scores = torch.tensor(values).view(1, 1, -1)
    expected = by_hand(scores, [len(values)], k, sinks)
    for module in (cpu_module, plain):
        assert torch.equal(run(module.select_topk, scores, [len(values)], k, sinks), expected)


def test_nan_does_not_crash(cpu):
    scores = make_scores("normal", (2, 2, 4000))
    scores[:, :, ::3] = float("nan")
    indices = run(cpu.select_topk, scores, [4000, 4000], 128)
    assert ((indices >= 8) & (indices < 4000)).all()


@pytest.mark.parametrize("shape", [(0, 2, 100), (2, 2, 100)])
def test_nothing_to_do(cpu, shape):
    for module in (cpu, plain):
        assert run(module.select_topk, torch.zeros(shape), [100] * shape[0], 0).numel() == 0
        assert run(module.select_topk, torch.zeros(0, 2, 100), [], 5).numel() == 0
    assert (run(plain.select_topk, torch.zeros(2, 1, 0), [0, 0], 3) == -1).all()


def test_arguments():
    indices, scores = torch.zeros(1, 2, 5).int(), torch.zeros(1, 2, 64)
    tail = torch.tensor([64], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="indices"):
        ops.select_topk(indices.long(), scores, tail, sink_tokens=8)
    with pytest.raises(RuntimeError, match="scores"):
        ops.select_topk(indices, scores.half(), tail, sink_tokens=8)
    with pytest.raises(RuntimeError, match="tail_start"):
        ops.select_topk(indices, scores, tail.repeat(2), sink_tokens=8)
