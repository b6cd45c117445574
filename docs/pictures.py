"""Draws README's picture from committed figures: `python docs/pictures.py`."""

import json
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks/results/decode_attention-zen4-2cores-2026-11-21.jsonl"
PICTURE = ROOT / "docs/step-against-context.png"
SPARSE, DENSE, THEIRS = "#0072b2", "#d55e00", "#333333"


def points(records: list[dict], key: str, **wanted: object) -> list[tuple[float, float]]:
    """(context in thousands of tokens, median over runs of `key` in ms), of the cases wanted."""
    found: dict[int, list[float]] = {}
    for record in records:
        if all(record[name] == value for name, value in wanted.items()):
            found.setdefault(record["context"], []).append(record[key])
    return [(context / 1024, statistics.median(ms)) for context, ms in sorted(found.items())]


def main() -> None:
    """Draw it."""
    records = [json.loads(line) for line in FIGURES.read_text().splitlines()]
    sparse = points(records, "ms", layer="sparse", index="onebit", rerank=4)
    # The last numbers: how far the name stands above the line's end, in points.
    lines = (
        ("vLLM's own attention", points(records, "baseline_ms"), THEIRS, 7),
        ("dense layer, 2 bits", points(records, "ms", layer="dense", bits=2), DENSE, 7),
        ("sparse layer, 192 tokens a step", sparse, SPARSE, -17),
    )
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, line, color, above in lines:
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=color)
        context, ms = line[-1]
        axes.annotate(
            f"{name}: {ms:.2g} ms",
            (context, ms),
            xytext=(-8, above),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    axes.set_xticks([1, 8, 32, 64, 128], ["1k", "8k", "32k", "64k", "128k"])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("ms of one decode step of one layer")
    axes.set_ylim(0, 46)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
