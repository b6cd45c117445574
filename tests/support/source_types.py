"""What the classes and functions of a `SourceTree` take and have, as far as annotations tell."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from source_tree import ELSEWHERE, Found, Module

_BASES = {
    "object": set(),
    "ABC": set(),
    "Generic": set(),
    "Protocol": set(),
    "Enum": {"name", "value"},
    "IntEnum": {"name", "value"},
    "NamedTuple": {"_replace", "_asdict", "_fields"},
}
"""Bases of other packages that bring no more members than these."""


@dataclass
class Signature:
    """What a call takes.

    Args:
        positional: names that may be given by position, in order.
        named: names that may be given by name.
        required: those without a default.
        any_positional, any_named: whether more of them are taken.
    """

    positional: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    required: set[str] = field(default_factory=set)
    any_positional: bool = False
    any_named: bool = False

    def refuses(self, call: ast.Call) -> str | None:
        """Why it does not take what a call gives, or None."""
        unpacked = any(isinstance(one, ast.Starred) for one in call.args)
        unpacked_named = any(one.arg is None for one in call.keywords)
        given = {one.arg for one in call.keywords if one.arg is not None}
        if not self.any_positional and not unpacked and len(call.args) > len(self.positional):
            return f"takes {len(self.positional)} arguments by position, not {len(call.args)}"
        if not self.any_named and (unknown := given - self.named):
            return f"does not take {', '.join(sorted(unknown))}"
        taken = given | set(self.positional[: len(call.args)])
        if not unpacked and not unpacked_named and (missing := self.required - taken):
            return f"wants {', '.join(sorted(missing))} too"
        return None


def signature(function: ast.FunctionDef, *, bound: bool) -> Signature:
    """What a function takes; `bound` for a method that is called on an object or class."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without = positional[: len(positional) - len(arguments.defaults)]
    named = [one.arg for one in (*arguments.args, *arguments.kwonlyargs)]
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required = {one.arg for one in without} | {one.arg for one, value in pairs if value is None}
    first = {positional[0].arg} if bound and positional and not is_static(function) else set()
    return Signature(
        [one.arg for one in positional][len(first) :],
        set(named) - first,
        required - first,
        arguments.vararg is not None,
        arguments.kwarg is not None,
    )


def _decorators(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    plain = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    return {ast.unparse(one).rpartition(".")[2] for one in plain}


def is_static(function: ast.FunctionDef) -> bool:
    """Whether it is given neither an object nor a class."""
    return "staticmethod" in _decorators(function)


def is_property(function: ast.FunctionDef) -> bool:
    """Whether it is called by being looked up."""
    return bool(_decorators(function) & {"property", "cached_property"})


class Class:
    """A class with those that it derives from.

    Args:
        found: of a class definition.
    """

    def __init__(self, found: Found) -> None:
        self.lineage: list[tuple[Module, ast.ClassDef]] = []
        self.is_open = False
        """Whether some base is not in the tree, so that it may have other members."""
        self._foreign: set[str] = set()
        self._collect(found)

    def _collect(self, found: Found) -> None:
        module, node = found.module, found.node
        assert module is not None
        assert isinstance(node, ast.ClassDef)
        self.lineage.append((module, node))
        for base in node.bases:
            other = resolve(module, base)
            if other is not None and isinstance(other.node, ast.ClassDef):
                self._collect(other)
                continue
            plain = base.value if isinstance(base, ast.Subscript) else base
            name = ast.unparse(plain).rpartition(".")[2]
            self._foreign |= _BASES.get(name, set())
            self.is_open |= name not in _BASES

    def has(self, name: str) -> bool:
        """Whether objects of the class, or the class, may have a member."""
        known = name.startswith("__") or name in self._foreign
        return known or self.is_open or self.member(name) is not None

    def member(self, name: str) -> tuple[Module, ast.stmt] | None:
        """The statement that makes a member, and the module that it is in."""
        for module, node in self.lineage:
            for statement in _members(node):
                if name in bound_by(statement):
                    return module, statement
        return None

    def signature(self) -> Signature | None:
        """What making an object takes, or None if the sources do not tell."""
        made = self.member("__init__")
        if made is not None:
            assert isinstance(made[1], ast.FunctionDef)
            return signature(made[1], bound=True)
        if self.is_open:
            return None
        fields: dict[str, bool] = {}
        keywords_only: set[str] = set()
        for _, node in reversed(self.lineage):
            for statement in node.body:
                if not isinstance(statement, ast.AnnAssign):
                    continue
                assert isinstance(statement.target, ast.Name)
                if "ClassVar" in ast.unparse(statement.annotation):
                    continue
                value = ast.unparse(statement.value) if statement.value else ""
                if "init=False" in value:
                    continue
                name = statement.target.id
                fields[name] = not value or (
                    value.startswith(("field(", "Field(")) and "default" not in value
                )
                if any("kw_only=True" in ast.unparse(one) for one in node.decorator_list):
                    keywords_only.add(name)
        positional = [name for name in fields if name not in keywords_only]
        required = {name for name, needed in fields.items() if needed}
        return Signature(positional, set(fields), required)


def _members(node: ast.ClassDef) -> Iterator[ast.stmt]:
    """Statements of a class that make members: of its body, and those on `self` in its methods."""
    for statement in node.body:
        yield statement
        if isinstance(statement, ast.If):
            yield from statement.body
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef):
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Assign | ast.AnnAssign):
                    yield inner


def bound_by(statement: ast.stmt) -> set[str]:
    """Names of the members that a statement makes."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    targets: list[ast.expr] = []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Assign):
        targets = [one for target in statement.targets for one in _parts(target)]
    names = {one.id for one in targets if isinstance(one, ast.Name)}
    return names | {
        one.attr
        for one in targets
        if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "self"
    }


def _parts(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, ast.Tuple) else [target]


def resolve(module: Module, expression: ast.expr | None) -> Found | None:
    """What an annotation, or a base of a class, names; `X | None` names X."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        expression = ast.parse(expression.value, mode="eval").body
    if isinstance(expression, ast.BinOp):
        sides = [one for one in (expression.left, expression.right) if ast.unparse(one) != "None"]
        return resolve(module, sides[0]) if len(sides) == 1 else None
    if isinstance(expression, ast.Subscript):
        name = ast.unparse(expression.value).rpartition(".")[2]
        return resolve(module, expression.slice if name == "Optional" else expression.value)
    if isinstance(expression, ast.Name):
        return module.hinted(expression.id)
    if isinstance(expression, ast.Attribute):
        holder = resolve(module, expression.value)
        if holder is None or holder.module is None or holder.node is not None:
            return holder and ELSEWHERE
        return holder.module.find(expression.attr)
    return None
