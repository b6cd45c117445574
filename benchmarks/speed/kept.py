"""What a file of lines holds already of the run that is to go on with it."""

import json
from pathlib import Path
from typing import Any

from vllm_tailorkv.files import write_whole

_REMEDY = "name another file with --json, or remove it"


def kept_records(
    path: Path, settings: dict[str, Any], remedy: str = _REMEDY
) -> list[dict[str, Any]]:
    """The records of a file; a last line that was cut is taken out of it.

    Args:
        settings: what every record must say.
        remedy: what to do about those that do not.

    Raises:
        ValueError: a line is of another run, or none at all.
        OSError: the file cannot be read or written.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) and _is_cut(line):
                del lines[-1]
                break
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is no line of results; {remedy}")
        for name, value in settings.items():
            if record.get(name) != value:
                told = json.dumps(record.get(name))
                raise ValueError(
                    f"{path}: line {number} was made with {name} {told}, not {json.dumps(value)}; "
                    f"{remedy}"
                )
        records.append(record)
    whole = "".join(f"{line}\n" for line in lines)
    if whole != text:
        write_whole(path, whole)
    return records


def _is_cut(line: str) -> bool:
    """The beginning of a record, or zeros where a system stopped before it wrote one to disk."""
    written = line.strip("\0 ")
    return not written or written.startswith("{")
