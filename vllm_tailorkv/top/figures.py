"""From two scrapes of `/metrics` to what a person wants to know. Pure functions.

Values that nothing was counted for are None.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_tailorkv.top.scrape import Scrape

PLAN = "tailorkv_plan_info"
DECODE_ROWS = "tailorkv_decode_rows_total"
EXACT_ROWS = "tailorkv_exact_rows_total"
CONTEXT_TOKENS = "tailorkv_context_tokens_total"
SELECTED_TOKENS = "tailorkv_selected_tokens_total"
HOST_READ = "tailorkv_host_read_bytes_total"
HOST_WRITTEN = "tailorkv_host_written_bytes_total"
DERIVED_READ = "tailorkv_derived_read_bytes_total"
DERIVED_WRITTEN = "tailorkv_derived_written_bytes_total"
HOT_ROWS = "tailorkv_hot_rows_total"
CACHE_BLOCKS = "tailorkv_cache_blocks"
CACHE_BLOCKS_USED = "tailorkv_cache_blocks_used"
GUARD_ERROR = "tailorkv_guard_error"
GUARD_LOST_MASS = "tailorkv_guard_lost_mass"
GUARD_WORST_ERROR = "tailorkv_guard_worst_error"

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
GENERATED_TOKENS = "vllm:generation_tokens_total"
FIRST_TOKEN = "vllm:time_to_first_token_seconds"
NEXT_TOKEN = "vllm:inter_token_latency_seconds"
CACHE_CONFIG = "vllm:cache_config_info"
DRAFTED_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED_TOKENS = "vllm:spec_decode_num_accepted_tokens_total"
OF_DRAFTS = (DRAFTED_TOKENS, ACCEPTED_TOKENS)
"""What a server tells only where something drafts."""

KINDS = ("dense", "sparse")


@dataclass(frozen=True)
class Spread:
    """Values of a histogram: how many, the median, and what 95 of 100 do not exceed."""

    count: int
    p50: float | None
    p95: float | None


@dataclass(frozen=True)
class Tier:
    """Bytes a second, and blocks."""

    read: float
    written: float
    blocks_used: int
    blocks: int


@dataclass(frozen=True)
class Traffic:
    """What went on between two scrapes.

    Args:
        running, waiting: requests, now.
        held_tokens: room in the blocks of requests, now.
        prompt_tokens, generated_tokens: a second.
        tailored_steps: of requests, a second, whose context was not attended in full.
        exact_tokens: query tokens a second that were attended in full.
        context_tokens: of a tailored step, mean.
        retrieved_tokens: of it, what a sparse layer chose and read exactly, mean.
        read_share: bytes that tailored steps read, of both tiers, over what attention in full reads
            of K and V; for each kind of layer, and of `all`.
        hot_share: of the rows of K and V that a GPU needed, those it had.
        accepted_share: of the tokens that were drafted, those that were right.
        tiers: `host` and `derived`.
    """

    running: int
    waiting: int
    held_tokens: int
    prompt_tokens: float
    generated_tokens: float
    tailored_steps: float
    exact_tokens: float
    context_tokens: float | None
    retrieved_tokens: float | None
    read_share: dict[str, float | None]
    hot_share: float | None
    accepted_share: float | None
    tiers: dict[str, Tier]


@dataclass(frozen=True)
class Latencies:
    """Seconds that clients waited."""

    first_token: Spread
    next_token: Spread


@dataclass(frozen=True)
class Guard:
    """What guarded rows lost; `worst` is the largest error since the start, of layer `layer`."""

    error: Spread
    lost_mass: Spread
    worst: float
    layer: str


def traffic(before: Scrape, now: Scrape) -> Traffic:
    """What a server did from one scrape to a later one of the same server."""
    seconds = now.time - before.time

    def grown(name: str, **labels: str) -> float:
        return now.total(name, **labels) - before.total(name, **labels)

    def rate(name: str, **labels: str) -> float:
        return grown(name, **labels) / seconds

    layers = sum(layer_counts(now.labels(PLAN)).values())
    used = {tier: int(now.total(CACHE_BLOCKS_USED, tier=tier)) for tier in ("host", "derived")}
    blocks = {tier: int(now.total(CACHE_BLOCKS, tier=tier)) for tier in used}
    block_size = int(now.labels(CACHE_CONFIG).get("block_size", 0))
    return Traffic(
        running=int(now.total(RUNNING)),
        waiting=int(now.total(WAITING)),
        held_tokens=used["host"] * block_size,
        prompt_tokens=rate(PROMPT_TOKENS),
        generated_tokens=rate(GENERATED_TOKENS),
        tailored_steps=rate(DECODE_ROWS) / layers if layers else 0.0,
        exact_tokens=rate(EXACT_ROWS) / layers if layers else 0.0,
        context_tokens=_share(grown(CONTEXT_TOKENS), grown(DECODE_ROWS)),
        retrieved_tokens=_share(grown(SELECTED_TOKENS), grown(DECODE_ROWS, layers="sparse")),
        read_share=_read_share(before, now),
        hot_share=_share(grown(HOT_ROWS, were="found"), grown(HOT_ROWS)),
        accepted_share=_share(grown(ACCEPTED_TOKENS), grown(DRAFTED_TOKENS)),
        tiers={
            "host": Tier(rate(HOST_READ), rate(HOST_WRITTEN), used["host"], blocks["host"]),
            "derived": Tier(
                rate(DERIVED_READ), rate(DERIVED_WRITTEN), used["derived"], blocks["derived"]
            ),
        },
    )


def layer_counts(plan: Mapping[str, str]) -> dict[str, int]:
    """How many layers are of each kind, by the labels of the plan."""
    listed = {kind: plan.get(f"{kind}_layers", "") for kind in KINDS}
    return {kind: len(layers.split(",")) if layers else 0 for kind, layers in listed.items()}


def latencies(before: Scrape, now: Scrape) -> Latencies:
    """What clients waited for between two scrapes; since the start, if the first is empty."""
    return Latencies(spread(before, now, FIRST_TOKEN), spread(before, now, NEXT_TOKEN))


def guard(before: Scrape, now: Scrape) -> Guard | None:
    """What was lost between two scrapes; None if no row was ever guarded."""
    worst = max(now.of(GUARD_WORST_ERROR), key=lambda sample: sample[1], default=None)
    if worst is None or not now.total(GUARD_ERROR + "_bucket", le="+Inf"):
        return None
    labels, error = worst
    return Guard(
        spread(before, now, GUARD_ERROR),
        spread(before, now, GUARD_LOST_MASS),
        error,
        f"{labels.get('layer', '?')} ({labels.get('layers', '?')})",
    )


def spread(before: Scrape, now: Scrape, name: str) -> Spread:
    """Of the values that a histogram saw between two scrapes."""
    earlier = before.buckets(name)
    counts = {bound: n - earlier.get(bound, 0.0) for bound, n in now.buckets(name).items()}
    count = int(max(counts.values(), default=0))
    return Spread(count, quantile(counts, 0.5), quantile(counts, 0.95))


def quantile(counts: Mapping[float, float], share: float) -> float | None:
    """The value that `share` of all do not exceed, by a line within its bucket.

    Args:
        counts: how many values are at most each bound, in the order of the bounds. Beyond the last
            finite bound, that bound is returned.
    """
    wanted = share * max(counts.values(), default=0.0)
    if not wanted:
        return None
    low = below = 0.0
    for bound, count in counts.items():
        if count >= wanted:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


def _read_share(before: Scrape, now: Scrape) -> dict[str, float | None]:
    plan, rows = now.labels(PLAN), now.total(DECODE_ROWS) + now.total(EXACT_ROWS)
    full, host = (float(plan.get(f"{what}_bytes_per_token") or 0) for what in ("full", "host"))
    # Bytes of K and V of a token in a layer, of all workers together: each has written its heads,
    # and K once more where it is kept so.
    token = now.total(HOST_WRITTEN) / rows * full / host if rows and host else 0.0
    read, needed = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for kind in KINDS:
        for sign, scrape in ((1, now), (-1, before)):
            read[kind] += sign * scrape.total(HOST_READ, layers=kind, by="decode")
            read[kind] += sign * scrape.total(DERIVED_READ, layers=kind)
            needed[kind] += sign * scrape.total(CONTEXT_TOKENS, layers=kind) * token
    shares = {kind: _share(read[kind], needed[kind]) for kind in KINDS}
    return shares | {"all": _share(sum(read.values()), sum(needed.values()))}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
