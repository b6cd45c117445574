"""What the processes of a program tell each other: failures, and what one says for all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_tailorkv import failures
from vllm_tailorkv.errors import TailorKVError

# Several processes at a time, as vLLM's workers are, and then the first process itself.
PROGRAM = """
import subprocess, sys, tempfile
from vllm_tailorkv import failures
tempfile.tempdir = sys.argv[1]
failures.report_in_one_line()
code = "from vllm_tailorkv.failures import is_first_to_say as f; print(f('one'), f('two'))"
workers = [
    subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(4)
]
said = [worker.communicate()[0].split() for worker in workers]
print([words.count("True") for words in zip(*said)])
print(failures.is_first_to_say("one"), failures.is_first_to_say("three"))
"""


def run(program: str, *arguments: str) -> list[str]:
    """A program of its own, whatever this one is."""
    environment = {name: value for name, value in os.environ.items() if name != failures._FILE}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_one_of_several_processes_says_it(tmp_path: Path) -> None:
    assert run(PROGRAM, str(tmp_path)) == ["[1, 1]", "False True"]
    assert not list(tmp_path.iterdir())


def test_a_process_without_a_program_says_it(tmp_path: Path) -> None:
    code = "from vllm_tailorkv.failures import is_first_to_say as f; print(f('one'), f('one'))"
    assert run(code) == ["True True"]


@failures.noted
def fail(words: str) -> None:
    raise TailorKVError(words)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where another process, the first, looks for a note."""
    path = tmp_path / "note"
    monkeypatch.setenv("_TAILORKV_FAILURE", f"0:{path}")
    return path


def test_the_last_note_counts(file: Path) -> None:
    file.touch()
    for words in ("a long sentence", "a short one"):
        with pytest.raises(TailorKVError, match=words):
            fail(words)
        assert file.read_text() == words


def test_no_file_is_made_where_nobody_looks(file: Path) -> None:
    """The first process may be on another machine."""
    with pytest.raises(TailorKVError, match="a sentence"):
        fail("a sentence")
    assert not file.exists()
