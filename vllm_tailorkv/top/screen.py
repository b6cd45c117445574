"""The screen: what a person reads of a server's figures."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vllm_tailorkv.top.figures import Guard, Spread, Traffic, layer_counts
from vllm_tailorkv.top.report import Report

_NONE = "-"
_KILO = 1000.0


def screen(report: Report) -> RenderableType:
    """All figures of a server."""
    return Group(
        _plan(report), Text(), _traffic(report.traffic), Text(), _waits(report), *_guard(report)
    )


def _plan(report: Report) -> RenderableType:
    plan = report.plan
    counts = layer_counts(plan)
    rows = _rows()
    rows.add_row(
        "plan",
        f"{counts['dense']} dense layers at {plan.get('bits', '?')} bit, {counts['sparse']} sparse "
        f"by {escape(plan.get('index', '?'))}; placement {escape(plan.get('placement', '?'))}",
    )
    rows.add_row(
        "",
        f"exact up to {_count(plan.get('exact_below'))} tokens, beyond "
        f"{_count(plan.get('budget_tokens'))} in a sparse layer",
    )
    return Group(Text(report.model or "vLLM", style="bold"), rows)


def _traffic(traffic: Traffic) -> RenderableType:
    rows = _rows()
    rows.add_row(
        "requests",
        f"{traffic.running:,} running, {traffic.waiting:,} waiting; blocks for "
        f"{traffic.held_tokens:,} tokens of context",
    )
    rows.add_row(
        "tokens/s",
        f"{traffic.prompt_tokens:,.0f} of prompts, [bold]{traffic.generated_tokens:,.1f}[/] "
        "generated",
    )
    rows.add_row(
        "attention",
        f"{traffic.tailored_steps:,.1f} tailored steps of requests a second, "
        f"{traffic.exact_tokens:,.0f} tokens/s in full",
    )
    context, chosen = traffic.context_tokens, traffic.retrieved_tokens
    if context is not None:
        words = f"{context:,.0f} tokens in context"
        if chosen is not None:
            words += f", a sparse layer chooses {chosen:,.0f} ({chosen / context:.1%})"
        rows.add_row("a step", words)
    if (read := traffic.read_share["all"]) is not None:
        kinds = ", ".join(
            f"{kind} layers {share:.1%}"
            for kind, share in traffic.read_share.items()
            if kind != "all" and share is not None
        )
        rows.add_row("", f"reads [bold]{read:.1%}[/] of the bytes of full attention: {kinds}")
    if traffic.hot_share is not None:
        rows.add_row("", f"finds {traffic.hot_share:.1%} of the rows it needs on the GPU")
    if traffic.accepted_share is not None:
        rows.add_row("drafts", f"[bold]{traffic.accepted_share:.1%}[/] of the tokens are accepted")
    tiers = _table("tier", "read/s", "written/s", "blocks used")
    for name, tier in traffic.tiers.items():
        share = f" ({tier.blocks_used / tier.blocks:.1%})" if tier.blocks else ""
        tiers.add_row(
            name,
            _bytes(tier.read),
            _bytes(tier.written),
            f"{tier.blocks_used:,} of {tier.blocks:,}{share}",
        )
    return Group(rows, Text(), tiers)


def _waits(report: Report) -> RenderableType:
    table = _table("seconds to", "median", "95%", "of", "ever: median", "95%", "of")
    recent, ever = report.recent, report.ever
    table.add_row("first token", *_spread(recent.first_token), *_spread(ever.first_token))
    table.add_row("next token", *_spread(recent.next_token), *_spread(ever.next_token))
    return table


def _guard(report: Report) -> list[RenderableType]:
    guard: Guard | None = report.guard
    if guard is None:
        return []
    table = _table("guard", "median", "95%", "of")
    table.add_row("error", *_spread(guard.error))
    table.add_row("lost mass", *_spread(guard.lost_mass))
    worst = f"largest error since the start: {guard.worst:.3g}, layer {guard.layer}"
    return [Text(), table, Text(worst)]


def _rows() -> Table:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", min_width=9)
    rows.add_column()
    return rows


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(first, min_width=11)
    for header in others:
        table.add_column(header, justify="right", min_width=8)
    return table


def _spread(spread: Spread) -> tuple[str, str, str]:
    p50, p95 = (_NONE if value is None else f"{value:.3g}" for value in (spread.p50, spread.p95))
    return p50, p95, f"{spread.count:,}"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < _KILO:
            return f"{number:.3g} {unit}"
        number /= _KILO
    return f"{number:.3g} GB"


def _count(label: str | None) -> str:
    return f"{int(label):,}" if label and label.isdigit() else "?"
