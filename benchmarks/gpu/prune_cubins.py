"""Blanks the machine code for other GPUs in libraries, in place, so that they compress well.

    python benchmarks/gpu/prune_cubins.py 90 LIBRARY...

Code of the given architecture stays, and PTX where there is none of it. What is blanked must not be
loaded: the libraries serve GPUs of this architecture alone.
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

CONTAINER = struct.Struct("<IHHQ")
"""Magic, version, bytes of the header, bytes of what follows it."""
MAGIC = 0xBA55ED50
ENTRY = struct.Struct("<HHIQ8xII")
"""Kind, version, bytes of the header, bytes of the code, something else, and the architecture."""
PTX, MACHINE_CODE = 1, 2


def entries(data: bytes | bytearray) -> Iterator[list[tuple[int, int, slice]]]:
    """Of each container: kind, architecture and place of each piece of code."""
    at = data.find(struct.pack("<I", MAGIC))
    while at >= 0:
        _, version, header, size = CONTAINER.unpack_from(data, at)
        start, end = at + header, at + header + size
        if version == 1 and header == CONTAINER.size and end <= len(data):
            found = []
            while start < end:
                kind, _, header, size, _, arch = ENTRY.unpack_from(data, start)
                if not header:
                    break
                found.append((kind, arch, slice(start + header, start + header + size)))
                start += header + size
            yield found
        else:
            end = at + 4
        at = data.find(struct.pack("<I", MAGIC), end)


def prune(data: bytearray, arch: int) -> int:
    """Blank in place; the bytes that were blanked."""
    blanked = 0
    for container in list(entries(data)):
        here = any((kind, its) == (MACHINE_CODE, arch) for kind, its, _ in container)
        for kind, its, place in container:
            kept = its == arch if kind == MACHINE_CODE or here else its <= arch
            if not kept:
                data[place] = bytes(place.stop - place.start)
                blanked += place.stop - place.start
    return blanked


def main() -> None:
    """The command line."""
    arch, *paths = sys.argv[1:]
    for path in map(Path, paths):
        data = bytearray(path.read_bytes())
        blanked = prune(data, int(arch))
        path.write_bytes(data)
        print(f"{path.name}: {blanked >> 20} of {len(data) >> 20} MiB blanked")


if __name__ == "__main__":
    main()
