"""Which days of the log go, by age and by size, and how: a day is there whole or not at all.

The current day never goes, nor one that is still written to. A day is first renamed out of the tree, to a name that
begins with a dot; a process killed before it has deleted that leaves it to the next start.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Final, Literal, NamedTuple

from railbus_shared import files
from railbus_shared.layout import Layout

Reason = Literal["age", "size"]
_ASIDE: Final = ".removed-"


@dataclass(frozen=True)
class Rules:
    """What is kept; None sets no limit."""

    days: int | None
    """Full days before the current one."""
    total_bytes: int | None


class Day(NamedTuple):
    """A day and what its folder holds."""

    day: date
    num_bytes: int


class Outdated(NamedTuple):
    """A day that is to go."""

    day: Day
    reason: Reason


def outdated(days: Sequence[Day], *, today: date, rules: Rules, open_days: Collection[date]) -> list[Outdated]:
    """The days that are to go, oldest first. `days` come oldest first."""
    left_bytes = sum(day.num_bytes for day in days)
    gone: list[Outdated] = []
    for day in days:
        if day.day >= today or day.day in open_days:
            continue
        reason: Reason | None = None
        if rules.days is not None and day.day < today - timedelta(days=rules.days):
            reason = "age"
        elif rules.total_bytes is not None and left_bytes > rules.total_bytes:
            reason = "size"
        if reason is not None:
            gone.append(Outdated(day, reason))
            left_bytes -= day.num_bytes
    return gone


def measured(layout: Layout) -> list[Day]:
    """All days, oldest first, with the bytes of their files."""
    return [Day(day, sum(_sizes(layout.day(day)))) for day in layout.log_days()]


def set_aside(layout: Layout, day: date) -> Path:
    """Rename a day out of the tree, durably, and drop a month and year that it leaves empty; returns the folder."""
    folder, aside = layout.day(day), layout.logs / f"{_ASIDE}{day.isoformat()}"
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    files.fsync_dir(folder.parent)
    with contextlib.suppress(OSError):  # other days are in it
        folder.parent.rmdir()
        folder.parent.parent.rmdir()
    files.fsync_dir(layout.logs)
    return aside


def sweep(layout: Layout) -> int:
    """Delete what was set aside by a process that was killed; returns how many days."""
    left = list(layout.logs.glob(f"{_ASIDE}*"))
    for folder in left:
        shutil.rmtree(folder)
    return len(left)


def _sizes(folder: Path) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield path.stat().st_size
