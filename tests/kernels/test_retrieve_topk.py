"""Finding tokens in one call is weighing, proposing and ranking again in several."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vllm_tailorkv.kernels import composed, dispatch, ops, plain
from vllm_tailorkv.kernels import triton as triton_module
from vllm_tailorkv.kernels.triton import launch
from vllm_tailorkv.layout import DerivedKind, KeyLayout

LENGTHS = [300, 1, 1000, 513]


def arguments_of(
    context, query, kind, k, candidates, every_head, softcap=0.0, channels=None, sink_logits=None
):
    """Everything but the indices, by position."""
    host, tail = context.cache.host, context.complete
    most = int(tail.max())
    return (
        query,
        context.cache.derived,
        host.key,
        host.gathered_key,
        context.block_table,
        context.seq_lens,
        tail,
        8,
        8,
        candidates,
        channels or query.shape[2],
        every_head,
        0.2,
        softcap,
        most,
        sink_logits,
    )


def found(function, rows, heads, k, arguments):
    indices = torch.full((rows, heads, k), 12345, dtype=torch.int32)
    function(indices, *arguments)
    return indices


@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
@pytest.mark.parametrize(("k", "candidates"), [(40, 40), (40, 90), (600, 700), (0, 0)])
@pytest.mark.parametrize(
    ("dtype", "heads", "group", "head_size", "key_rows", "softcap"),
    [
        (torch.bfloat16, 2, 4, 128, True, 0.0),
        (torch.float16, 1, 7, 80, False, 20.0),
        (torch.float32, 3, 1, 64, True, 0.0),
        (torch.bfloat16, 1, 8, 256, False, 0.0),
    ],
)
def test_equals_its_steps(
    cpu,
    build_context,
    sinks_of,
    kind,
    k,
    candidates,
    dtype,
    heads,
    group,
    head_size,
    key_rows,
    softcap,
):
    context = build_context(
        LENGTHS, kind=kind, heads=heads, head_size=head_size, dtype=dtype, key_rows=key_rows
    )
    query = torch.randn(len(LENGTHS), heads * group, head_size).to(dtype)
    channels = head_size if key_rows else head_size * 3 // 8
    for every_head in (True, False):
        softmax = (softcap, channels, sinks_of(heads * group))
        arguments = arguments_of(context, query, kind, k, candidates, every_head, *softmax)
        expected = found(composed.retrieve_topk, len(LENGTHS), heads, k, arguments)
        indices = found(cpu.retrieve_topk, len(LENGTHS), heads, k, arguments)
        if every_head or group == 1:
            assert torch.equal(indices, expected)
            continue
        # The mean of the heads may be added up in another order.
        for mine, theirs in zip(indices.flatten(0, 1), expected.flatten(0, 1), strict=True):
            kept = len(set(mine.tolist()) & set(theirs.tolist()))
            assert kept >= 0.95 * len(set(theirs.tolist()))


@pytest.fixture
def in_triton(monkeypatch):
    """All ops in Triton, where it has them."""
    monkeypatch.setenv("VLLM_TAILORKV_KERNELS", "triton")
    dispatch.forget()
    yield
    monkeypatch.undo()
    dispatch.forget()


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
@pytest.mark.parametrize(
    ("k", "candidates", "dtype", "heads", "group", "softcap"),
    [
        (40, 90, torch.bfloat16, 2, 4, 0.0),
        (600, 700, torch.bfloat16, 1, 4, 0.0),
        (40, 40, torch.float16, 1, 7, 20.0),
        (40, 90, torch.float32, 2, 1, 0.0),
    ],
)
def test_triton_equals_its_steps(
    in_triton,
    placed,
    monkeypatch,
    build_context,
    sinks_of,
    kind,
    k,
    candidates,
    dtype,
    heads,
    group,
    softcap,
):
    """It gives kernels other arguments than the steps do, and takes rows in turns."""
    context = build_context(
        LENGTHS, kind=kind, heads=heads, dtype=dtype, key_layout=KeyLayout.TOKEN_MAJOR
    )
    steps, at_once = placed(composed), placed(triton_module)
    query = torch.randn(len(LENGTHS), heads * group, 64).to(dtype)
    for every_head in (True, False):
        softmax = (softcap, None, sinks_of(heads * group))
        arguments = arguments_of(context, query, kind, k, candidates, every_head, *softmax)
        monkeypatch.setattr(composed, "SCORES_BYTES", 256 << 20)
        expected = found(steps.retrieve_topk, len(LENGTHS), heads, k, arguments)
        monkeypatch.setattr(composed, "SCORES_BYTES", 3 * heads * arguments[-2] * 4)
        indices = found(at_once.retrieve_topk, len(LENGTHS), heads, k, arguments)
        # The next launches start from them.
        assert not any(counters.any() for counters in launch._counters.values())
        if every_head or group == 1:
            assert torch.equal(indices, expected)
            continue
        for mine, theirs in zip(indices.flatten(0, 1), expected.flatten(0, 1), strict=True):
            kept = len(set(mine.tolist()) & set(theirs.tolist()))
            assert kept >= 0.95 * len(set(theirs.tolist()))


@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
@pytest.mark.parametrize("every_head", [True, False])
def test_steps_look_at_no_value(monkeypatch, build_context, kind, every_head):
    """What a graph that is being captured could not give: fake tensors have none either."""
    monkeypatch.setattr(composed, "SCORES_BYTES", 2 * 2 * 960 * 4)
    context = build_context(LENGTHS, kind=kind)
    query = torch.randn(len(LENGTHS), 8, 64).to(torch.bfloat16)
    arguments = arguments_of(context, query, kind, 40, 90, every_head)
    selected = torch.randn(len(LENGTHS), 2, 960), context.complete, 8
    with FakeTensorMode() as mode:

        def fake(value):
            if isinstance(value, tuple):
                return type(value)(*map(fake, value))
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        found(composed.retrieve_topk, len(LENGTHS), 2, 40, list(map(fake, arguments)))
        found(plain.select_topk, len(LENGTHS), 2, 40, list(map(fake, selected)))


@pytest.mark.parametrize("kind", [DerivedKind.ONEBIT, DerivedKind.CHANNELS])
def test_more_candidates_than_tokens(cpu, build_context, kind):
    """As many are proposed as there are; memory is taken for no more."""
    context = build_context(LENGTHS, kind=kind)
    query = torch.randn(len(LENGTHS), 8, 64).to(torch.bfloat16)
    results = []
    for candidates in (2**31 - 1, 1000):
        arguments = arguments_of(context, query, kind, 40, candidates, True)
        results.append(found(cpu.retrieve_topk, len(LENGTHS), 2, 40, arguments))
        results.append(found(composed.retrieve_topk, len(LENGTHS), 2, 40, arguments))
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_rows(cpu, build_context):
    context = build_context([64], kind=DerivedKind.ONEBIT)
    query = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
    arguments = list(arguments_of(context, query, DerivedKind.ONEBIT, 8, 16, True))
    for i in (0, 4, 5, 6):
        arguments[i] = arguments[i][:0]
    assert found(cpu.retrieve_topk, 0, 2, 8, arguments).shape == (0, 2, 8)


def test_public_op(build_context):
    """Contexts whose middle is shorter than k give all of it."""
    context = build_context([140], kind=DerivedKind.ONEBIT)
    query = torch.randn(1, 4, 64).to(torch.bfloat16)
    indices = torch.zeros(1, 2, 200, dtype=torch.int32)
    host = context.cache.host
    ops.retrieve_topk(
        indices,
        query,
        context.cache.derived,
        host.key,
        host.gathered_key,
        context.block_table,
        context.seq_lens,
        context.complete,
        sink_tokens=8,
        critical_channels=8,
        candidates=400,
        channels=64,
        every_head=True,
        scale=0.1,
        max_tail_start=128,
    )
    assert indices[0, 0].tolist() == [*range(8, 128), *[-1] * 80]
