"""The one-way order of imports: nothing imports upwards, few import vLLM, some not even torch.

Imports inside functions and under `TYPE_CHECKING` count like any others.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_tailorkv

PACKAGE = vllm_tailorkv.__name__
ROOT = Path(vllm_tailorkv.__file__).parent

ORDER = [
    {"plugin", "cli", "doctor", "demo", "identify", "capacity", "options_page", "top", "drafter"},
    {"patches"},
    {"attention"},
    {"cache"},
    {"kernels"},
    {"plan"},
    {"profile"},
    {"config"},
    {"layout"},
    {"envs"},
    {"arguments", "failures", "files", "quiet", "scripts"},
    {"errors"},
]
"""Rooms from the top; one imports from its own and from lower ones."""

MAY_IMPORT_VLLM = {
    "plugin",
    "cli",
    "doctor",
    "identify",
    "capacity",
    "patches",
    "attention",
    "drafter",
}
WITHOUT_TORCH = [
    *(
        "arguments",
        "config",
        "envs",
        "errors",
        "failures",
        "files",
        "layout",
        "plan",
        "profile",
        "quiet",
        "scripts",
    )
]

RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def room_of(module: str) -> str:
    """The room of `vllm_tailorkv.<room>[.…]`; the package itself is the room ''."""
    return module.split(".")[1] if "." in module else ""


def sources() -> dict[str, Path]:
    """Every module of the package by its full name, through the symlinked folders too."""
    found = {}
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_dir() and path.name != "__pycache__":
                folders.append(path)
            elif path.suffix == ".py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                found[".".join((PACKAGE, *parts))] = path
    return found


SOURCES = sources()


def imports_in(module: str, text: str, is_package: bool) -> Iterator[str]:
    """The full names of what a module imports, wherever in it; `from a import b` gives a.b."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
        ):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value)
            elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
                yield str(name.values[0].value)


IMPORTS = {
    module: sorted(set(imports_in(module, path.read_text(), path.name == "__init__.py")))
    for module, path in SOURCES.items()
}


def imported_rooms(module: str) -> set[str]:
    """Rooms of this package that a module imports from."""
    names = {name for name in IMPORTS[module] if name.split(".")[0] == PACKAGE}
    return {room_of(name) for name in names} - {"__version__", ""}


def test_the_parser_sees_every_form() -> None:
    text = """
import torch.nn, vllm
from vllm_tailorkv import envs
from . import ops
from .types import GroupCodes
from ..layout import Field
if TYPE_CHECKING:
    import typed
def f():
    from vllm_tailorkv.config import load_config
    importlib.import_module(f"vllm_tailorkv.kernels.{name}")
    importlib.import_module("vllm_tailorkv._cpu")
"""
    assert set(imports_in("vllm_tailorkv.kernels.cpu", text, is_package=False)) == {
        "torch.nn",
        "vllm",
        "vllm_tailorkv.envs",
        "vllm_tailorkv.kernels.ops",
        "vllm_tailorkv.kernels.types.GroupCodes",
        "vllm_tailorkv.layout.Field",
        "typed",
        "vllm_tailorkv.config.load_config",
        "vllm_tailorkv.kernels.",
        "vllm_tailorkv._cpu",
    }
    assert list(imports_in("a.b", "from . import c", is_package=True)) == ["a.b.c"]


def test_every_module_is_seen() -> None:
    assert {"plugin", "patches", "attention", "cache", "kernels"} <= {
        room_of(module) for module in SOURCES
    }


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_import_upwards(module: str) -> None:
    if module == PACKAGE:
        assert not IMPORTS[module], "importing the package must cost nothing"
        return
    room = room_of(module)
    assert room in RANKS, f"give {room} a place in ORDER"
    for other in imported_rooms(module):
        if other in ("_cpu", "_cuda"):
            assert module in {
                f"{PACKAGE}.kernels.{name}" for name in (other[1:], "cuda", "library")
            }
            continue
        assert other in RANKS, f"{module} imports {other}, which has no place in ORDER"
        assert RANKS[other] >= RANKS[room], f"{module} imports {other}, which is above it"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_few_import_vllm(module: str) -> None:
    if room_of(module) in MAY_IMPORT_VLLM:
        return
    assert not [name for name in IMPORTS[module] if name.split(".")[0] == "vllm"]


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_no_torch(room: str) -> None:
    assert not [name for name in IMPORTS[f"{PACKAGE}.{room}"] if name.split(".")[0] == "torch"]


def test_no_torch_at_run_time() -> None:
    """Nor through what they import."""
    modules = ", ".join(f"{PACKAGE}.{room}" for room in WITHOUT_TORCH)
    code = f"import sys, {modules}; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
