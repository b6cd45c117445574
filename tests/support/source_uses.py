"""What a package uses of another and does not find there, as far as their sources tell.

Looked at are imports, members of what is known to be of a class of the trees (by annotations,
imports, calls and plain assignments), and the arguments of calls. What the sources do not tell the
type of is passed over.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from source_tree import Found, Module, SourceTree
from source_types import Class, bound_by, is_property, is_static, resolve, signature

Scope = dict[str, Found]


@dataclass(frozen=True, order=True)
class Fault:
    """Something that is used and is not there."""

    module: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Counts:
    """What was looked at, lest a test pass because nothing was."""

    imports: int
    members: int
    calls: int
    overridden: int


class Uses:
    """What the modules of a package use of another.

    Args:
        tree: both packages.
        user, used: their names.
    """

    def __init__(self, tree: SourceTree, user: str, used: str) -> None:
        self.tree, self.used = tree, used
        self.faults: set[Fault] = set()
        self.own: set[str] = set()
        """Members, as `Class.name`, that classes add to the other package's they derive from."""
        self._overridden: set[str] = set()
        self._imports: set[tuple[str, str]] = set()
        self._members: set[tuple[str, int, str]] = set()
        self._calls: set[tuple[str, int, str]] = set()
        for module in tree.modules(user):
            _Reader(self, module).read()

    @property
    def counts(self) -> Counts:
        """What was looked at."""
        return Counts(*map(len, (self._imports, self._members, self._calls, self._overridden)))

    def imported(self, module: Module, line: int, source: str, name: str | None) -> None:
        """Look at an import of the other package's."""
        if source.partition(".")[0] != self.used:
            return
        self._imports.add((source, name or ""))
        if self.tree.module(source) is None:
            self._fault(module, line, f"there is no module {source}")
        elif name is not None and self.tree.find(source, name) is None:
            self._fault(module, line, f"{source} has no {name}")

    def member(self, module: Module, node: ast.Attribute, holder: Found) -> None:
        """Look at a member of a module or of an object."""
        if holder.module is None:
            return
        if holder.node is None:
            missing = holder.module.find(node.attr) is None and not node.attr.startswith("__")
            kind = holder.module.name
            if missing and (inner := holder.module.find("__getattr__")) is not None:
                missing = inner.module is None
        elif isinstance(holder.node, ast.ClassDef):
            made = Class(holder)
            if not self._is_theirs(made):
                return
            missing, kind = not made.has(node.attr), holder.node.name
        else:
            return
        self._members.add((module.name, node.lineno, ast.unparse(node)))
        if missing:
            self._fault(module, node.lineno, f"{kind} has no {node.attr} ({ast.unparse(node)})")

    def call(self, module: Module, node: ast.Call, function: Found, *, bound: bool) -> None:
        """Look at the arguments of a call."""
        takes = None
        if isinstance(function.node, ast.FunctionDef) and self._is_used(function.module):
            takes = signature(function.node, bound=bound)
        elif isinstance(function.node, ast.ClassDef) and self._is_theirs(made := Class(function)):
            takes = made.signature()
        if takes is None:
            return
        self._calls.add((module.name, node.lineno, ast.unparse(node.func)))
        if why := takes.refuses(node):
            self._fault(module, node.lineno, f"{ast.unparse(node.func)} {why}")

    def overridden(self, module: Module, node: ast.ClassDef) -> None:
        """Look at what a class makes of the other package's class that it derives from."""
        base = Class(Found(module, node))
        base.lineage = [one for one in base.lineage if self._is_used(one[0])]
        if not base.lineage:
            return
        for statement in node.body:
            for name in bound_by(statement):
                if name.startswith("__") and name != "__init__":
                    continue
                theirs = base.member(name)
                if theirs is None:
                    self.own.add(f"{node.name}.{name}")
                elif isinstance(statement, ast.FunctionDef):
                    self._same_arguments(module, node.name, statement, theirs[1])

    def _same_arguments(
        self, module: Module, owner: str, ours: ast.FunctionDef, theirs: ast.stmt
    ) -> None:
        if not isinstance(theirs, ast.FunctionDef):
            text = f"{owner}.{ours.name} is a method, but was an attribute"
            self._fault(module, ours.lineno, text)
            return
        mine, other = (signature(one, bound=True) for one in (ours, theirs))
        self._overridden.add(f"{owner}.{ours.name}")
        more = mine.required - other.named - set(other.positional)
        # Of what may be given by position, the order counts too.
        fewer = [] if mine.any_positional else other.positional[len(mine.positional) :]
        pairs = zip(mine.positional, other.positional, strict=False)
        renamed = [theirs for ours, theirs in pairs if ours != theirs]
        unknown = set() if mine.any_named else other.named - mine.named
        if wrong := sorted({*more, *fewer, *renamed, *unknown}):
            text = f"{owner}.{ours.name} differs from what it overrides in {', '.join(wrong)}"
            self._fault(module, ours.lineno, text)

    def _is_used(self, module: Module | None) -> bool:
        return module is not None and module.name.partition(".")[0] == self.used

    def _is_theirs(self, made: Class) -> bool:
        """Whether a class is the other package's, or derives from one that is."""
        return any(self._is_used(module) for module, _ in made.lineage)

    def _fault(self, module: Module, line: int, text: str) -> None:
        self.faults.add(Fault(module.name, line, text))


