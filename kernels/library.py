"""The torch library `vllm_tailorkv`: one schema for each op, whatever runs it (`csrc/schema.h`).

The C++ ops are called through torch's dispatcher. Implementations in Python are called as they are,
after the library's `Meta` variant, which checks shapes, dtypes and strides and does nothing else:
the same checks, of the same source, as those in front of the C++ kernels.
"""

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

OPS = torch.ops.vllm_tailorkv

_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


def flat(argument: Any) -> Any:
    """A tuple of tensors, nested as in `types.py`, as the list that a schema has."""
    if not isinstance(argument, tuple):
        return argument
    parts = (flat(part) for part in argument)
    return [one for part in parts for one in (part if isinstance(part, list) else [part])]


def _has(op: str, key: str) -> bool:
    """Whether the library has a variant of an op for a dispatch key."""
    with suppress(ImportError):  # schemas and checks come with it
        importlib.import_module("vllm_tailorkv._cpu")
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_tailorkv::{op}", key)
    except RuntimeError:  # an op of no such name
        return False


@cache
def compiled(op: str, key: str, module: str) -> Callable[..., Any]:
    """The function that runs the C++ variant of an op.

    Args:
        key: torch's dispatch key, `CPU` or `CUDA`.
        module: who is asked for it.

    Raises:
        AttributeError: there is none.
    """
    if not _has(op, key):
        raise AttributeError(f"module {module} has no {op}")
    overload = getattr(OPS, op).default

    def run(*arguments: Any) -> Any:
        return overload(*map(flat, arguments))

    return run


def check(op: str, *arguments: Any) -> None:
    """Raise `RuntimeError` for arguments that break the contract of the op `op`.

    Without the C++ extension nothing is checked: that is for the reference, in plain torch.
    """
    if _has(op, "Meta"):
        getattr(OPS, op).default.redispatch(_META, *map(flat, arguments))


def checked(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that checks its arguments as the op `op` does, and then runs `function`.

    What is given by name is not the op's, and not checked.
    Without the C++ extension nothing is checked: that is for the reference, in plain torch.
    """
    if not _has(op, "Meta"):
        return function
    overload = getattr(OPS, op).default

    def run(*arguments: Any, **beside: Any) -> Any:
        overload.redispatch(_META, *map(flat, arguments))
        return function(*arguments, **beside)

    return run
