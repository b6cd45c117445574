"""Tables, JSON and a picture of what the harness found."""

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from accuracy.attention_level import LayerQuality
from accuracy.evaluate import Score
from accuracy.methods import FULL, Method
from accuracy.text_quality import Likelihood

COUNTS_FROM = 0.9
"""A task counts where full attention reaches this score: else it tells nothing of a method."""


@dataclass
class Report:
    """Everything measured in a run."""

    arguments: dict[str, Any]
    methods: list[Method]
    scores: list[Score] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    layers: list[LayerQuality] = field(default_factory=list)
    bytes_per_token: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def score(self, method: str, task: str, length: int) -> float | None:
        """The mean of one cell, None if it was not run."""
        for score in self.scores:
            if (score.method, score.task, score.length) == (method, task, length):
                return score.mean
        return None

    def counting(self, length: int) -> list[str]:
        """The tasks that the model solves with full attention at this length."""
        return [
            score.task
            for score in self.scores
            if score.method == FULL and score.length == length and score.mean >= COUNTS_FROM
        ]

    def share_of_full(self, method: str, length: int) -> float | None:
        """The mean over the tasks that count, as a share of full attention's."""
        tasks = self.counting(length)
        ours = [self.score(method, task, length) for task in tasks]
        if not tasks or None in ours:
            return None
        full = [self.score(FULL, task, length) or 0.0 for task in tasks]
        return sum(x or 0.0 for x in ours) / sum(full)

    def as_json(self) -> dict[str, Any]:
        """What is written to a file: plain values."""
        lengths = sorted({score.length for score in self.scores})
        return {
            "revision": _revision(),
            "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
            "python": platform.python_version(),
            "machine": platform.machine(),
            "arguments": self.arguments,
            "methods": [
                {
                    "name": method.name,
                    "policy": method.policy,
                    "config": method.config.model_dump(mode="json") if method.config else None,
                    "bytes_per_token": self.bytes_per_token.get(method.name),
                    "seconds": self.seconds.get(method.name),
                    "share_of_full": {n: self.share_of_full(method.name, n) for n in lengths},
                }
                for method in self.methods
            ],
            "counting_tasks": {length: self.counting(length) for length in lengths},
            "scores": [asdict(score) | {"mean": score.mean} for score in self.scores],
            "likelihoods": [asdict(x) | {"mean": x.mean} for x in self.likelihoods],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def print(self, console: Console) -> None:
        """Tables: tasks by method for each length, text, layers."""
        for length in sorted({score.length for score in self.scores}):
            self._print_tasks(console, length)
        if self.likelihoods:
            table = Table("method", "nats a token", "against full", title="Held-out text")
            full = next((x.mean for x in self.likelihoods if x.method == FULL), None)
            for likelihood in self.likelihoods:
                against = "" if full is None else f"{likelihood.mean - full:+.4f}"
                table.add_row(likelihood.method, f"{-likelihood.mean:.4f}", against)
            console.print(table)
        if self.layers:
            table = Table(
                "method", "layer", "recall", "mass", "error", title="Attention of sparse layers"
            )
            for q in self.layers:
                table.add_row(
                    q.method, str(q.layer), f"{q.recall:.1%}", f"{q.mass:.1%}", f"{q.error:.2%}"
                )
            console.print(table)

    def _print_tasks(self, console: Console, length: int) -> None:
        tasks = list(dict.fromkeys(s.task for s in self.scores if s.length == length))
        counting = self.counting(length)
        table = Table("method", "budget", title=f"{length:,} tokens; in bold the tasks that count")
        for task in tasks:
            name = task.replace("_", "\n")
            table.add_column(f"[bold]{name}[/]" if task in counting else f"[dim]{name}[/]")
        table.add_column("of full")
        for method in self.methods:
            cells = [self.score(method.name, task, length) for task in tasks]
            if all(cell is None for cell in cells):
                continue
            share = self.share_of_full(method.name, length)
            budget = "" if method.config is None else str(method.config.budget_tokens)
            table.add_row(
                method.name,
                budget,
                *("" if cell is None else f"{100 * cell:.0f}" for cell in cells),
                "" if share is None else f"{share:.1%}",
            )
        console.print(table)

    def plot(self, path: Path) -> None:
        """Bars of the share of full attention's score, and likelihood along the text."""
        lengths = sorted({score.length for score in self.scores})
        panels = bool(lengths) + bool(self.likelihoods)
        if not panels:
            return
        names = [method.name for method in self.methods]
        height = max(3.0, 0.32 * len(names) + 1.2)
        figure, axes = plt.subplots(1, panels, figsize=(8 * panels, height), squeeze=False)
        remaining = list(axes[0])
        if lengths:
            self._plot_shares(remaining.pop(0), names, lengths)
        if self.likelihoods:
            axis = remaining.pop(0)
            for x in self.likelihoods:
                steps = [(i + 1) * x.stretch for i in range(len(x.values))]
                axis.plot(steps, [-value for value in x.values], label=x.method, linewidth=1)
            axis.set_xlabel("decode step")
            axis.set_ylabel("nats a token (less is better)")
            axis.set_title("Held-out text")
            axis.legend(fontsize="x-small")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)

    def _plot_shares(self, axis: Any, names: Sequence[str], lengths: Sequence[int]) -> None:
        thickness = 0.8 / len(lengths)
        for i, length in enumerate(lengths):
            shares = [self.share_of_full(name, length) for name in names]
            places = [row + (i - (len(lengths) - 1) / 2) * thickness for row in range(len(names))]
            bars = axis.barh(
                places, [100 * (x or 0.0) for x in shares], thickness, label=f"{length:,} tokens"
            )
            axis.bar_label(bars, ["" if x is None else f"{x:.1%}" for x in shares], fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 112)
        axis.set_xlabel("% of full attention's score, tasks that count")
        axis.legend(fontsize="x-small", loc="lower left")


def write_json(report: Report, path: Path) -> None:
    """One object, indented."""
    path.write_text(json.dumps(report.as_json(), indent=1) + "\n")


def _revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
