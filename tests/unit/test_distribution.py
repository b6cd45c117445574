"""What an sdist holds, and what a wheel that is built from it holds, without compiling anything."""

import os
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import vllm_tailorkv

ROOT = Path(__file__).parents[2]
VERSION = vllm_tailorkv.__version__
PACKAGES = ("vllm_tailorkv", "kernels", "patches")
BUILT = ("*.so", "__pycache__", "build", "*.egg-info", "*.pyc")


def setup(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=folder,
        env=os.environ | {"TAILORKV_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is unpacked from the sdist of a copy of the clone."""
    clone, made = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("made")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in (*PACKAGES, "csrc", "docs", "examples", "requirements"):
            copytree(path, clone / path.name, symlinks=True, ignore=ignore_patterns(*BUILT))
        elif path.is_file():
            (clone / path.name).write_bytes(path.read_bytes())
    setup(clone, "sdist", "--dist-dir", str(made))
    (archive,) = made.iterdir()
    assert archive.name == f"vllm_tailorkv-{VERSION}.tar.gz"
    with tarfile.open(archive) as content:
        content.extractall(made, filter="data")
    return made / f"vllm_tailorkv-{VERSION}"


@pytest.fixture(scope="module")
def built(sdist: Path) -> Path:
    """The Python part of a wheel of the sdist."""
    setup(sdist, "build_py", "--build-lib", "out")
    return sdist / "out"


def sources(folder: str, patterns: Sequence[str]) -> set[str]:
    """Files of the clone under a folder, without what a build leaves."""
    found = {path for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_the_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    wanted = sources("csrc", ["*.h", "*.cpp", "*.cu", "*.cuh"])
    for package in PACKAGES:
        wanted |= sources(package, ["*.py", "*.json", "py.typed"])
    links = ("vllm_tailorkv/kernels/", "vllm_tailorkv/patches/")
    wanted = {name for name in wanted if not name.startswith(links)}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
    assert len(wanted) > 130
    assert wanted <= found
    assert not [name for name in found if name.endswith(".so")]


def test_a_wheel_of_it_holds_every_module(built: Path) -> None:
    found = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    wanted = sources("vllm_tailorkv", ["*.py", "*.json", "py.typed"])
    for package in ("kernels", "patches"):
        wanted |= {f"vllm_tailorkv/{name}" for name in sources(package, ["*.py"])}
    assert {"vllm_tailorkv/kernels/triton/dense.py", "vllm_tailorkv/py.typed"} <= wanted
    assert found == wanted


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "vllm_tailorkv.__version__"
    }
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
    assert VERSION not in (ROOT / "setup.py").read_text()
