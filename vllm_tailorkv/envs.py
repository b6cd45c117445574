"""Every environment variable of TailorKV, each with a sentence.

The options of `TailorKVConfig` can be overridden too, as `VLLM_TAILORKV_<OPTION>` (for
instance `VLLM_TAILORKV_BITS=2`); `config.py` reads those through `option_overrides`.
"""

import os
from collections.abc import Iterable

from vllm_tailorkv.errors import TailorKVError

PREFIX = "VLLM_TAILORKV_"

VARIABLES = {
    "VLLM_TAILORKV_KERNELS": "Implementation of the ops by name (cpu, cuda, triton, reference); "
    "those that it lacks, and all by default, run on the fastest that is available.",
    "VLLM_TAILORKV_CPU_ISA": "Instruction set of the C++ ops (avx512_gfni, avx512, avx2, "
    "portable); default: the best that the processor has.",
}


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
            `VARIABLES`, so that a typing error cannot pass unnoticed.
    """
    names = {PREFIX + option.upper(): option for option in options}
    overrides = {}
    for variable, value in os.environ.items():
        if not variable.startswith(PREFIX) or variable in VARIABLES:
            continue
        if variable not in names:
            known = ", ".join(sorted([*names, *VARIABLES]))
            raise TailorKVError(f"unknown environment variable {variable}; known are {known}")
        overrides[names[variable]] = value
    return overrides
