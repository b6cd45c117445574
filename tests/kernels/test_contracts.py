"""What torch's ops are called with directly is checked where pointers are made.

Each case breaks one argument of a good call. Without its check the kernel would read or write
beyond a tensor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vllm_tailorkv.kernels import cpu, library
from vllm_tailorkv.layout import DerivedKind

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ extension")

ROWS, HEADS, KV_HEADS, SIZE, K = 2, 4, 2, 64, 8
LENGTHS = [300, 200]
OPS = (
    "write_kv",
    "quantize_dense",
    "quantize_onebit",
    "quantize_channels",
    "quantized_decode_attention",
    "log_mass",
    "score_onebit",
    "score_channels",
    "select_topk",
    "propose_onebit",
    "propose_channels",
    "rerank_topk",
    "retrieve_onebit",
    "retrieve_channels",
    "sparse_decode_attention",
    "attention_onebit",
    "attention_channels",
    "dense_preference",
)
NAMES = {
    "quantize": "quantize_groups",
    "score": "score_tokens",
    "propose": "propose_topk",
    "retrieve": "retrieve_topk",
    "attention": "retrieve_attention",
}


def op_of(case: str) -> str:
    if case in ("quantized_decode_attention", "dense_preference") or case in NAMES.values():
        return case
    return NAMES.get(case.partition("_")[0], case)


def kind_of(case: str) -> DerivedKind:
    if case.endswith("channels"):
        return DerivedKind.CHANNELS
    if case in ("quantize_dense", "quantized_decode_attention"):
        return DerivedKind.DENSE
    return DerivedKind.ONEBIT


@pytest.fixture
def arguments(build_context: Callable[..., Any]) -> Callable[[str], dict[str, Any]]:
    """Good arguments of a case, by name in the schema's order."""

    def build(case: str) -> dict[str, Any]:
        context = build_context(LENGTHS, kind=kind_of(case), key_rows=case == "write_kv")
        host, table = context.cache.host, context.block_table
        derived = library.flat(context.cache.derived)
        lengths, tail = context.seq_lens, context.complete
        dtype = host.key.dtype
        query = torch.randn(ROWS, HEADS, SIZE).to(dtype)
        scored = torch.randn(ROWS, KV_HEADS, 2, SIZE)
        rows = {"block_table": table, "seq_lens": lengths}
        indices = torch.arange(8, 8 + K).int().expand(ROWS, KV_HEADS, K).contiguous()
        most = int(tail.max())
        score = {
            "query": scored,
            "index": derived,
            "key_cache": host.key,
            "block_table": table,
            "tail_start": tail,
            "offset": torch.zeros(ROWS, KV_HEADS, 2),
            "sink_tokens": 8,
            "critical_channels": 8,
        }
        softmax = {"scale": 0.1, "softcap": 0.0}
        sinks = {"sink_logits": torch.zeros(HEADS)}
        pages = {"key_cache": host.key, "value_cache": host.value}
        mass = torch.zeros(ROWS, HEADS)
        found: dict[str, dict[str, Any]] = {
            "write_kv": {
                "key": torch.randn(5, KV_HEADS, SIZE).to(dtype),
                "value": torch.randn(5, KV_HEADS, SIZE).to(dtype),
                **pages,
                "slot_mapping": torch.arange(5),
                "key_rows": host.key_rows,
            },
            "quantize_groups": {
                "groups": torch.tensor([0, 3]),
                **pages,
                "derived": derived,
                "fit": True,
            },
            "quantized_decode_attention": {
                "output": torch.empty_like(query),
                "query": query,
                **pages,
                "codes": derived,
                **rows,
                "tail_start": tail,
                **softmax,
                **sinks,
            },
            "log_mass": {
                "mass": mass,
                "query": query,
                "key_cache": host.key,
                **rows,
                "tail_start": tail,
                "sink_tokens": 8,
                **softmax,
                **sinks,
            },
            "score_tokens": {"scores": torch.empty(ROWS, KV_HEADS, most), **score},
            "select_topk": {
                "indices": indices.clone(),
                "scores": torch.randn(ROWS, KV_HEADS, most),
                "tail_start": tail,
                "sink_tokens": 8,
            },
            "propose_topk": {"indices": indices.clone(), **score, "max_tail_start": most},
            "rerank_topk": {
                "indices": indices[..., :4].contiguous(),
                "candidates": indices,
                "query": query,
                "key_cache": host.key,
                "block_table": table,
                "mass": mass,
                "channels": SIZE,
                **softmax,
            },
            "retrieve_topk": {
                "indices": indices.clone(),
                "query": query,
                "index": derived,
                "key_cache": host.key,
                "gathered_key": host.key,
                **rows,
                "tail_start": tail,
                "sink_tokens": 8,
                "critical_channels": 8,
                "candidates": 2 * K,
                "channels": SIZE,
                "every_head": True,
                **softmax,
                "max_tail_start": most,
                **sinks,
            },
            "sparse_decode_attention": {
                "output": torch.empty_like(query),
                "query": query,
                **pages,
                "indices": indices,
                **rows,
                "tail_start": tail,
                "sink_tokens": 8,
                **softmax,
                **sinks,
            },
            "retrieve_attention": {
                "output": torch.empty_like(query),
                "query": query,
                "index": derived,
                "key_cache": host.key,
                "gathered_key": host.key,
                "value_cache": host.value,
                **rows,
                "tail_start": tail,
                "sink_tokens": 8,
                "critical_channels": 8,
                "topk": K,
                "candidates": 2 * K,
                "channels": SIZE,
                "every_head": True,
                **softmax,
                "max_tail_start": most,
                **sinks,
            },
            "exact_attention": {
                "output": torch.empty_like(query),
                "query": query,
                **pages,
                "block_table": table,
                "query_start": torch.arange(ROWS).int(),
                "query_lens": torch.ones(ROWS).int(),
                "seq_lens": lengths,
                **softmax,
                **sinks,
            },
            "dense_preference": {
                "query": torch.randn(3, HEADS, SIZE),
                "key": torch.randn(50, KV_HEADS, SIZE),
                "alpha": 0.1,
                **softmax,
                **sinks,
            },
        }
        return found[op_of(case)]

    return build


