"""The identification score of a layer."""

import pytest
import torch

from vllm_tailorkv.kernels import ops, reference

CASES = [
    # dtype, heads, G, head_size, length, queries
    (torch.float32, 2, 4, 64, 300, 32),
    (torch.bfloat16, 1, 7, 128, 77, 5),
    (torch.float16, 4, 1, 80, 40, 40),
    (torch.float32, 1, 2, 72, 1, 1),
]


@pytest.mark.parametrize(("dtype", "heads", "per_head", "head_size", "length", "queries"), CASES)
@pytest.mark.parametrize(("alpha", "softcap"), [(0.001, 0.0), (0.05, 1.5), (1.0, 0.0)])
def test_equals_reference(
    fast, sinks_of, dtype, heads, per_head, head_size, length, queries, alpha, softcap
):
    query = torch.randn(queries, heads * per_head, head_size).to(dtype)
    key = torch.randn(length, heads, head_size).to(dtype)
    options = (alpha, head_size**-0.5, softcap, sinks_of(heads * per_head))
    expected = reference.dense_preference(query, key, *options)
    actual = fast.dense_preference(query, key, *options)
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_reference_against_loops(softcap, sinks_of):
    query, key, sinks = torch.randn(3, 4, 16), torch.randn(50, 2, 16), sinks_of(4)
    actual = reference.dense_preference(query, key, 0.1, 0.25, softcap, sinks)
    for head in range(4):
        total = 0.0
        for i in range(3):
            visible = key[: 48 + i, head // 2].double()
            scores = visible @ query[i, head].double() * 0.25
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.exp()
            sink = 0.0 if sinks is None else sinks[head].double().exp()
            largest = weights.sort(descending=True).values[:5].sum()
            total += float((largest + sink) / (weights.sum() + sink))
        assert abs(float(actual[head]) - (1 - total / 3)) < 1e-5


def test_arguments():
    query, key = torch.randn(3, 4, 16), torch.randn(50, 2, 16)
    with pytest.raises(RuntimeError, match="alpha"):
        ops.dense_preference(query, key, alpha=0.0, scale=1.0)
    with pytest.raises(RuntimeError, match="1 to L="):
        ops.dense_preference(query, key[:2], alpha=0.5, scale=1.0)
    with pytest.raises(RuntimeError, match=r"key must be \[L=50, Hk=2, d=16\], is \[50, 2, 8\]"):
        ops.dense_preference(query, key[..., :8], alpha=0.5, scale=1.0)
