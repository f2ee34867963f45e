"""How much memory a process may still take without anybody being killed for it.

That is the least of what the host has available and of what each memory group of the process, up to the root of its
hierarchy, leaves below its limit. What a group keeps of files counts as free: the kernel drops it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from railbus_runner import hierarchies

_MEMINFO: Final = Path("/proc/meminfo")
_RESERVE_BYTES: Final = 64 << 20
_FILES: Final = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
"""Of version 2 and of version 1: limit, use, and what of the use are files, in `memory.stat`."""


def spare_bytes() -> int:
    """Bytes that this process may take now, with a reserve left for what others take meanwhile; at least 0."""
    left = [left for group in _own_groups() if (left := group_left(group)) is not None]
    return max(0, min([available_bytes(_MEMINFO.read_text(encoding="ascii")), *left]) - _RESERVE_BYTES)


def available_bytes(meminfo: str) -> int:
    """What the text of `/proc/meminfo` says is available."""
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10


def group_left(group: Path) -> int | None:
    """Bytes that a memory group leaves below its limit; None where it has none, or does not tell."""
    for limit_name, use_name, of_files in _FILES:
        try:
            limit = (group / limit_name).read_text(encoding="ascii").strip()
            use = int((group / use_name).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:  # of the other version, or not ours to read
            continue
        if limit == "max":
            return None
        return max(0, int(limit) - use + sum(int(stat.get(name, 0)) for name in of_files))
    return None


def _own_groups() -> Iterator[Path]:
    """The memory groups that this process is in, from its own up to the one that is mounted."""
    for controller in ("", "memory"):
        places = hierarchies.own_places(controller)
        for own in places[:1]:
            yield own
            yield from (folder for folder in own.parents if any(folder.is_relative_to(root) for root in places[1:]))
