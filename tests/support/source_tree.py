"""What packages of Python sources define, read without importing any of them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Definition = ast.FunctionDef | ast.ClassDef | ast.AnnAssign | ast.Assign
"""The statement that binds a name."""


@dataclass(frozen=True)
class Found:
    """What a name leads to.

    Args:
        module: the module that defines it; None if that is none of these packages'.
        node: its definition; None for a whole module.
    """

    module: "Module | None"
    node: Definition | None


ELSEWHERE = Found(None, None)


class Module:
    """A module: the names that it binds when it is imported, but for what it deletes."""

    def __init__(self, tree: "SourceTree", name: str, path: Path) -> None:
        self.tree, self.name, self.path = tree, name, path

    @cached_property
    def parsed(self) -> ast.Module:
        """Its statements."""
        return ast.parse(self.path.read_text())

    @cached_property
    def _bound(self) -> dict[str, Definition | tuple[str, str | None]]:
        """What each name is bound to; of an import, the module and the name in it."""
        bound: dict[str, Definition | tuple[str, str | None]] = {}
        # Names that only type checkers import are there where the module looks for missing ones.
        lazy = any(
            isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            for node in _statements(self.parsed.body, lazy=True)
        )
        for node in _statements(self.parsed.body, lazy):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    bound[alias.asname or whole] = (whole, None)
            elif isinstance(node, ast.ImportFrom):
                bound |= self._bound_by_import(node)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound[node.name] = node
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                names = (one for target in targets for one in ast.walk(target))
                bound |= {one.id: node for one in names if isinstance(one, ast.Name)}
        return bound

    def _bound_by_import(self, node: ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
        source, bound = self.absolute(node), {}
        for alias in node.names:
            if alias.name != "*":
                bound[alias.asname or alias.name] = (source, alias.name)
            elif self.tree.owns(source) and (other := self.tree.module(source)):
                bound |= {name: (source, name) for name in other.names()}
        return bound

    def absolute(self, node: ast.ImportFrom) -> str:
        """The full name of the module that a statement of this one imports from."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        if self.path.name != "__init__.py":
            parts.pop()
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def hinted(self, name: str) -> Found | None:
        """What a name stands for in an annotation, where type checkers' imports count too."""
        if (found := self.find(name)) is not None:
            return found
        for node in _statements(self.parsed.body, lazy=True):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        source = self.absolute(node)
                        owned = self.tree.owns(source)
                        return self.tree.find(source, alias.name) if owned else ELSEWHERE
        return None

    def names(self) -> list[str]:
        """What `from module import *` binds, without regard for `__all__`."""
        return [name for name in self._bound if not name.startswith("_")]

    def find(self, name: str) -> Found | None:
        """A name of this module, followed to where it is defined."""
        if name not in self._bound:
            inner = self.tree.module(f"{self.name}.{name}")
            return Found(inner, None) if inner else None
        target = self._bound[name]
        if not isinstance(target, tuple):
            return Found(self, target)
        source, inside = target
        if not self.tree.owns(source):
            return ELSEWHERE
        module = self.tree.module(source)
        if module is None or inside is None:
            return Found(module, None) if module else None
        if module is self and inside == name:
            # A package that imports its own submodule.
            inner = self.tree.module(f"{self.name}.{name}")
            return Found(inner, None) if inner else None
        return module.find(inside)


def _statements(body: list[ast.stmt], lazy: bool) -> Iterator[ast.stmt]:
    """Statements that are run on import, whichever way a condition goes."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            if lazy or "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from _statements(node.body, lazy)
            yield from _statements(node.orelse, lazy)
        elif isinstance(node, ast.Try):
            for part in (node.body, *(one.body for one in node.handlers), node.orelse):
                yield from _statements(part, lazy)
        elif isinstance(node, ast.With):
            yield from _statements(node.body, lazy)


class SourceTree:
    """The sources of some packages.

    Args:
        packages: the folder of each by its name.
    """

    def __init__(self, packages: dict[str, Path]) -> None:
        self._packages = packages
        self._modules: dict[str, Module | None] = {}

    def owns(self, module: str) -> bool:
        """Whether a module's name is one of these packages'."""
        return module.partition(".")[0] in self._packages

    def module(self, name: str) -> Module | None:
        """A module by its full name, or None."""
        if name not in self._modules:
            package, *inner = name.split(".")
            path = self._packages[package].joinpath(*inner)
            candidates = (path / "__init__.py", path.with_suffix(".py"))
            found = next((one for one in candidates if one.is_file()), None)
            self._modules[name] = Module(self, name, found) if found else None
        return self._modules[name]

    def find(self, module: str, name: str) -> Found | None:
        """What `from module import name` binds, or None if that fails."""
        source = self.module(module)
        return source.find(name) if source else None

    def modules(self, package: str) -> Iterator[Module]:
        """Every module of a package, through linked folders too."""
        folders = [self._packages[package]]
        while folders:
            for path in sorted(folders.pop().iterdir()):
                if path.is_dir():
                    folders.append(path)
                elif path.suffix == ".py":
                    inner = path.relative_to(self._packages[package]).with_suffix("").parts
                    parts = inner[:-1] if inner[-1] == "__init__" else inner
                    module = self.module(".".join([package, *parts]))
                    assert module is not None
                    yield module
