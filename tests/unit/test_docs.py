"""Pages for users: links lead somewhere, commands exist, README is short."""

from pathlib import Path

import markdown
import pytest
from commands import complaints, json_options
from markdown import ROOT

from vllm_tailorkv import options_page
from vllm_tailorkv.config import load_config

PAGES = markdown.pages()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page: Path) -> None:
    broken = []
    for link in markdown.links(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target.exists() and target.is_relative_to(ROOT)
        if not is_there or (anchor and anchor not in markdown.anchors(target.read_text())):
            broken.append(link)
    assert not broken


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_every_page_is_linked_to() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in markdown.links(page.read_text())
    }
    assert {page.resolve() for page in (ROOT / "docs").glob("*.md")} <= linked


def test_options_are_those_of_the_code() -> None:
    """`vllm-tailorkv options --markdown > docs/OPTIONS.md` mends it."""
    assert (ROOT / "docs/OPTIONS.md").read_text() == options_page.markdown()


def test_complaints() -> None:
    """What is wrong is seen."""
    assert complaints("vllm-tailorkv nothing --x") == ["nothing"]
    assert complaints("vllm-tailorkv plan M --cpu --host-gibs 3") == ["--host-gibs"]
    assert complaints("vllm-tailorkv --nothing") == ["--nothing"]
    assert complaints("FOO=1 make demos TOKEN=3 TOKENS=3  # why") == ["demos", "TOKEN=3"]
    assert complaints("python benchmarks/none.py") == ["benchmarks/none.py"]
    assert complaints("python benchmarks/peers.py --model x --contexts 3") == ["--contexts"]
    assert complaints("pip install -r requirements/none.txt") == ["requirements/none.txt"]
    assert complaints("vllm serve M --port 3 --attention-backends x") == ["--attention-backends"]
    assert complaints("bash benchmarks/gpu/none.sh") == ["benchmarks/gpu/none.sh"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands(page: Path) -> None:
    wrong = {}
    for command in markdown.commands(page.read_text()):
        if found := complaints(command):
            wrong[command] = found
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_commands(page: Path) -> None:
    for command in markdown.commands(page.read_text()):
        for options in json_options(command):
            load_config(options)
