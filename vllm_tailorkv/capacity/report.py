"""What fits, as tables for a person and as JSON for a program."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_tailorkv.capacity.arithmetic import Fit
from vllm_tailorkv.capacity.cards import Card
from vllm_tailorkv.capacity.model import Model, Weights
from vllm_tailorkv.layout import GIB
from vllm_tailorkv.plan import HOST_SHARE, Plan

LIMITS = (
    "Limits of bandwidth, not measurements: kernels reach less of it. Device and PCIe are read one "
    "after the other, as the ops run. Not counted: computing, launches, exchange between workers, "
    "rows found in a cache, and vLLM's own limit of requests (--max-num-seqs)."
)


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f} GiB"


def _table(title: str, fits: Sequence[Fit]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for fit in fits:
        table.add_column(fit.name, justify="right", overflow="fold")
    return table


def print_report(
    console: Console,
    model: Model,
    plan: Plan,
    weights: Weights,
    fits: Sequence[Fit],
    cards: Sequence[Card],
    workers: int,
) -> None:
    """Print the model, what fits, what a decode step reads, and how long that takes at least.

    Args:
        fits: one for each kind of cache; the last one is ours.
        cards: whose times are told.
        workers: of the model.
    """
    _print_model(console, model, plan, weights, fits[-1], workers)
    console.print(_memory_table(plan, fits, workers))
    console.print(_reads_table(plan, fits))
    console.print(_steps_table(plan, fits))
    if cards:
        console.print(_cards_table(fits, cards))
        console.print(LIMITS, style="dim", highlight=False)


def _print_model(
    console: Console, model: Model, plan: Plan, weights: Weights, ours: Fit, workers: int
) -> None:
    shape, config, sizing = model.shape, plan.config, ours.sizing
    assert sizing is not None
    dense = ", ".join(map(str, sizing.dense_layers)) or "none"
    each = f"each of {workers} workers has {sizing.num_kv_heads} of them" if workers > 1 else ""
    table = weights.held - weights.read
    unread = f"; a decode step reads all but {table:,} bytes of embeddings" if table else ""
    lines = [
        f"[bold]{escape(shape.name)}[/]: {shape.num_layers} layers, {shape.num_kv_heads} KV heads "
        f"of {shape.head_size} channels{', ' + each if each else ''}; {model.dtype}; contexts up "
        f"to {model.longest:,} tokens",
        f"weights: {escape(weights.source)}{unread}",
        f"tailorkv: {len(sizing.sparse_layers)} sparse layers; dense layers ({config.bits} bit): "
        f"{dense}, from {escape(plan.layers.source)}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _memory_table(plan: Plan, fits: Sequence[Fit], workers: int) -> Table:
    each = ", on each worker" if workers > 1 else ""
    table = _table(f"What fits{each}", fits)
    memory = "device memory" if plan.on_gpu else "host memory"

    def row(title: str, cell: Callable[[Fit], str], style: str | None = None) -> None:
        cells = [cell(fit) for fit in fits]
        if any(cells):
            table.add_row(title, *cells, style=style)

    worker = fits[0].worker
    row(memory, lambda fit: _gib(fit.worker.memory))
    row(f"x {worker.utilization:g}, for vLLM", lambda fit: _gib(fit.worker.usable))
    row("- weights", lambda fit: _gib(fit.worker.weights))
    allowed = "activations, graphs" if plan.on_gpu else "activations, libraries"
    row(f"- {allowed} (allowed)", lambda fit: _gib(fit.worker.overhead))
    row("- prompts, staged", lambda fit: _gib(fit.staging) if fit.staging else "")
    row("- scores of the index", lambda fit: _gib(fit.scores) if fit.scores else "")
    row("- rows kept (hot_tokens)", lambda fit: _gib(fit.hot) if fit.hot else "")
    row("= for the cache", lambda fit: _gib(fit.cache))
    row("  in bytes", lambda fit: f"{fit.cache:,}")
    pool_of = "host_pool_gib"
    if plan.config.host_pool_gib is None:
        pool_of = f"{HOST_SHARE:.0%} of host memory"
    row(f"host pool ({pool_of})", lambda fit: _gib(fit.host_pool) if fit.host_pool else "")
    row("  in bytes", lambda fit: f"{fit.host_pool:,}" if fit.host_pool else "")
    table.add_section()
    # Where both tiers of a page lie in vLLM's pool.
    row("bytes a token: host tier", lambda fit: _joint_bytes(fit, host=True))
    row("+ derived tier", lambda fit: _joint_bytes(fit, host=False))
    row(f"bytes a token in {memory}", lambda fit: f"{fit.pool_block // fit.block_size:,}")
    in_pool = "bytes a token in the host pool"
    row(in_pool, lambda fit: f"{fit.host_block // fit.block_size:,}" if fit.host_block else "")
    row("x tokens a block", lambda fit: f"{fit.block_size}")
    row(f"blocks by {memory}", lambda fit: f"{fit.blocks_by_memory:,}")
    by_pool = "blocks by the host pool"
    row(by_pool, lambda fit: f"{fit.blocks_by_host_pool or 0:,}" if fit.host_pool else "")
    row("tokens, one block kept by vLLM", lambda fit: f"{fit.tokens:,}")
    row(f"blocks a {worker.context:,}-token request", lambda fit: f"{fit.blocks_of_request:,}")
    table.add_section()
    row("longest single context", _longest, "bold")
    row(f"requests of {worker.context:,} tokens", lambda fit: f"{fit.requests:,}", "bold")
    row("what binds", lambda fit: binding(plan, fit))
    return table


def _longest(fit: Fit) -> str:
    """The longest context, and whether it is the model that ends it."""
    ends = " (model's)" if fit.tokens > fit.worker.longest else ""
    return f"{fit.longest_context:,}{ends}"


def _joint_bytes(fit: Fit, *, host: bool) -> str:
    """Bytes of a token in one tier, if vLLM's pool has both."""
    if fit.sizing is None or fit.sizing.split:
        return ""
    block = fit.sizing.host_bytes if host else fit.sizing.derived_bytes
    return f"{block // fit.block_size:,}"


