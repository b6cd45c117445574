"""Tables, JSON and a picture of what the harness found."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from provenance import revision, versions
from rich.console import Console
from rich.table import Table

from accuracy.attention_level import LayerQuality
from accuracy.deadline import Piece
from accuracy.evaluate import GIVEN, Cell, Score
from accuracy.methods import FULL, Method
from accuracy.text_quality import Divergence, Likelihood
from vllm_tailorkv.files import write_whole

_BUDGET = ("budget=", "recent_tokens=", "topk_tokens=")
_T = TypeVar("_T")
Group = tuple[int, str]
"""A length, and who writes the answers: what a table is of."""


@dataclass
class Report:
    """Everything measured in a run.

    counts_from: a task counts where full attention reaches this score: else it tells nothing of a
        method.
    """

    arguments: dict[str, Any]
    methods: list[Method]
    counts_from: float
    finished: bool = False
    scores: list[Score] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    layers: list[LayerQuality] = field(default_factory=list)
    bytes_per_token: dict[str, dict[str, float]] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    revisions: list[str | None] = field(default_factory=lambda: [revision()])

    def resume(self, written: dict[str, Any]) -> None:
        """Take over what a file of a run with the same arguments holds.

        Raises:
            ValueError: its arguments are others; the message names one.
        """
        told = written.get("arguments", {})
        for name in told | self.arguments:
            if told.get(name) != (value := self.arguments.get(name)):
                raise ValueError(f"it was written with {name} {told.get(name)}, not {value}")
        self.scores = [_read(Score, x) for x in written["scores"]]
        self.likelihoods = [_read(Likelihood, x) for x in written["likelihoods"]]
        self.divergences = [_read(Divergence, x) for x in written["divergences"]]
        self.layers = [_read(LayerQuality, x) for x in written["layers"]]
        for method in written["methods"]:
            if method["bytes_per_token"] is not None:
                self.bytes_per_token[method["name"]] = method["bytes_per_token"]
        self.pieces = [_read(Piece, x) for x in written["pieces"]]
        self.revisions = list(dict.fromkeys([*written["revisions"], *self.revisions]))

    def has_score(self, method: str, cell: Cell) -> bool:
        """This cell was asked."""
        key = (method, cell.task, cell.length, cell.answers)
        return any((x.method, x.task, x.length, x.answers) == key for x in self.scores)

    def has_text(self, method: str, kind: str) -> bool:
        """Texts of this kind were read."""
        return any((x.method, x.kind) == (method, kind) for x in self.likelihoods)

    def drop_text(self, method: str, kind: str) -> None:
        """Forget what was read of this kind: it is read again."""
        key = (method, kind)
        self.likelihoods = [x for x in self.likelihoods if (x.method, x.kind) != key]
        self.divergences = [x for x in self.divergences if (x.method, x.kind) != key]
        self.layers = [x for x in self.layers if (x.method, x.kind) != key]

    def attention(self) -> list[dict[str, Any]]:
        """For each method and kind of text: means over layers, worst layer and worst head."""
        rows: dict[tuple[str, str], list[LayerQuality]] = {}
        for quality in self.layers:
            rows.setdefault((quality.method, quality.kind), []).append(quality)
        found = []
        for (method, kind), layers in rows.items():
            worst = min(layers, key=lambda q: q.of_oracle)
            share, layer, head = min(
                (share, q.layer, head) for q in layers for head, share in enumerate(q.heads)
            )
            means = {
                name: sum(getattr(q, name) for q in layers) / len(layers)
                for name in ("recall", "mass", "error", "of_oracle")
            }
            found.append(
                {"method": method, "kind": kind}
                | means
                | {"worst_layer": {"layer": worst.layer, "of_oracle": worst.of_oracle}}
                | {"worst_head": {"layer": layer, "head": head, "of_oracle": share}}
                | {"worst_error": max((q.error, q.layer) for q in layers)}
            )
        return found

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
        return [task for (m, task), mean in cells.items() if m == FULL and mean >= self.counts_from]

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
            "revision": self.revisions[-1],
            "revisions": self.revisions,
            "finished": self.finished,
            "counts_from": self.counts_from,
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
                    "seconds": self._seconds(method.name),
                    "share_of_full": {_name(g): self.share_of_full(method.name, g) for g in groups},
                    "worst_task": {_name(g): self.worst_task(method.name, g) for g in groups},
                }
                for method in self.methods
            ],
            "counting_tasks": {_name(g): self.counting(g) for g in groups},
            "scores": [asdict(score) | {"mean": score.mean} for score in self.scores],
            "likelihoods": [asdict(x) | {"mean": x.mean} for x in self.likelihoods],
            "divergences": [asdict(x) for x in self.divergences],
            "attention": self.attention(),
            "pieces": [asdict(piece) for piece in self.pieces],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def _seconds(self, method: str) -> float:
        return sum(piece.seconds for piece in self.pieces if piece.method == method)

    def print(self, console: Console) -> None:
        """Tables: tasks by method for each length, text, layers."""
        for group in self.groups:
            self._print_tasks(console, group)
        for kind in dict.fromkeys(x.kind for x in self.likelihoods):
            console.print(self._text_table(kind))
        if self.layers:
            console.print(self._attention_table())

    def _text_table(self, kind: str) -> Table:
        steps = next((x.steps for x in self.divergences if x.kind == kind), None)
        title = f"Held-out {kind}" + (f", {steps:,} decode steps" if steps else "")
        columns = ("method", "nats a token", "against full", "divergence from full", "same token")
        table = Table(*columns, title=title)
        full = next((x.mean for x in self.likelihoods if (x.method, x.kind) == (FULL, kind)), None)
        for likelihood in self.likelihoods:
            if likelihood.kind != kind:
                continue
            against = "" if full is None else f"{full - likelihood.mean:+.4f}"
            row = [likelihood.method, f"{-likelihood.mean:.4f}", against]
            for x in self.divergences:
                if (x.method, x.kind) == (likelihood.method, kind):
                    row.append(f"{x.mean:.4f} ({x.low:.4f} to {x.high:.4f})")
                    row.append(f"{x.agreement:.1%}")
            table.add_row(*row)
        return table

    def _attention_table(self) -> Table:
        table = Table(
            *("method", "text", "recall", "mass", "error", "worst error"),
            *("of the oracle's", "worst layer", "worst head"),
            title="Attention of sparse layers, means over them",
        )
        for row in self.attention():
            error, layer = row["worst_error"]
            worst, head = row["worst_layer"], row["worst_head"]
            table.add_row(
                *(row["method"], row["kind"], f"{row['recall']:.1%}", f"{row['mass']:.1%}"),
                *(f"{row['error']:.2%}", f"{error:.2%} (layer {layer})"),
                f"{row['of_oracle']:.1%}",
                f"{worst['of_oracle']:.1%} (layer {worst['layer']})",
                f"{head['of_oracle']:.1%} (layer {head['layer']}, KV head {head['head']})",
            )
        return table

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
                if x.kind != self.likelihoods[0].kind:
                    continue
                steps = [(i + 1) * x.stretch for i in range(len(x.values))]
                axis.plot(steps, [-value for value in x.values], label=x.method, linewidth=1)
            axis.set_xlabel("decode step")
            axis.set_ylabel("nats a token (less is better)")
            axis.set_title(f"Held-out {self.likelihoods[0].kind}")
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
    """One object, indented. The file is whole at any time."""
    write_whole(path, json.dumps(report.as_json(), indent=1) + "\n")


def _read(kind: type[_T], written: dict[str, Any]) -> _T:
    """A dataclass from its JSON: lists were tuples, and what is derived is left out."""
    names = {x.name for x in fields(cast(Any, kind))}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in written.items() if k in names}
    return kind(**values)


def _name(group: Group) -> str:
    """`16384` or `16384 given`."""
    return f"{group[0]} {group[1]}" if group[1] == GIVEN else str(group[0])
