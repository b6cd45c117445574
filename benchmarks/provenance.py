"""Where and from what a result came: what every line of results carries."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSIONS = ("vllm", "torch", "transformers")


def revision() -> str | None:
    """The commit of this tree, `-dirty` if it was changed since; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Of the packages that results depend on, as far as they are installed."""
    found = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """The processor's name as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def command() -> str:
    """The command line of this process; of absolute paths, which are one machine's, the name."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv)
    return shlex.join(["python", *words])


@cache
def provenance() -> dict[str, Any]:
    """The same for all results of this process."""
    return {
        "command": command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "revision": revision(),
        "versions": versions(),
        "processor": processor(),
    }
