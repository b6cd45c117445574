"""docs/TROUBLESHOOTING.md quotes messages that exist, and all that stop a start."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import markdown
import pytest
from markdown import ROOT

MESSAGES = list(markdown.first_cells((ROOT / "docs/TROUBLESHOOTING.md").read_text()))
PLACEHOLDER = "…"
SHORTEST = 10
"""Of what is quoted literally: less would be found anywhere."""
MOST = 0.6
"""Share of a message's literal text that the page must have."""
RAISERS = ("TailorKVError", "_refuse", "logger.warning", "logger.warning_once", "_warn_once")
FRAME = "--attention-backend tailorkv: "
"""What refusals begin with."""


def python_files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def literals(node: ast.AST) -> list[str]:
    """Texts in an expression, those of f-strings between their values."""
    return [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def all_texts() -> list[str]:
    folders = (ROOT / "vllm_tailorkv", ROOT / "kernels", ROOT / "patches", ROOT / "setup.py")
    texts = [
        text for path in python_files(*folders) for text in literals(ast.parse(path.read_text()))
    ]
    return texts + [path.read_text() for path in (ROOT / "csrc").rglob("*.cpp")]


TEXTS = all_texts()


def fragments(message: str) -> list[str]:
    """What is literal in a message."""
    return [part.strip() for part in message.split(PLACEHOLDER) if part.strip(" ;:,.()")]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_exists(message: str) -> None:
    parts = fragments(message)
    assert max(map(len, parts)) >= SHORTEST
    missing = [part for part in parts if not any(part in text for text in TEXTS)]
    assert not missing


def raised(path: Path) -> Iterator[list[str]]:
    """The texts of every message that a file raises or logs as a warning."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func)
        is_value = name == "ValueError" and path.name in ("config.py", "profile.py")
        if name in RAISERS or is_value:
            texts = [text.removeprefix(FRAME) for text in literals(node.args[0])]
            texts = [part for text in texts for part in re.split(r"%[\d.]*[dfgs]", text)]
            if texts := [text for text in texts if len(text.strip()) >= SHORTEST]:
                yield texts


def is_quoted(texts: list[str], rows: list[list[str]]) -> bool:
    """Whether one row of the page has most of a message."""

    def shared(row: list[str]) -> int:
        return sum(max((len(part) for part in row if part in text), default=0) for text in texts)

    return max(map(shared, rows)) >= MOST * sum(len(text.strip()) for text in texts)


def test_every_message_is_quoted() -> None:
    rows = [fragments(message.removeprefix(FRAME)) for message in MESSAGES]
    folders = ("vllm_tailorkv", "patches", "kernels")
    files = python_files(*(ROOT / folder for folder in folders))
    found = [texts for path in files for texts in raised(path)]
    assert len(found) > 100
    assert not [texts for texts in found if not is_quoted(texts, rows)]
