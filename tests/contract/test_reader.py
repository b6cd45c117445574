"""What reads the sources finds what is missing, and nothing else."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import vllm_source
from source_tree import SourceTree
from source_uses import Uses
from vllm_source import NoSource, cache_folder, source_of

HOUSE = {
    "house/__init__.py": """
import typing
LAZY = {"Door": "house.door"}
if typing.TYPE_CHECKING:
    from .door import Door
else:
    def __getattr__(name: str): ...
""",
    "house/door.py": """
from dataclasses import dataclass, field
from enum import Enum

class Colour(Enum):
    RED = 1

@dataclass(frozen=True, kw_only=True)
class Size:
    width: int
    height: int = 2
    area: int = field(init=False)

class Door:
    size: Size | None = None

    def __init__(self, size: Size) -> None:
        self.size = size
        self.handle = "left"

    @property
    def colour(self) -> Colour: ...

    def open(self, angle: float, *, slowly: bool = False) -> "Door": ...

    @staticmethod
    def of(width: int) -> "Door": ...

def find_door(name: str, floor: int = 0) -> Door: ...
""",
    "house/plan.py": """
from .door import Door as Entrance
try:
    from elsewhere import fast
except ImportError:
    fast = None
""",
}
GUEST = """
from dataclasses import dataclass
import house
from house import door, Door
from house.door import Colour, Size, find_door
from house.plan import Entrance, fast

class Gate(Door):
    def open(self, angle: float, *, slowly: bool = False, wide: bool = True) -> Door:
        return self.of(3) if self.handle else super().open(angle, slowly=slowly)

@dataclass(frozen=True, kw_only=True)
class Depth(Size):
    depth: int

def enter(it: Door, other: object) -> None:
    from house.door import find_door as found
    inner, colour = found("front", floor=1), Colour.RED
    inner.open(90).open(1.5, slowly=True)
    print(it.size.width, inner.colour.name, door.Size(width=1), Depth(width=1, depth=2), fast)
    print(other.anything)
    if isinstance(other, Entrance):
        print(other.handle)
"""

PLANTS = [
    ("class Door:", "class Gateway:", "house has no Door"),
    ("def find_door(", "def look(", "house.door has no find_door"),
    ("RED = 1", "BLUE = 1", "Colour has no RED"),
    ("    width: int", "    breadth: int", "Size has no width"),
    ("    width: int", "    breadth: int", "door.Size does not take width"),
    ("    width: int", "    breadth: int", "Depth does not take width"),
    ("height: int = 2", "height: int", "door.Size wants height too"),
    ("floor: int = 0", "storey: int = 0", "found does not take floor"),
    ("angle: float, *, slowly", "*, slowly", "takes 0 arguments by position, not 1"),
    ('self.handle = "left"', "pass", "Gate has no handle"),
    ('self.handle = "left"', "pass", "Door has no handle"),
    ("def colour(self)", "def paint(self)", "Door has no colour"),
    ("slowly: bool = False", "fast: bool = False", "Gate.open differs from what it overrides"),
    ("def of(width: int)", "def of()", "self.of takes 0 arguments by position, not 1"),
    ("def find_door", "class Entrance: ...\ndef find_door", None),
]


def build(folder: Path, sources: dict[str, str]) -> SourceTree:
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return SourceTree({"house": folder / "house", "guest": folder / "guest"})


def faults(folder: Path, sources: dict[str, str]) -> list[str]:
    tree = build(folder, {**sources, "guest/__init__.py": "", "guest/visit.py": GUEST})
    return [str(fault) for fault in sorted(Uses(tree, "guest", "house").faults)]


def test_all_is_there(tmp_path: Path) -> None:
    tree = build(tmp_path, {**HOUSE, "guest/__init__.py": "", "guest/visit.py": GUEST})
    uses = Uses(tree, "guest", "house")
    assert uses.faults == set()
    assert uses.own == {"Depth.depth"}
    assert uses.counts.imports == 8
    assert min(vars(uses.counts).values()) > 0


@pytest.mark.parametrize(
    ("old", "new", "text"), PLANTS, ids=[f"{new} {text}" for _, new, text in PLANTS]
)
def test_plants_are_found(tmp_path: Path, old: str, new: str, text: str | None) -> None:
    assert old in HOUSE["house/door.py"]
    planted = HOUSE | {"house/door.py": HOUSE["house/door.py"].replace(old, new, 1)}
    found = faults(tmp_path, planted)
    if text is None:
        assert found == []
    else:
        assert [line for line in found if line.startswith("guest.visit:") and text in line], found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("house/plan.py", "there is no module house.plan"),
        ("house/door.py", "there is no module house.door"),
    ],
)
def test_a_module_that_is_gone(tmp_path: Path, name: str, text: str) -> None:
    left = {other: source for other, source in HOUSE.items() if other != name}
    assert any(text in line for line in faults(tmp_path, left))


def test_a_name_for_type_checkers_alone_is_none(tmp_path: Path) -> None:
    eager = HOUSE["house/__init__.py"].replace("def __getattr__(name: str): ...", "Door = None")
    assert faults(tmp_path, HOUSE | {"house/__init__.py": eager}) == []
    nothing = eager.replace("Door = None", "pass")
    found = faults(tmp_path, HOUSE | {"house/__init__.py": nothing})
    assert found[0].partition(": ")[2] == "house has no Door"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vllm_source, "installed_version", lambda: None)
    return tmp_path


def test_no_index_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 1, "", "no route to host")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(NoSource, match=r"(?s)vLLM 0\.33\.0 .*no route to host.*package index"):
        source_of("0.33.0")
    assert not cache_folder("0.33.0").exists()
    assert list((cache / "vllm_tailorkv").iterdir()) == []


def test_sources_are_kept_without_the_rest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(
        command: list[str], env: dict[str, str], **_: Any
    ) -> "subprocess.CompletedProcess[str]":
        calls.append(Path(command[-1]).read_text())
        build(
            Path(env["TMPDIR"], "pip-1", "vllm_2"),
            {"vllm/__init__.py": "a = 1", "vllm/inner/b.py": "", "vllm/c.cu": "", "setup.py": ""},
        )
        return subprocess.CompletedProcess(command, 1, "", "no metadata")

    monkeypatch.setattr(subprocess, "run", download)
    for _ in range(2):
        folder = source_of("0.33.0")
        kept = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        assert kept == ["vllm/__init__.py", "vllm/inner/b.py"]
    assert calls == [f"vllm==0.33.0 --hash=sha256:{vllm_source.HASHES['0.33.0']}\n"]
    assert [path.name for path in folder.parent.iterdir()] == ["vllm-0.33.0"]


def test_a_version_without_a_hash_is_not_downloaded(cache: Path) -> None:
    with pytest.raises(NoSource, match="hash"):
        source_of("0.31.0")
