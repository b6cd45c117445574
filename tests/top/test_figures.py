"""Figures of recorded scrapes, worked out by hand, and of made-up ones."""

import inspect
import math

import pytest
import vllm.v1.spec_decode.metrics

from vllm_tailorkv.attention.metrics import METRICS
from vllm_tailorkv.attention.report import METRIC
from vllm_tailorkv.top import figures
from vllm_tailorkv.top.figures import Spread, guard, latencies, quantile, spread, traffic
from vllm_tailorkv.top.scrape import Scrape, parse

SECONDS = 1795769260.808815 - 1795769253.6786892
INF = float("inf")


def test_requests_and_tokens(before: Scrape, after: Scrape) -> None:
    found = traffic(before, after)
    assert (found.running, found.waiting) == (2, 0)
    assert found.held_tokens == 34 * 128
    assert found.prompt_tokens == 0
    assert found.generated_tokens == pytest.approx((352 - 54) / SECONDS)


def test_steps_count_once_and_not_for_each_layer(before: Scrape, after: Scrape) -> None:
    found = traffic(before, after)
    assert found.tailored_steps == pytest.approx((292 - 36) / SECONDS)
    assert found.exact_tokens == pytest.approx((4122 - 4081) / SECONDS)
    assert found.context_tokens == pytest.approx((1065654 - 129078) / (292 - 36))
    assert found.retrieved_tokens == 448


def test_tiers(before: Scrape, after: Scrape) -> None:
    tiers = traffic(before, after).tiers
    decode, exact, derive = 35824128 - 4465152, 13539840 - 8816640, 3293184 - 3096576
    decode += 5286415104 - 656868096
    exact += 392655360 - 255682560
    derive += 47038464 - 44187648
    assert tiers["host"].read == pytest.approx((decode + exact + derive) / SECONDS)
    assert tiers["host"].written == pytest.approx(
        (3389952 + 98308608 - 3161856 - 91693824) / SECONDS
    )
    assert tiers["derived"].read == pytest.approx(
        (122280960 + 910924800 - 14791680 - 110246400) / SECONDS
    )
    assert (tiers["host"].blocks_used, tiers["derived"].blocks) == (34, 348)


def test_what_is_read_is_weighed_against_full_attention(before: Scrape, after: Scrape) -> None:
    share = traffic(before, after).read_share
    # Three KV heads of 64 values of two bytes, K and V.
    token = 2 * 3 * 64 * 2
    read = 35824128 - 4465152 + 122280960 - 14791680
    assert share["dense"] == pytest.approx(read / ((1065654 - 129078) * token))
    read = 5286415104 - 656868096 + 910924800 - 110246400
    assert share["sparse"] == pytest.approx(read / ((30903966 - 3743262) * token))
    assert share["all"] is not None
    assert share["dense"] < share["all"] < share["sparse"]


def test_k_that_is_kept_twice_is_weighed_once() -> None:
    """One dense layer writes K and V, one sparse layer K once more."""
    plan = {"dense_layers": "0", "sparse_layers": "1"}
    plan |= {"full_bytes_per_token": "200", "host_bytes_per_token": "250"}

    def said(rows: int) -> Scrape:
        return Scrape(
            rows,
            {
                figures.PLAN: ((plan, 1.0),),
                figures.DECODE_ROWS: (({"layers": "dense"}, rows), ({"layers": "sparse"}, rows)),
                figures.CONTEXT_TOKENS: (
                    ({"layers": "dense"}, 10 * rows),
                    ({"layers": "sparse"}, 10 * rows),
                ),
                # Of two workers.
                figures.HOST_WRITTEN: (
                    ({"layers": "dense"}, 200 * rows),
                    ({"layers": "sparse"}, 300 * rows),
                ),
                figures.HOST_READ: (({"layers": "sparse", "by": "decode"}, 500 * rows),),
            },
        )

    share = traffic(said(1), said(3)).read_share
    assert share == {"dense": 0, "sparse": 500 / 2000, "all": 500 / 4000}


