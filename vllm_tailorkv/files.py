"""Files that are whole at any time: an interrupted program leaves the old one or the new one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to be written in the place of `path`, which it takes once it is whole and on disk.

    What is interrupted or fails leaves `path` as it was. What is killed may leave `NAME.new`, which
    the next one overwrites.

    Raises:
        OSError: nothing can be written there.
    """
    # A link stays one, to the new file.
    path = path.resolve()
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            # Else a crash of the system could leave the new name with nothing behind it.
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Text, UTF-8; see `replaced`."""
    with replaced(path) as file:
        file.write(text.encode())
