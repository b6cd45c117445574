"""The scores as a table in the terminal."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_tailorkv.profile import Profile

_BAR_CELLS = 30
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A bar of blocks, `cells` wide for 1."""
    full, part = divmod(round(share * cells * 8), 8)
    return "█" * full + _EIGHTHS[part].strip()


def print_scores(console: Console, profile: Profile) -> None:
    """Print one row a layer: its score, the spread over its heads, and what it is."""
    found = profile.identified
    assert found is not None
    prompt = found.prompt
    table = Table(
        title=f"Dense preference of {escape(Path(found.model).name)}",
        caption=f"{escape(prompt.source)}, {prompt.tokens:,} tokens, last {found.queries} queries, "
        f"alpha {found.alpha:g}: the share of attention outside the {found.alpha:.1%} largest "
        f"weights; dense above beta {found.beta:g}",
    )
    table.add_column("layer", justify="right")
    table.add_column("score", justify="right")
    table.add_column("range of heads", no_wrap=True, justify="center")
    table.add_column("", min_width=_BAR_CELLS, no_wrap=True)
    table.add_column("kind")
    for index, layer in enumerate(found.layers):
        if layer is None:
            table.add_row(
                str(index), "", "", "", "vLLM's, or K and V of another layer", style="dim"
            )
            continue
        is_dense = index in profile.dense_layers
        spread = f"{min(layer.heads):.3f} to {max(layer.heads):.3f}"
        kind, style = ("dense", "bold yellow") if is_dense else ("sparse", "cyan")
        table.add_row(str(index), f"{layer.score:.3f}", spread, bar(layer.score), kind, style=style)
    console.print(table)
    names = ", ".join(map(str, profile.dense_layers)) or "none"
    console.print(f"Dense layers: [bold]{names}[/] of {profile.num_layers}", highlight=False)