def binding(plan: Plan, fit: Fit) -> str:
    """Which budget bounds the blocks."""
    if fit.cache <= 0:
        return "weights do not fit"
    if fit.bound_by_host_pool:
        return "host pool"
    return "device memory" if plan.on_gpu else "host memory"


def _reads_table(plan: Plan, fits: Sequence[Fit]) -> Table:
    context = fits[0].worker.context
    table = Table(
        title=f"What a decode step reads of a request with {context:,} tokens",
        title_justify="left",
    )
    for title in ("", *(["from"] if plan.on_gpu else [])):
        table.add_column(title)
    table.add_column("layers x pieces x bytes", justify="right")
    table.add_column("bytes", justify="right")
    for fit in fits:
        table.add_row(fit.name, style="bold")
        for read in fit.reads:
            place = ["host" if read.from_host else "device"] if plan.on_gpu else []
            pieces = f"{read.layers} x {read.count:,} {read.unit} x {read.unit_bytes:,}"
            table.add_row(f"  {read.what}", *place, pieces, f"{read.num_bytes:,}")
    return table


def _batches(fit: Fit) -> list[int]:
    """The batches that are told of: one request, and as many as fit."""
    return sorted({1, fit.requests}) if fit.requests else []


def _steps_table(plan: Plan, fits: Sequence[Fit]) -> Table:
    titles = ["= in all"]
    if plan.on_gpu:
        titles = ["= device", "over PCIe"]
    table = Table(title="Bytes of a decode step", title_justify="left")
    table.add_column("cache")
    for title in ("requests", "weights", "+ their cache", *titles):
        table.add_column(title, justify="right")
    for fit in fits:
        if not fit.requests:
            table.add_row(fit.name, "none fits")
        for count in _batches(fit):
            device, host = fit.step_bytes(count)
            weights = fit.worker.step_weights
            cells = [weights, device - weights, device, host]
            if not plan.on_gpu:
                cells = [weights, device + host - weights, device + host]
            table.add_row(fit.name, f"{count:,}", *map(_gib, cells))
    return table


def _cards_table(fits: Sequence[Fit], cards: Sequence[Card]) -> Table:
    table = Table(title="The least time of a decode step, in ms", title_justify="left")
    table.add_column("cache")
    table.add_column("requests", justify="right")
    for card in cards:
        table.add_column(card.name, justify="right")
    table.add_row("memory, GB/s", "", *(f"{card.memory_gb_s:,}" for card in cards))
    table.add_row("PCIe, GB/s", "", *(f"{card.bus_gb_s}" for card in cards))
    table.add_section()
    for fit in fits:
        for count in _batches(fit):
            times = (f"{card.step_ms(*fit.step_bytes(count)):,.1f}" for card in cards)
            table.add_row(fit.name, f"{count:,}", *times)
    return table


def as_json(
    model: Model,
    plan: Plan,
    weights: Weights,
    fits: Sequence[Fit],
    cards: Sequence[Card],
    workers: int,
) -> dict[str, Any]:
    """The same, of JSON's types alone; bytes are of one worker."""
    return {
        "model": {
            **asdict(model.shape),
            "dtype": model.dtype,
            "longest_context": model.longest,
            "quantization": model.quantization,
            "weights_source": weights.source,
        },
        "plan": {
            "device": plan.device,
            "dense_layers": list(plan.layers.dense),
            "source": plan.layers.source,
            "config": plan.config.model_dump(mode="json"),
        },
        "workers": workers,
        "context": fits[0].worker.context,
        "caches": [_fit_as_json(plan, fit, cards) for fit in fits],
    }


def _fit_as_json(plan: Plan, fit: Fit, cards: Sequence[Card]) -> dict[str, Any]:
    worker = fit.worker
    steps = []
    for count in _batches(fit):
        device, host = fit.step_bytes(count)
        times = {card.name: card.step_ms(device, host) for card in cards}
        steps.append(
            {
                "requests": count,
                "pool_bytes": device,
                "host_bytes": host,
                "least_ms": times,
            }
        )
    return {
        "name": fit.name,
        "memory_bytes": worker.memory,
        "usable_bytes": worker.usable,
        "weights_bytes": worker.weights,
        "step_weights_bytes": worker.step_weights,
        "overhead_bytes": worker.overhead,
        "staging_bytes": fit.staging,
        "scores_bytes": fit.scores,
        "hot_bytes": fit.hot,
        "cache_bytes": fit.cache,
        "host_pool_bytes": fit.host_pool,
        "block_size": fit.block_size,
        "pool_bytes_per_token": fit.pool_block // fit.block_size,
        "host_bytes_per_token": fit.host_block // fit.block_size,
        "blocks": fit.blocks,
        "blocks_by_memory": fit.blocks_by_memory,
        "blocks_by_host_pool": fit.blocks_by_host_pool,
        "tokens": fit.tokens,
        "log": fit.sizing.describe(fit.blocks, worker.longest) if fit.sizing and fit.blocks else [],
        "longest_context": fit.longest_context,
        "requests": fit.requests,
        "binds": binding(plan, fit),
        "reads": [asdict(read) | {"num_bytes": read.num_bytes} for read in fit.reads],
        "steps": steps,
    }
