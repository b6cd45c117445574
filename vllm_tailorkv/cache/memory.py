"""How much memory there is left for a tier."""

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
# Of both versions: the limit, what is used of it, and the prefix of sums that include children.
_VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", ""),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_",
    ),
)


def available_memory() -> int:
    """Bytes that this machine, or the container that this is, has left.

    Memory that only caches files counts as left: reading a checkpoint fills all there is.
    """
    available = psutil.virtual_memory().available
    for limit_file, usage_file, sums_file, prefix in _VERSIONS:
        try:
            limit = int((_CGROUPS / limit_file).read_text())
            used = int((_CGROUPS / usage_file).read_text())
            sums = dict(line.split() for line in (_CGROUPS / sums_file).read_text().splitlines())
        except (OSError, ValueError):
            # Not this version, or no limit ("max").
            continue
        for kind in ("active_file", "inactive_file"):
            used -= int(sums.get(prefix + kind, 0))
        available = min(available, limit - used)
    return max(0, available)
