"""Every environment variable of TailorKV, each with a sentence.

The options of `TailorKVConfig` can be overridden too, as `VLLM_TAILORKV_<OPTION>` (for
instance `VLLM_TAILORKV_BITS=2`); `config.py` reads those through `option_overrides`.
"""

import os
import re
from collections.abc import Iterable

from vllm_tailorkv.errors import TailorKVError

PREFIX = "VLLM_TAILORKV_"

VARIABLES = {
    "VLLM_TAILORKV_KERNELS": "Implementation of the ops by name (cpu, cuda, triton, reference); "
    "those that it lacks, and all by default, run on the fastest that is available.",
    "VLLM_TAILORKV_CPU_ISA": "Instruction set of the C++ ops (amx, avx512_bf16, avx512_gfni, "
    "avx512, avx2, portable); default: the best that the processor has.",
    "VLLM_TAILORKV_CHECK_VALUES": "1: the C++ ops check every block, slot, group and token that "
    "they are given, at some cost, and name the one that does not exist.",
}


_OF_KUBERNETES = re.compile(
    r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes sets in every pod beside a service called `vllm-tailorkv` or `...-something`."""


def kernels() -> str | None:
    """The implementation asked for by name, if any."""
    return os.environ.get("VLLM_TAILORKV_KERNELS") or None


def triton_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter: its own variable, TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def option_overrides(options: Iterable[str]) -> dict[str, str]:
    """Values of `VLLM_TAILORKV_<OPTION>` by option name.

    Raises:
        TailorKVError: a variable with our prefix that is neither an option nor in
            `VARIABLES`, nor of Kubernetes, so that a typing error cannot pass unnoticed.
    """
    names = {PREFIX + option.upper(): option for option in options}
    overrides = {}
    for variable, value in os.environ.items():
        if not variable.startswith(PREFIX) or variable in VARIABLES:
            continue
        if variable not in names and _OF_KUBERNETES.fullmatch(variable.removeprefix(PREFIX)):
            continue
        if variable not in names:
            known = ", ".join(sorted([*names, *VARIABLES]))
            raise TailorKVError(f"unknown environment variable {variable}; known are {known}")
        overrides[names[variable]] = value
    return overrides


def values(options: Iterable[str]) -> dict[str, str | None]:
    """Every variable that means something to us, and those of Kubernetes that are set, as None.

    Args:
        options: names of the options.
    """
    names = [*VARIABLES, *(PREFIX + option.upper() for option in options)]
    ours = [name for name in os.environ if name.startswith(PREFIX) and name not in names]
    foreign = [name for name in ours if _OF_KUBERNETES.fullmatch(name.removeprefix(PREFIX))]
    return {name: os.environ.get(name) for name in names} | dict.fromkeys(foreign)
