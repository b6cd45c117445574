"""Sink logits against plain maths: each head keeps the share of its attention that tokens have."""

import pytest
import torch

from vllm_tailorkv.kernels import ops, reference
from vllm_tailorkv.layout import DerivedKind

LENGTHS, HEADS, GROUP, SIZE, SCALE = [700, 129, 5], 2, 4, 64, 0.125
VALUES = [-1e30, -8.0, 0.0, 5.0, 30.0, 1e4]


def shares(context, query, value, softcap):
    """What every head pays to all tokens of its context: [R, H, 1]."""
    pages = context.cache.host.key
    found = []
    for row, length in enumerate(context.seq_lens.tolist()):
        key = reference.gather_rows(pages, context.block_table[row], length).double()
        grouped = query[row].double().unflatten(0, (HEADS, GROUP))
        scores = torch.einsum("hgd,hnd->hgn", grouped, key) * SCALE
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        found.append((scores.logsumexp(-1) - value).sigmoid().flatten())
    return torch.stack(found).unsqueeze(-1)


def dense(function, context, query, softcap, logits):
    host, rows = context.cache.host, (context.block_table, context.seq_lens)
    output = torch.full_like(query, float("nan"))
    exact = torch.zeros_like(context.seq_lens)
    derived = context.cache.derived
    function(output, query, *host[:2], derived, *rows, exact, SCALE, softcap, logits)
    return output


def sparse(function, context, query, softcap, logits):
    host, rows = context.cache.host, (context.block_table, context.seq_lens)
    output = torch.full_like(query, float("nan"))
    none = torch.full((len(query), HEADS, 3), -1, dtype=torch.int32)
    tail = torch.zeros_like(context.seq_lens)
    function(output, query, *host[:2], none, *rows, tail, 8, SCALE, softcap, logits)
    return output


def exact(function, context, query, softcap, logits):
    host, count = context.cache.host, len(query)
    output = torch.full_like(query, float("nan"))
    rows = (torch.arange(count).int(), torch.ones(count).int(), context.seq_lens)
    function(output, query, *host[:2], context.block_table, *rows, SCALE, softcap, logits)
    return output


def check(run, functions, context, softcap, error_of):
    query = torch.randn(len(LENGTHS), HEADS * GROUP, SIZE)
    for function in functions:
        without = run(function, context, query, softcap, None)
        for value in VALUES:
            logits = torch.full((HEADS * GROUP,), value)
            expected = without * shares(context, query, value, softcap)
            actual = run(function, context, query, softcap, logits)
            if value < 1e3:
                assert error_of(actual, expected) < 1e-4
            else:
                assert (actual == 0).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_dense(fast, build_context, error_of, softcap):
    context = build_context(LENGTHS, dtype=torch.float32)
    functions = (reference.quantized_decode_attention, fast.quantized_decode_attention)
    check(dense, functions, context, softcap, error_of)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_sparse(fast, build_context, error_of, softcap):
    context = build_context(LENGTHS, kind=DerivedKind.ONEBIT, dtype=torch.float32)
    functions = (reference.sparse_decode_attention, fast.sparse_decode_attention)
    check(sparse, functions, context, softcap, error_of)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_exact(exact_cpu, build_context, error_of, softcap):
    context = build_context(LENGTHS, kind=DerivedKind.ONEBIT, dtype=torch.float32)
    functions = (reference.exact_attention, exact_cpu.exact_attention)
    check(exact, functions, context, softcap, error_of)


@pytest.mark.parametrize("every_head", [True, False])
def test_heads_that_pay_to_their_sinks_choose_little(cpu, build_context, every_head):
    """Tokens of the head that does not are those that are selected, if heads are compared."""
    context = build_context([700], kind=DerivedKind.ONEBIT, heads=1, dtype=torch.float32)
    host, tail = context.cache.host, context.complete
    query = torch.randn(1, 2, SIZE)
    rows = (context.block_table, context.seq_lens, tail)
    chosen = []
    for logits in ([-1e3, 1e3], [1e3, -1e3]):
        indices = torch.zeros(1, 1, 20, dtype=torch.int32)
        options = (8, 8, 700, SIZE, every_head, 0.2, 0.0, int(tail))
        cpu.retrieve_topk(
            indices,
            query,
            context.cache.derived,
            *(host.key, host.key),
            *rows,
            *options,
            torch.tensor(logits),
        )
        chosen.append(indices[0, 0].tolist())
    key = reference.gather_rows(host.key, context.block_table[0], 700)[0, 8 : int(tail)]
    for head in range(2):
        best = (key @ query[0, head]).topk(20).indices + 8
        assert chosen[head] == sorted(best.tolist())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_as_the_op_of_vllm(build_context, error_of, softcap):
    """Prompts and decode steps of its own backend on CPUs."""
    from vllm import _custom_ops as vllm_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    context = build_context(LENGTHS, kind=DerivedKind.ONEBIT, dtype=torch.float32)
    host, table, lengths = context.cache.host, context.block_table, context.seq_lens
    isa = _get_attn_isa(torch.float32, 128, SIZE, "auto")
    key, value = torch.zeros(len(host.key), HEADS, 2 * 128, SIZE).chunk(2, dim=2)
    for block in range(len(host.key)):
        rows = (part[block].transpose(0, 1).nan_to_num().contiguous() for part in host[:2])
        slots = torch.arange(128) + block * 128
        vllm_ops.cpu_attn_reshape_and_cache(*rows, key, value, slots, isa, kv_cache_dtype="auto")
    counts = torch.tensor([1, 40, 5], dtype=torch.int32)
    starts = torch.tensor([0, 1, 41, 46], dtype=torch.int32)
    query = torch.randn(46, HEADS * GROUP, SIZE)
    logits = torch.tensor([2.0, -30.0, 0.0, 9.0]).repeat(2)
    schedule = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=3,
        num_heads=HEADS * GROUP,
        num_kv_heads=HEADS,
        head_dim=SIZE,
        seq_lens=lengths,
        dtype=torch.float32,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        kv_cache_dtype="auto",
    )
    theirs, ours = torch.empty(2, *query.shape).fill_(torch.nan)
    vllm_ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key,
        value_cache=value,
        output=theirs,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=SCALE,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=softcap,
        scheduler_metadata=schedule,
        s_aux=logits,
        kv_cache_dtype="auto",
    )
    softmax = {"scale": SCALE, "softcap": softcap, "sink_logits": logits}
    ops.exact_attention(ours, query, *host[:2], table, starts[:-1], counts, lengths, **softmax)
    assert error_of(ours, theirs) < 1e-5