class _Reader:
    """Reads one module, function after function."""

    def __init__(self, uses: Uses, module: Module) -> None:
        self.uses, self.module = uses, module

    def read(self) -> None:
        scope = self._imports(self.module.parsed.body, deep=False)
        for node in self.module.parsed.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                scope[node.name] = Found(self.module, node)
        self._block(self.module.parsed.body, scope, None)

    def _imports(self, body: list[ast.stmt], *, deep: bool) -> Scope:
        scope: Scope = {}
        nodes = body if not deep else [node for one in body for node in ast.walk(one)]
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.uses.imported(self.module, node.lineno, alias.name, None)
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    if self.uses.tree.owns(whole) and (found := self.uses.tree.module(whole)):
                        scope[alias.asname or whole] = Found(found, None)
            elif isinstance(node, ast.ImportFrom):
                source = self.module.absolute(node)
                for alias in node.names:
                    self.uses.imported(self.module, node.lineno, source, alias.name)
                    if not self.uses.tree.owns(source):
                        continue
                    if found := self.uses.tree.find(source, alias.name):
                        scope[alias.asname or alias.name] = _value(found)
        return scope

    def _block(self, body: list[ast.stmt], outer: Scope, owner: Found | None) -> None:
        """Look at statements, but for functions and classes in them, which come after."""
        scope, inner = dict(outer), []
        for node in _flat(body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner.append(node)
            else:
                self._narrow(node, scope)
                self._look(node, scope)
                self._assign(node, scope)
        for node in inner:
            if isinstance(node, ast.ClassDef):
                self.uses.overridden(self.module, node)
                self._block(node.body, scope, Found(self.module, node))
            else:
                self._function(node, scope, owner)

    def _function(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef, outer: Scope, owner: Found | None
    ) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        # What the function binds by itself hides what the module has by that name.
        scope = {name: found for name, found in outer.items() if name not in _own(node)}
        scope |= self._imports(node.body, deep=True)
        for argument in arguments:
            if found := resolve(self.module, argument.annotation):
                scope[argument.arg] = found
        if owner is not None and arguments and not is_static(node):
            scope[arguments[0].arg] = owner
        self._block(node.body, scope, None)

    def _narrow(self, statement: ast.stmt, scope: Scope) -> None:
        """What is asked for its class is of it from there on: else it is not looked at so."""
        for node in _expressions(statement):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked, kind = node.args
                if isinstance(asked, ast.Name) and (found := self._infer(kind, scope)):
                    scope[asked.id] = found

    def _look(self, statement: ast.AST, scope: Scope) -> None:
        """Look at the expressions of one statement."""
        for node in _expressions(statement):
            if isinstance(node, ast.Attribute):
                if holder := self._infer(node.value, scope):
                    self.uses.member(self.module, node, holder)
            elif isinstance(node, ast.Call) and (function := self._infer(node.func, scope)):
                holder = None
                if isinstance(node.func, ast.Attribute):
                    holder = self._infer(node.func.value, scope)
                bound = holder is not None and holder.node is not None
                self.uses.call(self.module, node, function, bound=bound)

    def _assign(self, node: ast.stmt, scope: Scope) -> None:
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                # With a star among them they are not in step, and the sources tell too little.
                if len(target.elts) == len(node.value.elts):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
            else:
                pairs = [(target, node.value)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if found := resolve(self.module, node.annotation):
                scope[node.target.id] = found
            return
        for target, value in pairs:
            if isinstance(target, ast.Name):
                scope.pop(target.id, None)
                if found := self._infer(value, scope):
                    scope[target.id] = found

    def _infer(self, node: ast.expr, scope: Scope) -> Found | None:
        """The class, function or module that an expression is or is an object of."""
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Call):
            function = self._infer(node.func, scope)
            if function is not None and isinstance(function.node, ast.FunctionDef):
                assert function.module is not None
                function = resolve(function.module, function.node.returns)
            return _typed(function)
        if isinstance(node, ast.Attribute) and (holder := self._infer(node.value, scope)):
            return _looked_up(holder, node.attr)
        return None


def _looked_up(holder: Found, name: str) -> Found | None:
    """The class, function or module that a member of something is or is an object of."""
    if holder.module is not None and holder.node is None:
        found = holder.module.find(name)
        return found and _value(found)
    member = Class(holder).member(name) if isinstance(holder.node, ast.ClassDef) else None
    if member is None:
        return None
    module, made = member
    if isinstance(made, ast.FunctionDef):
        return _typed(resolve(module, made.returns)) if is_property(made) else Found(module, made)
    return _typed(resolve(module, made.annotation)) if isinstance(made, ast.AnnAssign) else None


def _typed(found: Found | None) -> Found | None:
    return found if found is not None and isinstance(found.node, ast.ClassDef) else None


def _value(found: Found) -> Found:
    """What a name of a module is an object of, where it is bound to a value."""
    node = found.node
    if found.module is None or not isinstance(node, ast.AnnAssign | ast.Assign):
        return found
    if isinstance(node, ast.AnnAssign):
        return resolve(found.module, node.annotation) or found
    # Another name of the same thing.
    is_name = isinstance(node.value, ast.Name | ast.Attribute)
    return (resolve(found.module, node.value) if is_name else None) or found


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements in order, those inside conditions and loops too, but of no function or class."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _flat(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from _flat(handler.body)


def _expressions(statement: ast.AST) -> Iterator[ast.AST]:
    """The expressions of a statement, but for those of statements inside it."""
    for node in ast.iter_child_nodes(statement):
        if not isinstance(node, ast.stmt | ast.excepthandler):
            yield node
            yield from _expressions(node)


def _own(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names that a function binds."""
    names = {one.arg for one in ast.walk(node.args) if isinstance(one, ast.arg)}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
    return names
