"""The Python sources of a vLLM release, to be read and never imported.

The installed release is read where it lies. Of any other, pip fetches the source archive from the
index that it is set up for, checks its hash, and the `.py` files are kept in the user's cache:

    python tests/support/vllm_source.py 0.33.0
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HASHES = {
    "0.32.0": "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad",
    "0.33.0": "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
}
"""SHA-256 of the source archives of the releases that are known."""

_SECONDS = 300


class NoSource(Exception):
    """The sources cannot be had; the message says why, and what to do."""


def installed_version() -> str | None:
    """The release that is installed, without what follows a plus."""
    try:
        return importlib.metadata.version("vllm").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder(version: str) -> Path:
    """Where the sources of a release are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm_tailorkv" / f"vllm-{version}"


def source_of(version: str) -> Path:
    """A folder that holds `vllm/`, the package of a release.

    Raises:
        NoSource: it is not there and cannot be downloaded.
    """
    if version == installed_version():
        # Without importing it: that takes seconds, and this process may have another on its path.
        spec = find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parents[1]
    folder = cache_folder(version)
    if not folder.is_dir():
        _download(version, folder)
    return folder


def _download(version: str, folder: Path) -> None:
    """Put the `.py` files of a release into `folder`: all of them or none."""
    if version not in HASHES:
        raise NoSource(f"vLLM {version}: the hash of its source archive is not in HASHES")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the place that it is to have, so that a rename puts it there as a whole.
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        said = _unpack(version, work)
        package = next((found.parent for found in work.glob("pip-*/*/vllm/__init__.py")), None)
        if package is None:
            raise NoSource(
                f"the source of vLLM {version} cannot be downloaded: {said}\nThis test needs the "
                f"package index that pip is set up for, once; then {folder} is read. To try it "
                f"alone: {Path(sys.executable).name} {Path(__file__).name} {version}"
            )
        for path in package.rglob("*.py"):
            target = work / "kept" / "vllm" / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        try:
            (work / "kept").rename(folder)
        except OSError:
            # Another process was faster, and its sources are the same.
            if not folder.is_dir():
                raise


def _unpack(version: str, work: Path) -> str:
    """Have pip unpack a source archive under `work`; what it said, should it not have.

    pip then asks the archive for its metadata, which a machine without vLLM's build tools cannot
    give. That is no matter here: the files stay, by `--no-clean`.
    """
    wanted = work / "wanted.txt"
    wanted.write_text(f"vllm=={version} --hash=sha256:{HASHES[version]}\n")
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download"),
        *("--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--no-clean"),
        *("--dest", str(work), "--requirement", str(wanted)),
    ]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(work)},
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"pip did not end in {_SECONDS} seconds"
    return (done.stderr or done.stdout).strip()


if __name__ == "__main__":
    try:
        print(source_of(*sys.argv[1:]))
    except NoSource as error:
        sys.exit(str(error))