def call(case: str, values: dict[str, Any]) -> Any:
    return getattr(library.OPS, op_of(case))(*values.values())


@pytest.mark.parametrize("case", OPS)
def test_good_arguments(arguments, case):
    """The cases below differ from these in one argument."""
    values = arguments(case)
    schema = getattr(library.OPS, op_of(case)).default._schema
    assert [argument.name for argument in schema.arguments] == list(values)
    call(case, values)


def halved(axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Half as long along an axis, contiguous."""
    return lambda x: x.narrow(axis, 0, x.shape[axis] // 2).contiguous()


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same shape, every second element in memory."""
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]


def of_part(i: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list], list]:
    """One tensor of a list changed."""
    return lambda parts: [change(part) if j == i else part for j, part in enumerate(parts)]


def number(value: float) -> Callable[[Any], float]:
    return lambda _: value


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x.long()


BROKEN: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("exact_attention", "output", halved(0)),
    ("exact_attention", "query", strided),
    ("exact_attention", "value_cache", halved(0)),
    ("exact_attention", "block_table", wide),
    ("exact_attention", "query_start", halved(0)),
    ("exact_attention", "query_start", lambda x: x + 1),
    ("exact_attention", "query_lens", lambda x: x - 2),
    ("exact_attention", "query_lens", wide),
    ("exact_attention", "seq_lens", lambda x: x * 1000),
    ("exact_attention", "scale", number(0)),
    ("exact_attention", "sink_logits", halved(0)),
    ("write_kv", "value_cache", halved(0)),
    ("write_kv", "value_cache", halved(2)),
    ("write_kv", "key_rows", halved(0)),
    ("write_kv", "key_rows", lambda x: x.float()),
    ("write_kv", "key", halved(1)),
    ("write_kv", "value", halved(0)),
    ("write_kv", "slot_mapping", halved(0)),
    ("write_kv", "slot_mapping", lambda x: x.int()),
    ("write_kv", "key", strided),
    ("quantize_dense", "value_cache", halved(0)),
    ("quantize_dense", "derived", of_part(0, halved(3))),
    ("quantize_dense", "derived", of_part(1, halved(0))),
    ("quantize_dense", "derived", of_part(2, halved(3))),
    ("quantize_dense", "derived", of_part(3, halved(3))),
    ("quantize_dense", "derived", of_part(3, halved(4))),
    ("quantize_dense", "derived", of_part(4, halved(3))),
    ("quantize_dense", "derived", of_part(5, halved(1))),
    ("quantize_dense", "derived", lambda parts: parts[:5]),
    ("quantize_dense", "groups", lambda x: x.int()),
    ("quantize_onebit", "derived", of_part(0, strided)),
    ("quantize_onebit", "derived", of_part(1, halved(1))),
    ("quantize_channels", "derived", of_part(0, halved(3))),
    ("quantize_channels", "derived", of_part(0, lambda x: x.float())),
    ("quantized_decode_attention", "output", halved(0)),
    ("quantized_decode_attention", "output", halved(1)),
    ("quantized_decode_attention", "value_cache", halved(2)),
    ("quantized_decode_attention", "query", lambda x: x[:, :3].contiguous()),
    ("quantized_decode_attention", "codes", of_part(3, halved(0))),
    ("quantized_decode_attention", "block_table", halved(0)),
    ("quantized_decode_attention", "block_table", strided),
    ("quantized_decode_attention", "block_table", lambda x: x[:, :1]),
    ("quantized_decode_attention", "seq_lens", lambda x: x + 10_000),
    ("quantized_decode_attention", "seq_lens", lambda x: x - 10_000),
    ("quantized_decode_attention", "tail_start", lambda x: x - 10_000),
    ("sparse_decode_attention", "seq_lens", lambda x: x - 301),
    ("log_mass", "seq_lens", lambda x: x - 10_000),
    ("quantized_decode_attention", "tail_start", lambda x: x + 9_984),
    ("quantized_decode_attention", "tail_start", halved(0)),
    ("log_mass", "mass", halved(1)),
    ("log_mass", "mass", wide),
    ("log_mass", "seq_lens", lambda x: x + 10_000),
    ("log_mass", "sink_tokens", number(-1)),
    ("log_mass", "sink_logits", lambda x: x.bfloat16()),
    ("quantized_decode_attention", "sink_logits", halved(0)),
    ("retrieve_onebit", "sink_logits", halved(0)),
    ("sparse_decode_attention", "sink_logits", lambda x: x[:, None]),
    ("attention_onebit", "sink_logits", wide),
    ("attention_channels", "sink_logits", strided),
    ("dense_preference", "sink_logits", halved(0)),
    ("score_onebit", "scores", halved(0)),
    ("score_onebit", "scores", halved(1)),
    ("score_onebit", "scores", halved(2)),
    ("score_onebit", "scores", strided),
    ("score_onebit", "query", halved(3)),
    ("score_onebit", "query", halved(1)),
    ("score_onebit", "query", lambda x: x[:, :, :0]),
    ("score_onebit", "offset", halved(2)),
    ("score_onebit", "index", of_part(0, halved(1))),
    ("score_onebit", "index", lambda parts: parts[:2]),
    ("score_onebit", "tail_start", lambda x: x + 10_000),
    ("score_onebit", "sink_tokens", number(2**31)),
    ("score_channels", "critical_channels", number(0)),
    ("score_channels", "critical_channels", number(SIZE + 1)),
    ("score_channels", "index", of_part(0, halved(0))),
    ("select_topk", "indices", halved(0)),
    ("select_topk", "indices", halved(1)),
    ("select_topk", "indices", strided),
    ("select_topk", "scores", strided),
    ("select_topk", "tail_start", lambda x: x + 10_000),
    ("propose_onebit", "indices", halved(1)),
    ("propose_onebit", "max_tail_start", number(10)),
    ("propose_onebit", "tail_start", lambda x: x + 10_000),
    ("propose_channels", "indices", halved(0)),
    ("rerank_topk", "candidates", halved(0)),
    ("rerank_topk", "candidates", halved(1)),
    ("rerank_topk", "indices", halved(0)),
    ("rerank_topk", "indices", wide),
    ("rerank_topk", "query", halved(2)),
    ("rerank_topk", "query", lambda x: x[:, :3].contiguous()),
    ("rerank_topk", "mass", halved(0)),
    ("rerank_topk", "channels", number(0)),
    ("rerank_topk", "channels", number(SIZE + 1)),
    ("retrieve_onebit", "indices", halved(1)),
    ("retrieve_onebit", "candidates", number(K - 1)),
    ("retrieve_onebit", "gathered_key", halved(0)),
    ("retrieve_onebit", "max_tail_start", number(10)),
    ("retrieve_channels", "index", of_part(0, halved(0))),
    ("retrieve_channels", "critical_channels", number(0)),
    ("sparse_decode_attention", "indices", halved(0)),
    ("sparse_decode_attention", "indices", halved(1)),
    ("sparse_decode_attention", "output", halved(2)),
    ("sparse_decode_attention", "value_cache", halved(1)),
    ("sparse_decode_attention", "tail_start", wide),
    ("attention_onebit", "output", halved(0)),
    ("attention_onebit", "output", strided),
    ("attention_onebit", "query", wide),
    ("attention_onebit", "index", lambda parts: parts[:2]),
    ("attention_onebit", "index", of_part(0, halved(1))),
    ("attention_onebit", "gathered_key", halved(0)),
    ("attention_onebit", "gathered_key", wide),
    ("attention_onebit", "value_cache", halved(0)),
    ("attention_onebit", "value_cache", halved(2)),
    ("attention_onebit", "block_table", lambda x: x[:, :1]),
    ("attention_onebit", "seq_lens", lambda x: x + 10_000),
    ("attention_onebit", "seq_lens", lambda x: x - 10_000),
    ("attention_onebit", "tail_start", lambda x: x + 10_000),
    ("attention_onebit", "tail_start", halved(0)),
    ("attention_onebit", "max_tail_start", number(10)),
    ("attention_onebit", "sink_tokens", number(-1)),
    ("attention_onebit", "topk", number(-1)),
    ("attention_onebit", "topk", number(2**31)),
    ("attention_onebit", "candidates", number(K - 1)),
    ("attention_onebit", "channels", number(SIZE + 1)),
    ("attention_channels", "index", of_part(0, halved(0))),
    ("attention_channels", "critical_channels", number(0)),
    ("dense_preference", "key", halved(2)),
    ("dense_preference", "key", lambda x: x[:, :0]),
    ("dense_preference", "query", lambda x: x[:0]),
    ("dense_preference", "alpha", number(0.0)),
]
LENGTHS_OF = (
    *("seq_lens", "tail_start", "max_tail_start", "scores", "block_table"),
    *("query_start", "query_lens"),
)
"""Arguments whose lengths are held against values, which fakes do not have."""


