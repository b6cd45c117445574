"""What every process of a program would say is said by one of them."""

import os
import subprocess
import sys
from pathlib import Path

from vllm_tailorkv import failures

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
