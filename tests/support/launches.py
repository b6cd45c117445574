"""What ops would launch on a GPU, without one: nothing runs, and no value exists to be looked at.

Tensors are on torch's `meta` device; the ops take them for tensors of an H100.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from vllm_tailorkv.kernels import cuda, dispatch, ops
from vllm_tailorkv.kernels import triton as triton_module
from vllm_tailorkv.kernels.triton import launch

ROOT = Path(__file__).parents[2]


def select_topk_kernels() -> list[str]:
    """What the CUDA extension's `select_topk` launches, from its source."""
    source = (ROOT / "csrc/cuda/select_topk.cuh").read_text()
    body = source[source.index("void run_select_topk(") :]
    return [match[1] for match in re.finditer(r"launch\((\w+)", body)]


class _Torch(TorchDispatchMode):
    """Notes torch's own kernels: all but views and allocations."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("vllm_tailorkv::"):
            assert name == "vllm_tailorkv::select_topk", name
            self.names += select_topk_kernels()
        elif not (func.is_view or "empty" in name):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch: Any) -> Iterator[list[str]]:
    """The names of the kernels that ops launch inside, in order."""
    names: list[str] = []

    def note(function: Any, *_: Any, **__: Any) -> None:
        names.append(function.fn.__name__)

    with monkeypatch.context() as patch:
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", note)
            patch.setattr(kind, "__getitem__", lambda function, _: lambda *a, **k: note(function))
        patch.setattr(launch, "_multiprocessors", lambda _: 132)
        patch.setattr(launch, "_counters", {})  # these have no values
        for module in (cuda, triton_module):
            patch.setattr(module, "unavailable", lambda: None)
        patch.setattr(ops, "implementation", lambda op, _: dispatch.choose(op, "cuda").function)
        dispatch.forget()
        cuda.load()
        with _Torch(names):
            yield names
    dispatch.forget()
