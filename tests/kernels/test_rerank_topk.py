"""Candidates ranked again by their true attention: the right set, whatever the layout."""

import pytest
import torch

from vllm_tailorkv.kernels import ops, reference, triton
from vllm_tailorkv.layout import KeyLayout


def candidates_of(lengths: list[int], heads: int, count: int, seed: int = 1) -> torch.Tensor:
    """Up to `count` ascending positions of each row and head, then -1."""
    generator = torch.Generator().manual_seed(seed)
    result = torch.full((len(lengths), heads, count), -1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for head in range(heads):
            some = torch.randperm(length, generator=generator)[:count].sort().values
            result[row, head, : len(some)] = some.int()
    return result


def nothing_elsewhere(query: torch.Tensor) -> torch.Tensor:
    """float32 [R, H]: no head pays anything elsewhere."""
    return torch.full(query.shape[:2], -torch.inf)


def weights_of(context, query, candidates, mass, channels, scale, softcap) -> torch.Tensor:
    """float64 [R, Hk, C]: what each candidate weighs; -1 where there is none."""
    key_cache = context.cache.host.key
    _, heads, block_size, _ = key_cache.shape
    result = torch.full(candidates.shape, -1.0, dtype=torch.float64)
    for row in range(len(query)):
        grouped = query[row].double().unflatten(0, (heads, -1))
        for head in range(heads):
            chosen = candidates[row, head][candidates[row, head] >= 0].long()
            blocks = context.block_table[row, chosen // block_size].long()
            key = key_cache[blocks, head, chosen % block_size].double()
            samples = min(16, len(chosen))
            sample = [key[i * len(chosen) // samples] for i in range(samples)]
            if sample:
                low, high = torch.stack(sample).aminmax(dim=0)
                worth = (high - low) * grouped[head].abs().amax(0)
                key[:, worth.argsort(descending=True, stable=True)[channels:]] = 0
            scores = grouped[head] @ key.T * scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            if len(chosen):
                elsewhere = mass[row].double().unflatten(0, (heads, -1))[head, :, None]
                total = torch.cat((scores, elsewhere), -1).logsumexp(-1, keepdim=True)
                result[row, head, : len(chosen)] = (scores - total).exp().sum(0)
    return result


def check(
    function, context, query, candidates, k, channels=None, scale=0.1, softcap=0.0, mass=None
):
    """The k heaviest candidates, but for those whose weights float32 cannot tell apart."""
    indices = torch.full((*candidates.shape[:2], k), 12345, dtype=torch.int32)
    channels = channels or query.shape[2]
    key, table = context.cache.host.key, context.block_table
    mass = nothing_elsewhere(query) if mass is None else mass
    function(indices, candidates, query, key, table, mass, channels, scale, softcap)
    weights = weights_of(context, query, candidates, mass, channels, scale, softcap)
    for row in range(len(query)):
        for head in range(candidates.shape[1]):
            there = candidates[row, head][candidates[row, head] >= 0].tolist()
            chosen = [i for i in indices[row, head].tolist() if i >= 0]
            assert len(chosen) == min(k, len(there))
            assert indices[row, head].tolist() == chosen + [-1] * (k - len(chosen))
            assert chosen == sorted(set(chosen)) and set(chosen) <= set(there)
            weight = dict(zip(there, weights[row, head].tolist(), strict=False))
            left_out = [weight[i] for i in there if i not in set(chosen)]
            if chosen and left_out:
                lightest = min(weight[i] for i in chosen)
                assert lightest >= max(left_out) * (1 - 1e-4) - 1e-37


@pytest.mark.interpreted
@pytest.mark.parametrize("key_layout", list(KeyLayout))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 64), (4, 80), (8, 96), (3, 128), (4, 256)])
def test_keeps_the_heaviest(fast, build_context, key_layout, dtype, heads):
    group_heads, head_size = heads
    lengths = [1, 129, 700]
    context = build_context(lengths, head_size=head_size, dtype=dtype, key_layout=key_layout)
    query = torch.randn(len(lengths), 2 * group_heads, head_size).to(dtype)
    candidates = candidates_of(lengths, 2, 100)
    for function in (fast.rerank_topk, reference.rerank_topk):
        check(function, context, query, candidates, 25)
        check(function, context, query, candidates, 100, channels=head_size * 3 // 8)
        check(function, context, query, candidates, 25, channels=1)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_softcap(fast, build_context, softcap):
    context = build_context([300])
    query = torch.randn(1, 8, 64).bfloat16() * 4
    for function in (fast.rerank_topk, reference.rerank_topk):
        check(function, context, query, candidates_of([300], 2, 64), 16, 64, 0.3, softcap)


@pytest.mark.parametrize("scale", [0.1, 20.0])
@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_heads_are_measured_against_what_they_pay_elsewhere(fast, build_context, scale, level):
    """Scores of either sign and any size, beside what is paid elsewhere, less or more."""
    context = build_context([300], dtype=torch.float32)
    query = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(4))
    mass = torch.tensor([[level, 0.0, 3.0, -torch.inf, 8.0, 5.0, level, -3.0]])
    for function in (fast.rerank_topk, reference.rerank_topk):
        check(function, context, query, candidates_of([300], 2, 64), 16, 64, scale, 0.0, mass=mass)


def test_a_head_that_pays_all_elsewhere_has_no_say(fast, build_context):
    context = context_of_scores(build_context, torch.zeros(1, 128))
    key, block = context.cache.host.key, context.block_table[0, 0]
    key[block, 0, :64, 0] = 8.0  # what the first head looks for
    key[block, 0, 64:, 1] = 4.0  # and the second
    query = torch.zeros(1, 2, 64)
    query[0, 0, 0] = query[0, 1, 1] = 1
    candidates = torch.arange(128, dtype=torch.int32)[None, None]
    for mass, expected in ((-torch.inf, range(64)), (20.0, range(64, 128))):
        paid = torch.tensor([[mass, 0.0]])
        for function in (fast.rerank_topk, reference.rerank_topk):
            indices = torch.zeros(1, 1, 64, dtype=torch.int32)
            function(indices, candidates, query, key, context.block_table, paid, 64, 1.0, 0.0)
            assert indices.flatten().tolist() == list(expected)


def test_equal_weights_keep_the_lower_positions(fast, build_context):
    context = build_context([256])
    context.cache.host.key.fill_(1.0)
    query = torch.ones(1, 8, 64, dtype=torch.bfloat16)
    candidates = candidates_of([256], 2, 40)
    for function in (fast.rerank_topk, reference.rerank_topk):
        indices = torch.zeros(1, 2, 8, dtype=torch.int32)
        key, table = context.cache.host.key, context.block_table
        function(indices, candidates, query, key, table, nothing_elsewhere(query), 64, 0.1, 0.0)
        assert torch.equal(indices, candidates[..., :8])


def context_of_scores(build_context, scores: torch.Tensor, **kwargs):
    """A row whose tokens have these scores [Hk, n] for a query of ones, whatever the channels:
    the first alone is not 0.
    """
    heads, length = scores.shape
    context = build_context([length], heads=heads, dtype=torch.float32, **kwargs)
    context.cache.host.key.fill_(0)
    position = torch.arange(length)
    blocks = context.block_table[0, position // 128].long()
    context.cache.host.key[blocks, :, position % 128, 0] = scores.T
    return context


KINDS = {
    "normal": lambda x: x,
    "ties": lambda x: (x * 2).round(),
    "vanishing": lambda x: x.sign() * 1e-45,  # 0.0 and -0.0, once scaled
    "negative": lambda x: -x.abs() - 1,
    "close": lambda x: 1 + (x * 50).round() * 2.0**-23,
    "equal": torch.zeros_like,
    "large": lambda x: x * 1e30,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 128, 700])
def test_one_head_is_exact(fast, build_context, kind, k):
    scores = KINDS[kind](torch.randn(2, 1100, generator=torch.Generator().manual_seed(3)))
    context = context_of_scores(build_context, scores)
    query, scale = torch.ones(1, 2, 64), 0.1 if kind == "vanishing" else 1.0
    # What one head pays elsewhere changes no order.
    mass = torch.tensor([[90.0, -torch.inf]])
    candidates = candidates_of([1100], 2, 650)
    indices = torch.full((2, 1, 2, k), 12345, dtype=torch.int32)
    key, table = context.cache.host.key, context.block_table
    for function, result in zip((fast.rerank_topk, reference.rerank_topk), indices, strict=True):
        function(result, candidates, query, key, table, mass, 64, scale, 0.0)
    assert torch.equal(*indices)


@pytest.mark.parametrize("key_layout", list(KeyLayout))
def test_ties_between_channels(fast, build_context, key_layout):
    context = build_context([400], dtype=torch.float32, key_layout=key_layout)
    sign = torch.randn(context.cache.host.key.shape, generator=torch.Generator().manual_seed(2))
    context.cache.host.key.copy_(sign.sign())
    query, candidates = torch.ones(1, 2, 64), candidates_of([400], 2, 200)
    mass = nothing_elsewhere(query)
    indices = torch.full((2, 1, 2, 50), 12345, dtype=torch.int32)
    key, table = context.cache.host.key, context.block_table
    for function, result in zip((fast.rerank_topk, reference.rerank_topk), indices, strict=True):
        function(result, candidates, query, key, table, mass, 5, 1.0, 0.0)
    assert torch.equal(*indices)


def test_samples_choose_channels(fast, build_context):
    """What the candidates between the samples hold, counts only in the channels chosen."""
    context = build_context([128], heads=1, dtype=torch.float32)
    key, block = context.cache.host.key, context.block_table[0, 0]
    key[block] = 0.5
    key[block, 0, :, 1] = 0.25
    query = torch.ones(1, 1, 64)
    query[0, 0, 2:] = 0
    candidates = torch.arange(20, 60, dtype=torch.int32)[None, None]
    samples = {i * 40 // 16 for i in range(16)}
    hidden = [i for i in range(40) if i not in samples]
    key[block, 0, 20 + torch.tensor(hidden), 1] = 100.0
    key[block, 0, 20 + hidden[3], 0] = 1.0
    indices = torch.full((1, 1, 2), 12345, dtype=torch.int32)
    mass, table = nothing_elsewhere(query), context.block_table
    fast.rerank_topk(indices, candidates, query, key, table, mass, 1, 1.0, 0.0)
    assert indices.flatten().tolist() == [20, 20 + hidden[3]]


def test_wide_block_table(fast, build_context):
    context = build_context([300, 200])
    wide = torch.full((2, 50), -1, dtype=torch.int32)
    wide[:, :4] = context.block_table
    context.block_table = wide[:, :4]
    query = torch.randn(2, 8, 64).bfloat16()
    check(fast.rerank_topk, context, query, candidates_of([300, 200], 2, 64), 16, channels=24)


def test_many_candidates(fast, build_context):
    context = build_context([3000], heads=1)
    query = torch.randn(1, 2, 64).bfloat16()
    check(fast.rerank_topk, context, query, candidates_of([3000], 1, 2500), 600, channels=24)


@pytest.mark.parametrize(("rows", "count", "k"), [(0, 10, 4), (1, 10, 0), (1, 0, 4)])
def test_nothing(fast, build_context, rows, count, k):
    context = build_context([5])
    candidates = torch.full((rows, 2, count), -1, dtype=torch.int32)
    query = torch.ones(rows, 4, 64, dtype=torch.bfloat16)
    indices = torch.zeros(rows, 2, k, dtype=torch.int32)
    key, table = context.cache.host.key, context.block_table[:rows]
    fast.rerank_topk(indices, candidates, query, key, table, nothing_elsewhere(query), 64, 0.1, 0.0)
    assert (indices == -1).all()


def test_triton_names_its_limit(build_context):
    context = build_context([5])
    candidates = torch.full((1, 2, 65537), -1, dtype=torch.int32)
    query = torch.ones(1, 4, 64, dtype=torch.bfloat16)
    indices = torch.zeros(1, 2, 4, dtype=torch.int32)
    key, table = context.cache.host.key, context.block_table
    with pytest.raises(ValueError, match="lower topk_tokens or rerank_factor"):
        triton.rerank_topk(
            indices, candidates, query, key, table, nothing_elsewhere(query), 64, 0.1, 0.0
        )


def test_no_candidates(fast, build_context):
    context = build_context([5])
    candidates = torch.full((1, 2, 10), -1, dtype=torch.int32)
    query = torch.ones(1, 4, 64, dtype=torch.bfloat16)
    for function in (fast.rerank_topk, reference.rerank_topk):
        indices = torch.zeros(1, 2, 4, dtype=torch.int32)
        key, table = context.cache.host.key, context.block_table
        function(indices, candidates, query, key, table, nothing_elsewhere(query), 64, 0.1, 0.0)
        assert (indices == -1).all()


def test_public_op_checks_its_arguments(build_context):
    context = build_context([200])
    candidates = candidates_of([200], 2, 20)
    query = torch.ones(1, 4, 64, dtype=torch.bfloat16)
    indices = torch.zeros(1, 2, 5, dtype=torch.int32)
    key, table = context.cache.host.key, context.block_table
    mass = nothing_elsewhere(query)
    ops.rerank_topk(indices, candidates, query, key, table, mass, channels=64, scale=0.1)
    for broken in (
        (indices[:, :1], candidates, query, key, table, mass),
        (indices, candidates.long(), query, key, table, mass),
        (indices, candidates, query.float(), key, table, mass),
        (indices, candidates, query[:, :3], key, table, mass),
        (indices, candidates, query, key, table[:0], mass),
        (indices, candidates, query, key, table, mass[:, :3]),
        (indices, candidates, query, key, table, mass.double()),
    ):
        with pytest.raises(RuntimeError):
            ops.rerank_topk(*broken, channels=64, scale=0.1)
    for channels in (0, 65):
        with pytest.raises(RuntimeError, match="channels"):
            ops.rerank_topk(
                indices, candidates, query, key, table, mass, channels=channels, scale=0.1
            )
