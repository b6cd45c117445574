"""Markdown as tests read it: headings, links, code blocks, code spans, tables."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.M)


def pages() -> list[Path]:
    """Every page that users are sent to."""
    found = [*ROOT.glob("*.md")]
    for folder in ("docs", "benchmarks", "examples"):
        found += (ROOT / folder).rglob("*.md")
    return sorted(found)


def prose(text: str) -> str:
    """The text without its code blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of the links and images."""
    return _LINK.findall(_SPAN.sub("", prose(text)))


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(prose(text)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", shown).strip().replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def commands(text: str) -> Iterator[str]:
    """Lines of console blocks, continued ones joined, without prompts; and code spans."""
    for language, block in _FENCE.findall(text):
        if language in ("console", "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield line.removeprefix("$ ").strip()
    for span in _SPAN.findall(prose(text)):
        yield " ".join(span.split())


def first_cells(text: str) -> Iterator[str]:
    """Code in the first column of the tables, what is beside each other with `…` between."""
    for line in prose(text).splitlines():
        if line.startswith("| `"):
            yield "…".join(_SPAN.findall(line.split(" | ")[0]))
