"""What a start does to the tree, whatever a former writer was killed at: it is mended, and what it holds is known.

Every key on disk is known afterwards, as far as the stream can still bring it: plain files are read; what closed files
hold the sidecar says, and those that are not as it says are read, the newest of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Final

import orjson

from railbus_shared import clock, files, log_reader
from railbus_shared.layout import BEGUN_LOG_NAME, CLOSED_LOG_NAME, LOG_NAME, Layout
from railbus_telemetry import mending
from railbus_telemetry.periods import Period
from railbus_telemetry.sidecar import SIDECAR_NAME, Sidecar

logger = logging.getLogger(__name__)

SEEN_DAYS: Final = 8  # the stream holds a message for seven
_REBUILD_DAYS: Final = 2
_DAY_S: Final = 86_400


@dataclass
class Found:
    """What is on disk."""

    memory: Sidecar
    growing: dict[date, Period] = field(default_factory=dict)
    """Days with a file that grows."""
    set_apart: set[date] = field(default_factory=set)
    """Days whose plain file waits to be closed, while another one grows beside it."""


def recovered(layout: Layout, *, now_ns: int) -> Found:
    """Mend all that a killed writer left; raises StorageFull, OSError."""
    sidecar = layout.logs / SIDECAR_NAME
    mending.remove_litter(layout.logs)
    found = Found(Sidecar.load(sidecar) or Sidecar())
    days = list(layout.log_days())
    unknown = _unknown(layout, days, found.memory)
    for day in days:
        if day in days[-_REBUILD_DAYS:] or has_plain(layout.day(day)):
            _mend_day(day, layout.day(day), found, now_ns)
        else:
            mending.remove_litter(layout.day(day))
    if unknown:
        told = {"sidecar": str(sidecar), "days": [day.isoformat() for day in unknown]}
        logger.warning("what was seen is read anew from the newest logs", extra=told)
    for day in unknown:
        for line in log_reader.day_lines(layout.day(day)):
            if (key := mending.key_of(line)) is not None:
                found.memory.seen.add(*key, now_ns=now_ns)
    return found


def has_plain(folder: Path) -> bool:
    """Whether a day has lines that are not closed, or may have."""
    return (folder / LOG_NAME).exists() or (folder / BEGUN_LOG_NAME).exists()


def _mend_day(day: date, folder: Path, found: Found, now_ns: int) -> None:
    plain, begun = folder / LOG_NAME, folder / BEGUN_LOG_NAME
    mending.remove_litter(folder)
    found.memory.check_closed(day, folder / CLOSED_LOG_NAME)

    def mend(path: Path) -> bool:
        return mending.mend_plain(path, note=lambda *key: found.memory.seen.add(*key, now_ns=now_ns))

    has_begun, has_first = mend(begun), mend(plain)
    if has_begun and has_first:
        found.set_apart.add(day)
    elif has_begun:
        begun.replace(plain)
        files.fsync_dir(folder)
    if has_begun or has_first:
        found.growing[day] = Period(_first_ns(begun if day in found.set_apart else plain), now_ns)


def _unknown(layout: Layout, days: Sequence[date], memory: Sidecar) -> list[date]:
    """Days whose closed file is not as the sidecar says, of those written last: what is older cannot come again."""
    closed: dict[date, os.stat_result] = {}
    for day in days:
        with contextlib.suppress(FileNotFoundError):
            closed[day] = (layout.day(day) / CLOSED_LOG_NAME).stat()
    newest_s = max((one.st_mtime for one in closed.values()), default=0.0)
    unknown = [
        day
        for day, one in closed.items()
        if not memory.knows_closed(day, one.st_size) and newest_s - one.st_mtime < _REBUILD_DAYS * _DAY_S
    ]
    return unknown[-SEEN_DAYS:]


def _first_ns(plain: Path) -> int:
    """The time of a file's first line: near enough to when it was written, and no harm if it is not."""
    with plain.open("rb") as file:
        first = file.readline()
    try:
        return clock.parse_rfc3339(str(orjson.loads(first)["time"]))
    except (ValueError, KeyError, TypeError):
        return 0
