"""The guard: what it measures, which rows it looks at, and when it warns."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from selection import LENGTH, TAIL, make_layer, true_weights

from vllm_tailorkv.attention import guard as guards
from vllm_tailorkv.attention import meters
from vllm_tailorkv.attention.guard import Guard, GuardedRow, exact_attention, lost_mass
from vllm_tailorkv.attention.metadata import DecodeRows
from vllm_tailorkv.attention.selection import Layer, Pages, retrieve
from vllm_tailorkv.attention.workspace import Workspace
from vllm_tailorkv.cache.views import derived_pages, host_pages
from vllm_tailorkv.config import load_config
from vllm_tailorkv.kernels import ops
from vllm_tailorkv.kernels.reference import weigh
from vllm_tailorkv.layout import DerivedKind, PageLayout

NAME = "model.layers.5.self_attn.attn"
SINKS = torch.tensor([3.0, -1e30, 0.0, 1.0, 8.0, -2.0])
ONEBIT = PageLayout(DerivedKind.ONEBIT, 2, 64, 128, 64, 1, 4)
DENSE = PageLayout(DerivedKind.DENSE, 2, 64, 128, 64, 2, 4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(meters.FOLDER, raising=False)
    monkeypatch.setattr(Guard, "warned", -guards._WARNING_SECONDS)
    meters._meter.cache_clear()
    meters._file.cache_clear()
    yield


def make_guard(layout: PageLayout = ONEBIT, **options: Any) -> Guard:
    return Guard(layout, load_config({"guard_share": 1, **options}), [NAME])


class Seen(Guard):
    """A guard that keeps what it is told."""

    def saw(self, layer_name: str, error: float, lost: float | None) -> None:
        self.last = (layer_name, error, lost)


def look(layer: Layer, rows: DecodeRows, query: torch.Tensor) -> tuple[str, float, Any]:
    """What the guard says of the sparse step of a layer."""
    seen = Seen(ONEBIT, load_config({"guard_share": 1}), [NAME])
    output = torch.empty_like(query)
    ops.sparse_decode_attention(
        output,
        query,
        layer.pages.host.key,
        layer.pages.host.value,
        retrieve(query, layer, rows),
        rows.block_table,
        rows.seq_lens,
        rows.tail_start,
        sink_tokens=layer.config.sink_tokens,
        scale=layer.scale,
        softcap=layer.softcap,
        sink_logits=layer.sink_logits,
    )
    GuardedRow(seen, 0).look(NAME, layer, query, output, rows, retrieve)
    return seen.last


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_nothing_is_lost_where_everything_is_selected(sinks: torch.Tensor | None) -> None:
    layer, rows, _, query = make_layer(topk_tokens=TAIL)
    layer = layer._replace(sink_logits=sinks)
    name, error, lost = look(layer, rows, query)
    assert name == NAME
    assert error < 1e-6
    assert lost < 1e-6


def test_one_token_is_not_enough() -> None:
    layer, rows, key, query = make_layer(topk_tokens=1)
    _, error, lost = look(layer, rows, query)
    assert error > 0.05
    indices = retrieve(query, layer, rows)
    weights = true_weights(key, query)
    kept = sum(float(weights[head, int(indices[0, head, 0]) - 8]) for head in range(2))
    assert lost == pytest.approx((float(weights.sum()) - kept) / query.shape[1], abs=1e-5)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_lost_mass_of_given_tokens(softcap: float, sinks: torch.Tensor | None) -> None:
    layer, rows, key, query = make_layer(topk_tokens=4)
    layer = layer._replace(softcap=softcap, sink_logits=sinks)
    indices = torch.tensor([[[8, 100, 439, -1], [9, -1, -1, -1]]], dtype=torch.int32)
    grouped = query[0].unflatten(0, (2, -1))
    scores = torch.einsum("hgd,hnd->hgn", grouped, key) * layer.scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    weights = weigh(scores, sinks)
    read = torch.zeros(2, 1, LENGTH, dtype=torch.bool)
    read[..., :8] = read[..., TAIL:] = True
    read[0, 0, [8, 100, 439]] = read[1, 0, 9] = True
    expected = float((weights * ~read).sum(-1).mean())
    assert lost_mass(query, indices, layer, rows) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_exact_attention(sinks: torch.Tensor | None) -> None:
    layer, rows, key, query = make_layer()
    layer = layer._replace(sink_logits=sinks)
    value = layer.pages.host.value[rows.block_table[0].long()].transpose(0, 1).flatten(1, 2)
    grouped = query[0].unflatten(0, (2, -1))
    weights = weigh(torch.einsum("hgd,hnd->hgn", grouped, key) * layer.scale, sinks)
    expected = torch.einsum("hgn,hnd->hgd", weights, value[:, :LENGTH]).flatten(0, 1)
    torch.testing.assert_close(exact_attention(query, layer, rows)[0], expected)


def test_dense_layers_lose_by_their_codes() -> None:
    sparse, rows, _, query = make_layer()
    raw = torch.zeros(5, DENSE.host_bytes + DENSE.derived_bytes, dtype=torch.uint8)
    host = host_pages(raw[:, : DENSE.host_bytes], DENSE, torch.float32)
    derived = derived_pages(raw[:, DENSE.host_bytes :], DENSE, torch.float32)
    blocks = rows.block_table[0].long()
    host.key[blocks], host.value[blocks] = (
        page[blocks].nan_to_num() for page in (sparse.pages.host.key, sparse.pages.host.value)
    )
    ops.quantize_groups(torch.tensor([6, 7, 0, 1, 8, 9]), host.key, host.value, derived)
    layer = Layer(
        Pages(host, derived), sparse.config, sparse.scale, 0.0, Workspace(torch.device("cpu"))
    )
    errors = []
    for start in (0, 384):
        tails = torch.tensor([start], dtype=torch.int32)
        part = DecodeRows(slice(0, 1), rows.seq_lens, rows.block_table, tails, start)
        output = torch.empty_like(query)
        ops.quantized_decode_attention(
            output,
            query,
            host.key,
            host.value,
            derived,
            part.block_table,
            part.seq_lens,
            tails,
            scale=layer.scale,
        )
        seen = Seen(DENSE, load_config({"guard_share": 1}), [NAME])
        GuardedRow(seen, 0).look(NAME, layer, query, output, part, retrieve)
        assert seen.last[2] is None
        errors.append(seen.last[1])
    assert errors[0] < 1e-6
    assert 0.05 < errors[1] < 1


def some_rows(count: int) -> DecodeRows:
    lengths = torch.full((count,), 700, dtype=torch.int32)
    return DecodeRows(slice(0, count), lengths, torch.zeros(count, 6), lengths, 700)


@pytest.mark.parametrize(("share", "every"), [(1, 1), (0.5, 2), (0.1, 10), (0.03, 33)])
def test_steps_are_evenly_spaced(share: float, every: int) -> None:
    guard = make_guard(guard_share=share)
    assert guard.next(None) is None
    looked = [guard.next(some_rows(1)) is not None for _ in range(100)]
    assert [i + 1 for i, one in enumerate(looked) if one] == list(range(every, 101, every))


def test_rows_take_turns() -> None:
    guard = make_guard()
    rows = [guard.next(some_rows(3)) for _ in range(7)]
    assert [row.row for row in rows if row is not None] == [1, 2, 0, 1, 2, 0, 1]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    def warn(message: str, *values: object) -> None:
        said.append(message % values)

    monkeypatch.setattr(guards.logger, "warning", warn)
    return said


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(guards.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def test_warned_once_a_minute(warnings: list[str], clock: Callable[[float], None]) -> None:
    sparse, dense = make_guard(guard_bound=0.2), make_guard(DENSE, guard_bound=0.2)
    for error in (0.1, 0.2):
        sparse.saw(NAME, error, 0.0)
        sparse.next(some_rows(1))
    assert warnings == []
    for error in (0.25, 0.75, 0.3):
        sparse.saw(NAME, error, 0.0)
    for _ in range(3):
        sparse.next(some_rows(1))
    assert len(warnings) == 1
    assert "sparse layer 5 was off by 0.75" in warnings[0]
    assert "guard_bound=0.2" in warnings[0]
    assert "raise topk_tokens" in warnings[0]
    dense.saw(NAME, float("nan"), None)
    dense.next(some_rows(1))
    assert len(warnings) == 1, "one of both kinds"
    clock(61)
    dense.next(some_rows(1))
    assert "dense layer 5 was off by 10.00" in warnings[1]
    assert "raise bits" in warnings[1]
