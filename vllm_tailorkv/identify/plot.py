"""The scores as a picture."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.profile import Identification, Profile

# Told apart by people with any colour vision, and in print.
_DENSE, _SPARSE, _WINDOW, _THRESHOLD = "#d55e00", "#0072b2", "#999999", "#333333"
_HEAD_SPREAD = 0.28


def _figure(profile: Profile, found: Identification) -> Figure:
    width = min(18.0, max(6.4, 2.5 + 0.3 * profile.num_layers))
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, layer in enumerate(found.layers):
        if layer is None:
            axes.axvspan(index - 0.5, index + 0.5, color=_WINDOW, alpha=0.15, linewidth=0)
            continue
        color = _DENSE if index in profile.dense_layers else _SPARSE
        axes.bar(index, layer.score, width=0.8, color=color, alpha=0.35, linewidth=0)
        # Heads side by side, in order, so that equal scores do not hide each other.
        step = 2 * _HEAD_SPREAD / max(1, len(layer.heads) - 1)
        places = [index - _HEAD_SPREAD + step * i for i in range(len(layer.heads))]
        if len(places) == 1:
            places = [index]
        axes.vlines(index, min(layer.heads), max(layer.heads), color=color, linewidth=1, alpha=0.6)
        axes.scatter(places, layer.heads, s=9, color=color, alpha=0.8, linewidth=0, zorder=3)
        axes.hlines(layer.score, index - 0.4, index + 0.4, color=color, linewidth=2.2, zorder=4)
    axes.axhline(found.beta, color=_THRESHOLD, linewidth=1, linestyle="--", zorder=2)
    axes.set_xlim(-0.6, profile.num_layers - 0.4)
    axes.set_ylim(-0.02, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=40))
    axes.set_xlabel("layer")
    axes.set_ylabel("dense preference")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    prompt = found.prompt
    figure.suptitle(Path(found.model).name, x=0.02, ha="left", fontweight="bold")
    axes.set_title(
        f"{prompt.source}, {prompt.tokens:,} tokens; last {found.queries} queries; "
        f"share of attention outside the {found.alpha:.1%} largest weights",
        loc="left",
        fontsize="small",
        color="#555555",
    )
    figure.legend(
        handles=_legend(profile, found), loc="outside right upper", fontsize="small", frameon=False
    )
    return figure


def _legend(profile: Profile, found: Identification) -> list[Line2D]:
    kinds = [("dense", _DENSE), ("sparse", _SPARSE)]
    handles = [Line2D([], [], color=color, linewidth=2.2, label=name) for name, color in kinds]
    handles.append(
        Line2D([], [], color="#555555", marker="o", markersize=3, linestyle="", label="a head")
    )
    handles.append(
        Line2D(
            [], [], color=_THRESHOLD, linewidth=1, linestyle="--", label=f"beta = {found.beta:g}"
        )
    )
    if None in found.layers:
        handles.append(
            Line2D(
                [],
                [],
                color=_WINDOW,
                alpha=0.3,
                linewidth=7,
                label="vLLM's, or K and V of another",
            )
        )
    return handles


def save_plot(path: Path, profile: Profile) -> None:
    """Write a picture of the scores, in the format of the path's suffix.

    Raises:
        TailorKVError: the file cannot be written.
    """
    assert profile.identified is not None
    try:
        _figure(profile, profile.identified).savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise TailorKVError(f"--plot {path}: {error}") from None