def test_an_idle_server_has_no_means(after: Scrape) -> None:
    later = Scrape(after.time + 2, after.samples)
    found = traffic(after, later)
    assert found.context_tokens is None
    assert found.retrieved_tokens is None
    assert found.hot_share is None
    assert found.accepted_share is None
    assert set(found.read_share.values()) == {None}
    assert found.tailored_steps == 0
    assert spread(after, later, figures.NEXT_TOKEN) == Spread(0, None, None)


def test_drafts() -> None:
    """Of the last interval alone."""

    def said(drafted: int, accepted: int) -> Scrape:
        counts = {figures.DRAFTED_TOKENS: drafted, figures.ACCEPTED_TOKENS: accepted}
        return Scrape(drafted, {name: (({}, count),) for name, count in counts.items()})

    assert traffic(said(4, 0), said(24, 15)).accepted_share == 0.75


def test_latencies(before: Scrape, after: Scrape) -> None:
    recent, ever = latencies(before, after), latencies(Scrape(0.0), after)
    assert (recent.first_token.count, ever.first_token.count) == (0, 3)
    assert (recent.next_token.count, ever.next_token.count) == (298, 349)
    # 48 of 298 within 0.05 s, 282 within 0.075: the 149th is so far between.
    assert recent.next_token.p50 == pytest.approx(0.05 + 0.025 * (149 - 48) / (282 - 48))
    # All three within 2.5 s, none within one.
    assert ever.first_token.p50 == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("counts", "share", "value"),
    [
        ({}, 0.5, None),
        ({1.0: 0, INF: 0}, 0.5, None),
        ({1.0: 4, 2.0: 4, INF: 4}, 0.5, 0.5),
        ({1.0: 2, 2.0: 4, INF: 4}, 0.75, 1.5),
        ({1.0: 0, 2.0: 1, INF: 4}, 0.95, 2.0),
        ({1.0: 0, 2.0: 0, INF: 4}, 0.5, 2.0),
    ],
)
def test_quantile(counts: dict[float, float], share: float, value: float | None) -> None:
    assert quantile(counts, share) == value


def test_guard(before: Scrape, after: Scrape) -> None:
    found = guard(before, after)
    assert found is not None
    assert found.layer == "0 (dense)"
    assert found.worst == pytest.approx(0.2556, abs=1e-4)
    assert found.error.count > found.lost_mass.count > 0
    assert found.lost_mass.p50 is not None and 0 < found.lost_mass.p50 < 0.1


def test_no_guard_no_figures(after: Scrape) -> None:
    samples = {name: said for name, said in after.samples.items() if "guard" not in name}
    assert guard(Scrape(0.0), Scrape(1.0, samples)) is None


def test_engines_and_processes_are_summed() -> None:
    scrape = parse(
        'vllm:num_requests_running{engine="0"} 2\nvllm:num_requests_running{engine="1"} 3\n', 0
    )
    assert scrape.total(figures.RUNNING) == 5
    assert scrape.total(figures.RUNNING, engine="1") == 3
    assert scrape.total(figures.WAITING) == 0
    assert math.isclose(traffic(Scrape(-1.0), scrape).running, 5)


def test_every_name_is_told_by_a_server(after: Scrape) -> None:
    ours = {metric.shown for metric in METRICS} | {METRIC}
    named = {name: value for name, value in vars(figures).items() if name.isupper()}
    names = [value for value in named.values() if isinstance(value, str)]
    assert len(names) > 20
    for name in names:
        if name in figures.OF_DRAFTS:
            # A server tells them where something drafts; this one did not.
            spelled = name.removesuffix("_total")
            assert spelled in inspect.getsource(vllm.v1.spec_decode.metrics)
        elif name.startswith("vllm:"):
            assert name in after.samples or f"{name}_bucket" in after.samples, name
        else:
            assert name in ours