@pytest.mark.parametrize(
    ("case", "argument", "change"),
    BROKEN,
    ids=[f"{i}-{c}-{a}" for i, (c, a, _) in enumerate(BROKEN)],
)
def test_broken_argument(arguments, case, argument, change):
    values = arguments(case)
    values[argument] = change(values[argument])
    with pytest.raises(RuntimeError, match=f"vllm_tailorkv::{op_of(case)}: "):
        call(case, values)


@pytest.mark.parametrize(
    ("case", "argument", "change"),
    [case for case in BROKEN if case[1] not in LENGTHS_OF][::4],
)
def test_fakes_check_the_same(arguments, case, argument, change):
    """As do implementations in Python, which are checked by them."""
    values = arguments(case)
    values[argument] = change(values[argument])
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="vllm_tailorkv::"):

        def fake(value: Any) -> Any:
            if isinstance(value, list):
                return [fake(part) for part in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        call(case, {name: fake(value) for name, value in values.items()})


@pytest.mark.parametrize("case", OPS)
def test_meta_tensors(arguments, case):
    """All of them: only checked. Some: an error, where torch would check and do nothing."""
    values = arguments(case)
    names = [name for name, value in values.items() if isinstance(value, torch.Tensor)]

    def without_data(value: Any) -> Any:
        if isinstance(value, list):
            return [part.to("meta") for part in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    call(case, {name: without_data(value) for name, value in values.items()})
    for name in names:
        with pytest.raises(RuntimeError, match=f"vllm_tailorkv::{op_of(case)}: .* meta tensor"):
            call(case, values | {name: without_data(values[name])})


VALUES = [
    ("write_kv", "slot_mapping", lambda x: x + 10_000, "slot_mapping"),
    ("quantize_dense", "groups", lambda x: x + 10_000, "groups"),
    ("quantize_onebit", "groups", lambda x: x.index_fill(0, torch.tensor([1]), 9_999), "groups"),
    ("quantized_decode_attention", "block_table", lambda x: x + 1_000, "block_table"),
    ("log_mass", "block_table", lambda x: x - 1_000, "block_table"),
    ("score_onebit", "block_table", lambda x: x + 1_000, "block_table"),
    ("propose_channels", "block_table", lambda x: x + 1_000, "block_table"),
    ("rerank_topk", "candidates", lambda x: x + 10_000, "candidates"),
    ("rerank_topk", "candidates", lambda x: x.index_fill(2, torch.tensor([0]), -5), "candidates"),
    ("rerank_topk", "block_table", lambda x: x + 1_000, "candidates"),
    ("retrieve_onebit", "block_table", lambda x: x + 1_000, "block_table"),
    ("sparse_decode_attention", "indices", lambda x: x + 10_000, "indices"),
    ("attention_channels", "block_table", lambda x: x + 1_000, "block_table"),
]


@pytest.mark.parametrize(("case", "argument", "change", "word"), VALUES)
def test_values_under_the_debug_switch(monkeypatch, arguments, case, argument, change, word):
    values = arguments(case)
    values[argument] = change(values[argument])
    monkeypatch.setenv("VLLM_TAILORKV_CHECK_VALUES", "1")
    with pytest.raises(RuntimeError, match=f"vllm_tailorkv::{op_of(case)}: {word}"):
        call(case, values)


def test_axes_beyond_int32():
    """Kernels count in int32: a longer axis is refused, not cut."""
    scores = torch.zeros(1, 1, 1).expand(1, 1, 2**31)
    indices, tail = torch.zeros(1, 1, 4, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="scores must be"):
        library.OPS.select_topk(indices, scores, tail, 0)
