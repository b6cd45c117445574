"""Real text that every machine with this project's requirements has: docstrings of its packages.

And real code: the files of those packages.

Training text and evaluation text come from different packages, so what is measured was never seen.
Given the same installed versions, every function returns the same text.
"""

import ast
import importlib.util
import random
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

TRAINING_PACKAGES = ("torch", "numpy", "sympy", "pandas", "vllm", "")
EVALUATION_PACKAGES = ("networkx",)
_STANDARD_LIBRARY = ""
_MIN_CHARS, _MAX_LINE_CHARS = 200, 160


@cache
def documents(packages: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(name, docstring) of every documented object of `packages` ("" is Python's own library).

    No two docstrings are the same; every one ends with a newline. Raises ModuleNotFoundError if a
    package is not installed.
    """
    found: dict[str, str] = {}
    for package in packages:
        for path in _sources(package):
            for name, text in _docstrings(path):
                found.setdefault(text, name)
    return tuple((name, text) for text, name in found.items())


def lines(packages: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Lines of all documents, the documents in random order, without end."""
    order = list(documents(packages))
    while True:
        rng.shuffle(order)
        for name, text in order:
            yield f"{name}:\n"
            yield from text.splitlines(keepends=True)


def code(packages: Sequence[str], rng: random.Random) -> Iterator[str]:
    """The source files of `packages`, in random order, without end."""
    order = [path for package in packages for path in _sources(package)]
    while True:
        rng.shuffle(order)
        for path in order:
            written = path.read_text(encoding="utf-8")
            if len(written) >= _MIN_CHARS and written.isascii():
                yield written


def _sources(package: str) -> list[Path]:
    if package == _STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the text of package {package!r} is needed; install it")
    return sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text is None or len(text) < _MIN_CHARS or not text.isascii():
            continue
        kept = [line.strip() for line in text.splitlines()]
        kept = [line for line in kept if line and len(line) <= _MAX_LINE_CHARS]
        yield node.name, "".join(f"{line}\n" for line in kept)
