"""Commands keep libraries quiet, also those that are imported later and set their logs up then."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import logging
from vllm_tailorkv.quiet import quiet
quiet()
import huggingface_hub.utils.logging
print(logging.getLogger("huggingface_hub.utils").getEffectiveLevel() == logging.ERROR)
"""


def test_the_hubs_client_tells_errors_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]


# vLLM warns here of Triton without a backend for CPUs, before it sets its log up.
CHILD = """
import multiprocessing
{before}

def speak():
    import logging, torch
    logging.getLogger("vllm.triton_utils").warning("a warning of vLLM")
    logging.getLogger("vllm.engine").error("an error of vLLM")
    import warnings
    warnings.warn("a warning of Python")
    a = torch.ones(3)
    torch.add(a, a, out=torch.ones(2))

if __name__ == "__main__":
    {quiet}
    process = multiprocessing.get_context("spawn").Process(target=speak)
    process.start()
    process.join()
"""


def said_by_a_child(tmp_path: Path, before: str, quiet: str) -> str:
    """What a process of vLLM's would say that such a program has started."""
    program = tmp_path / "program.py"
    program.write_text(CHILD.format(before=before, quiet=quiet))
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VLLM_LOGGING", "PYTHONWARN", "TORCH_CPP", "_TAILORKV"))
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        env=kept | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def test_processes_of_a_quiet_command_tell_errors_alone(tmp_path: Path) -> None:
    quiet = "from vllm_tailorkv.quiet import quiet; quiet()"
    assert said_by_a_child(tmp_path, "import vllm_tailorkv.cli", quiet) == "an error of vLLM\n"


def test_others_tell_everything(tmp_path: Path) -> None:
    said = said_by_a_child(tmp_path, "import vllm_tailorkv.cli", "pass")
    for text in ("a warning of vLLM", "an error of vLLM", "a warning of Python", "resize"):
        assert text in said
