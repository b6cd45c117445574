"""Milliseconds against context."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Told apart by people with any colour vision, and in print.
COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")
_MARKERS = "osD^vP"
_THEIRS = "#333333"

Series = dict[str, list[tuple[int, float]]]


def save_plot(
    path: str, title: str, ylabel: str, ours: Series, theirs: Series, xlabel: str
) -> None:
    """A log-log picture, in the format of the path's suffix.

    Args:
        ours, theirs: (context, value) of each line by its name.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(ours.items()):
        color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color, label=name)
    for (name, points), style in zip(theirs.items(), ("--", ":"), strict=False):
        axes.plot(
            *zip(*points, strict=True), linestyle=style, marker="x", color=_THEIRS, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({context for line in (ours | theirs).values() for context, _ in line})
    axes.set_xticks(contexts, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in contexts])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def decode_name(record: dict[str, Any]) -> str:
    """The name of a case's line."""
    if record["layer"] == "dense":
        return f"dense, {record['bits']} bit"
    kept, candidates = record["selected"], int(record["selected"] * record["rerank"])
    return f"sparse, {record['index']}, {kept} of {candidates}, {record['query_reduce']}"


def lines_of(records: Sequence[dict[str, Any]], key: str, name: str | None = None) -> Series:
    """The values of `key` by case, or under one name as the median over the cases."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        if record[key] is not None:
            points = found.setdefault(name or decode_name(record), {})
            points.setdefault(record["context"], []).append(record[key])
    return {
        label: [(context, statistics.median(values)) for context, values in sorted(points.items())]
        for label, points in found.items()
    }


def save_decode_plot(path: str, records: Sequence[dict[str, Any]]) -> None:
    """Our cases and vLLM's attention."""
    first = records[0]
    isa = f", {first['isa']}" if first["isa"] else ""
    title = f"{first['shape']}, batch {first['batch']}, threads: {first['threads']}{isa}"
    theirs = lines_of(records, "baseline_ms", "vLLM")
    theirs |= lines_of(records, "fp8_baseline_ms", "vLLM, fp8")
    ours = lines_of(records, "ms")
    save_plot(path, title, "ms, one decode step of one layer", ours, theirs, "context, tokens")
