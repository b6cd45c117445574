"""Tables, JSON and a picture of what the harness found."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from provenance import revision, versions
from rich.console import Console
from rich.table import Table

from accuracy.attention_level import LayerQuality
from accuracy.evaluate import GIVEN, Cell, Score
from accuracy.methods import FULL, Method
from accuracy.text_quality import Likelihood

COUNTS_FROM = 0.9
"""A task counts where full attention reaches this score: else it tells nothing of a method."""


_BUDGET = ("budget=", "recent_tokens=", "topk_tokens=")
Group = tuple[int, str]
"""A length, and who writes the answers: what a table is of."""


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

    @property
    def groups(self) -> list[Group]:
        """In order of length."""
        return sorted({(score.length, score.answers) for score in self.scores})

    def of_group(self, group: Group) -> dict[tuple[str, str], float]:
        """Means by method and task."""
        return {(x.method, x.task): x.mean for x in self.scores if (x.length, x.answers) == group}

    def counting(self, group: Group) -> list[str]:
        """The tasks that the model solves with full attention."""
        cells = self.of_group(group)
        return [task for (m, task), mean in cells.items() if m == FULL and mean >= COUNTS_FROM]

    def counts(self, cell: Cell) -> bool:
        """Full attention has solved it."""
        return cell.task in self.counting((cell.length, cell.answers))

    def share_of_full(self, method: str, group: Group) -> float | None:
        """The mean over the tasks that count, as a share of full attention's."""
        cells, tasks = self.of_group(group), self.counting(group)
        if not tasks or any((method, task) not in cells for task in tasks):
            return None
        return sum(cells[method, t] for t in tasks) / sum(cells[FULL, t] for t in tasks)

    def worst_task(self, method: str, group: Group) -> float | None:
        """The lowest share of full attention's score among the tasks that count."""
        cells, tasks = self.of_group(group), self.counting(group)
        if not tasks or any((method, task) not in cells for task in tasks):
            return None
        return min(cells[method, t] / cells[FULL, t] for t in tasks)

    def as_json(self) -> dict[str, Any]:
        """What is written to a file: plain values."""
        groups = self.groups
        return {
            "revision": revision(),
            "versions": versions(),
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
                    "share_of_full": {_name(g): self.share_of_full(method.name, g) for g in groups},
                    "worst_task": {_name(g): self.worst_task(method.name, g) for g in groups},
                }
                for method in self.methods
            ],
            "counting_tasks": {_name(g): self.counting(g) for g in groups},
            "scores": [asdict(score) | {"mean": score.mean} for score in self.scores],
            "likelihoods": [asdict(x) | {"mean": x.mean} for x in self.likelihoods],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def print(self, console: Console) -> None:
        """Tables: tasks by method for each length, text, layers."""
        for group in self.groups:
            self._print_tasks(console, group)
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

    def _print_tasks(self, console: Console, group: Group) -> None:
        cells, counting = self.of_group(group), self.counting(group)
        tasks = list(dict.fromkeys(task for _, task in cells))
        title = f"{group[0]:,} tokens, answers {group[1]}; in bold the tasks that count"
        table = Table("method", "budget", title=title)
        for task in tasks:
            name = task.replace("_", "\n")
            table.add_column(f"[bold]{name}[/]" if task in counting else f"[dim]{name}[/]")
        table.add_column("of\nfull")
        table.add_column("worst\ntask")
        for method in self.methods:
            row = [cells.get((method.name, task)) for task in tasks]
            shares = self.share_of_full(method.name, group), self.worst_task(method.name, group)
            table.add_row(
                method.name,
                "" if method.config is None else str(method.config.budget_tokens),
                *("" if cell is None else f"{100 * cell:.0f}" for cell in row),
                *("" if share is None else f"{share:.1%}" for share in shares),
            )
        console.print(table)

    def plot(self, path: Path) -> None:
        """Shares of full attention's score, the same against the budget, likelihood in the text."""
        groups, families = self.groups, self._budgets()
        panels = bool(groups) + bool(groups and families) + bool(self.likelihoods)
        if not panels:
            return
        names = [method.name for method in self.methods]
        height = max(3.0, 0.32 * len(names) + 1.2)
        figure, axes = plt.subplots(1, panels, figsize=(8 * panels, height), squeeze=False)
        remaining = list(axes[0])
        if groups:
            self._plot_shares(remaining.pop(0), names, groups)
        if groups and families:
            # Where most tasks count.
            group = max(groups, key=lambda g: (g[0], len(self.counting(g))))
            self._plot_budgets(remaining.pop(0), families, group)
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

    def _budgets(self) -> dict[str, list[Method]]:
        """Methods that were run at several budgets, by their name without it."""
        families: dict[str, list[Method]] = {}
        for method in self.methods:
            if method.config is not None:
                name, _, options = method.name.partition(":")
                rest = [o for o in options.split(",") if o and not o.startswith(_BUDGET)]
                families.setdefault(":".join([name, *rest]), []).append(method)
        return {name: methods for name, methods in families.items() if len(methods) > 1}

    def _plot_budgets(self, axis: Any, families: dict[str, list[Method]], group: Group) -> None:
        for name, methods in families.items():
            points = sorted(
                (method.config.budget_tokens, 100 * share)
                for method in methods
                if method.config and (share := self.share_of_full(method.name, group)) is not None
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("budget, tokens a KV head")
        axis.set_ylabel("% of full attention's score")
        axis.set_title(f"{group[0]:,} tokens, answers {group[1]}")
        axis.legend(fontsize="x-small")

    def _plot_shares(self, axis: Any, names: Sequence[str], groups: Sequence[Group]) -> None:
        thickness = 0.8 / len(groups)
        for i, group in enumerate(groups):
            shares = [self.share_of_full(name, group) for name in names]
            places = [row + (i - (len(groups) - 1) / 2) * thickness for row in range(len(names))]
            label = f"{group[0]:,} tokens, answers {group[1]}"
            bars = axis.barh(places, [100 * (x or 0.0) for x in shares], thickness, label=label)
            axis.bar_label(bars, ["" if x is None else f"{x:.1%}" for x in shares], fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 112)
        axis.set_xlabel("% of full attention's score, tasks that count")
        axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)


def write_json(report: Report, path: Path) -> None:
    """One object, indented."""
    path.write_text(json.dumps(report.as_json(), indent=1) + "\n")


def _name(group: Group) -> str:
    """`16384` or `16384 given`."""
    return f"{group[0]} {group[1]}" if group[1] == GIVEN else str(group[0])
