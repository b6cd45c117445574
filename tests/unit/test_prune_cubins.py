"""Only machine code that another GPU would run is blanked."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks/gpu"))

from prune_cubins import CONTAINER, ENTRY, MACHINE_CODE, MAGIC, PTX, entries, prune


def container(*codes: tuple[int, int]) -> bytes:
    """Pieces of 100 bytes of a kind and for an architecture."""
    body = b""
    for kind, arch in codes:
        body += ENTRY.pack(kind, 257, ENTRY.size, 100, 0, arch) + bytes([arch]) * 100
    return CONTAINER.pack(MAGIC, 1, CONTAINER.size, len(body)) + body


def kept(data: bytearray) -> list[list[tuple[int, int]]]:
    """Kinds and architectures of what is not blank, by container."""
    return [[(kind, arch) for kind, arch, at in of if any(data[at])] for of in entries(data)]


def test_prune() -> None:
    first = container((MACHINE_CODE, 80), (MACHINE_CODE, 90), (PTX, 90))
    second = container((MACHINE_CODE, 80), (PTX, 80), (PTX, 120))
    other = MAGIC.to_bytes(4, "little") + b"no container"
    data = bytearray(b"before" + first + other + b"between" + second + b"after")
    size = len(data)
    assert prune(data, 90) == 3 * 100
    assert kept(data) == [[(MACHINE_CODE, 90), (PTX, 90)], [(PTX, 80)]]
    assert len(data) == size
    assert data.startswith(b"before")
    assert data.endswith(b"after")
    assert other + b"between" in data


@pytest.mark.parametrize("data", [b"", b"nothing", container()[:-1] + b"\xff"])
def test_nothing_to_blank(data: bytes) -> None:
    assert prune(bytearray(data), 90) == 0
