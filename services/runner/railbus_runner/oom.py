"""How many processes the kernel killed for want of memory while an attempt ran.

Exact where the attempt's own group counts. Else the count comes from the smallest surroundings that do, from the
moment the group was made: the group of this process, or the whole host. Then it is evidence, not proof, and means
something only together with a SIGKILL that nobody of ours sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_runner import hierarchies

_VMSTAT: Final = Path("/proc/vmstat")
_FILES: Final = ("memory.events", "memory.oom_control")
"""Of version 2, and of version 1."""


@dataclass(frozen=True)
class Baseline:
    """A counter of the kernel, and what it showed before the attempt."""

    counter: Path
    count: int


def baseline(groups: Iterable[Path]) -> Baseline | None:
    """The closest counter to the groups; None on a kernel that has none."""
    for path in _counters(groups):
        count = read_oom_kills(path)
        if count is not None:
            return Baseline(path, count)
    return None


def kills_since(before: Baseline) -> int:
    """Kills since then; 0 if the counter is gone."""
    count = read_oom_kills(before.counter)
    return max(0, count - before.count) if count is not None else 0


def read_oom_kills(path: Path) -> int | None:
    """The value of `oom_kill` in a file of names and numbers; None if it has none."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:  # not there, not readable, or its group was removed: all mean that it does not count for us
        return None
    return next((int(value) for name, _, value in (line.partition(" ") for line in lines) if name == "oom_kill"), None)


def _counters(groups: Iterable[Path]) -> Iterator[Path]:
    yield from (group / name for group in groups for name in _FILES)
    for controller in ("", "memory"):
        own_and_root = hierarchies.own_places(controller)
        if len(own_and_root) > 1:  # a root group counts nothing
            yield from (own_and_root[0] / name for name in _FILES)
    yield _VMSTAT
