"""Commands as pages and examples quote them: whether what they name exists."""

import ast
import contextlib
import importlib.util
import io
import itertools
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from markdown import ROOT

from vllm_tailorkv import cli

OPTION = re.compile(r"--[a-z][\w-]*")


def words(command: str) -> list[str]:
    """A command's words, without what is set for it and without a comment."""
    try:
        found = shlex.split(command, comments=True)
    except ValueError:  # a code span that is no command
        return []
    while found and re.match(r"[A-Z_]+=", found[0]):
        found = found[1:]
    for separator in ("&&", "|", ">", "2>&1"):
        if separator in found:
            found = found[: found.index(separator)]
    return found


@cache
def help_of(*command: str) -> str:
    """What a subcommand says of itself."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return said.getvalue()


@cache
def script_options(script: Path) -> frozenset[str]:
    """Option strings of a script and of what it imports from beside it."""
    seen: set[Path] = set()
    found: set[str] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update([node.value] if OPTION.fullmatch(node.value) else [])
            if isinstance(node, ast.ImportFrom | ast.Import):
                modules = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                for module in [*modules, *(f"{modules[0]}.{a.name}" for a in node.names)]:
                    beside = script.parent / f"{module.replace('.', '/')}.py"
                    waiting += [beside] if module and beside.exists() else []
    return frozenset(found | {"--help"})


def of_subcommand(arguments: list[str], options: list[str]) -> list[str]:
    if arguments[0].startswith("-"):
        return [option for option in options if option not in help_of()]
    if not re.search(rf"^ +{re.escape(arguments[0])}\b", help_of(), re.M):
        return [arguments[0]]
    return [o for o in options if not re.search(rf"{o}(?![\w-])", help_of(arguments[0]))]


def of_make(arguments: list[str], _: list[str]) -> list[str]:
    makefile, wrong = (ROOT / "Makefile").read_text(), []
    for argument in arguments:
        variable, is_set, _ = argument.partition("=")
        pattern = rf"^{variable} \?=" if is_set else rf"^{argument}:"
        wrong += [] if re.search(pattern, makefile, re.M) else [argument]
    return wrong


def of_python(arguments: list[str], options: list[str]) -> list[str]:
    script = ROOT / arguments[0]
    if script.suffix != ".py":
        return []
    if not script.exists():
        return [arguments[0]]
    return [option for option in options if option not in script_options(script)]


def of_bash(arguments: list[str], _: list[str]) -> list[str]:
    is_ours = arguments[0].endswith(".sh") and not arguments[0].startswith(".")
    return [arguments[0]] if is_ours and not (ROOT / arguments[0]).exists() else []


def of_pip(arguments: list[str], _: list[str]) -> list[str]:
    pairs = itertools.pairwise(arguments)
    return [file for option, file in pairs if option == "-r" and not (ROOT / file).exists()]


def of_vllm(_: list[str], options: list[str]) -> list[str]:
    """By vLLM's sources, since its parser takes many seconds to import."""
    vllm = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    files = ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py")
    text = "\n".join((vllm / file).read_text() for file in files)
    wrong = []
    for option in options:
        field = option.removeprefix("--").replace("-", "_")
        is_there = f'"{option}"' in text or re.search(rf"^    {field}:", text, re.MULTILINE)
        wrong += [] if is_there else [option]
    return wrong


CHECKS = {
    "vllm": of_vllm,
    "vllm-tailorkv": of_subcommand,
    "make": of_make,
    "python": of_python,
    "python3": of_python,
    "bash": of_bash,
    "pip": of_pip,
}


def complaints(command: str) -> list[str]:
    """What of a command of ours does not exist."""
    program, *arguments = words(command) or [""]
    if program not in CHECKS or not arguments:
        return []
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    return CHECKS[program](arguments, options)


def json_options(command: str) -> list[Any]:
    """Options of tailorkv that a command gives as JSON."""
    arguments = words(command)
    found = []
    for option, text in itertools.pairwise(arguments):
        if option == "--additional-config" and text.startswith("{"):
            found.append(json.loads(text)["tailorkv"])
    for argument in arguments:
        if argument.startswith("CONFIG="):
            found.append(json.loads(argument.removeprefix("CONFIG=")))
    return found
