"""`make lint` passes: style, types and the format of C++."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
CPP = sorted(
    str(path)
    for folder in (ROOT / "csrc", ROOT / "tests/support")
    for path in folder.rglob("*")
    if path.suffix in SUFFIXES
)
COMMANDS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy", "-p", "vllm_tailorkv"],
    "clang-format": ["clang-format", "--dry-run", "-Werror", *CPP],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_clean(name: str) -> None:
    tool, *arguments = COMMANDS[name]
    assert (TOOLS / tool).exists(), "install requirements/dev.txt"
    result = subprocess.run(
        [str(TOOLS / tool), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_makefile_runs_the_same() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("lint:"))
    recipe = [line.strip().removeprefix("$(BIN)/") for line in lines[start + 1 : start + 5]]
    expected = [" ".join(command[:3]) for command in COMMANDS.values()]
    assert [line.startswith(words) for line, words in zip(recipe, expected, strict=True)] == [
        True
    ] * 4
