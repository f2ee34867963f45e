"""The logs tree as its one writer sees it: append, rotate, close; after every kill as if nothing had happened.

A day's lines go to its plain file. While that is being closed, which may take seconds or fail, they go to another one
(`BEGUN_LOG_NAME`), which takes the name of the plain file once that has joined the closed one.

Invariants:
- when `append` returns, its lines are on disk, each once; when it raises, none of them counts
- at every instant each line stands in a whole file: in a plain file until the closed one has it (`closing`)
- what was seen is saved (`sidecar`) before a plain file goes, so plain files and sidecar together know every key

The event's own time decides the day; a time that cannot be right goes to the current day. Methods block on the disk.
Any thread of the one process that holds the lock of the root may call them: one lock is held for an append and for
instants of a closing, another by the one closing that is under way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final, Literal

import orjson

from railbus_shared import clock, files, log_reader
from railbus_shared.errors import StorageFull
from railbus_shared.layout import BEGUN_LOG_NAME, CLOSED_LOG_NAME, LOG_NAME, Layout
from railbus_telemetry import closing, removing
from railbus_telemetry.appending import PlainFiles
from railbus_telemetry.closing import IsStopping
from railbus_telemetry.lines import DAY_NS
from railbus_telemetry.runs import Run
from railbus_telemetry.seen import Seen
from railbus_telemetry.sidecar import SIDECAR_NAME, Sidecar

logger = logging.getLogger(__name__)

Rotation = Literal["hourly", "daily"]

_PERIOD_NS: Final[dict[Rotation, int]] = {"hourly": 3600 * clock.NS_PER_S, "daily": DAY_NS}
_IDLE_NS: Final = 60 * clock.NS_PER_S
_RETRY_NS: Final = 30 * clock.NS_PER_S
_AHEAD_DAYS: Final = 1
_BEHIND_DAYS: Final = 30
_SEEN_DAYS: Final = 8  # the stream holds a message for seven
_REBUILD_DAYS: Final = 2
_DAY_S: Final = DAY_NS // clock.NS_PER_S


@dataclass
class _Period:
    """What is known of a plain file that has lines."""

    first_ns: int
    """When its first line was written."""
    last_ns: int


class LogSeries:
    """The one writer of a logs tree; mends what a killed writer left when it is made."""

    def __init__(self, layout: Layout, *, rotation: Rotation, incarnation: str, now_ns: Callable[[], int]) -> None:
        self._layout = layout
        self._period_ns = _PERIOD_NS[rotation]
        self._incarnation = incarnation
        self._now_ns = now_ns
        self._plain = PlainFiles()
        self._periods: dict[int, _Period] = {}
        """Days with a file that grows."""
        self._set_apart: dict[int, _Period] = {}
        """Days whose plain file is being closed, or waits for it; what comes goes to the file that was begun."""
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._not_before_ns = 0
        layout.logs.mkdir(parents=True, exist_ok=True)
        self._memory = Sidecar()
        self._recover()

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, runs: Iterable[Run]) -> list[Run]:
        """Write the lines that are not in the files yet; when it returns they are on disk.

        Returns those that were new. On an error nothing was written; raises StorageFull where there was no space.
        """
        with self._lock:
            self._mend_suspects()
            now_ns = self._now_ns()
            fresh = self._fresh(runs)
            by_day: dict[int, list[bytes]] = {}
            for run in fresh:
                by_day.setdefault(_day_of(run.day_ns, now_ns=now_ns), []).append(run.data)
            self._plain.append({self._growing(day): data for day, data in by_day.items()})
            for day in by_day:
                self._periods.setdefault(day, _Period(now_ns, now_ns)).last_ns = now_ns
            for run in fresh:
                self._memory.seen.add_all(run.producer, run.number, run.last, now_ns=now_ns)
            return fresh

    def due(self, now_ns: int) -> bool:
        """Whether a period has ended and waits to be closed."""
        if 0 < self._not_before_ns - now_ns <= _RETRY_NS:
            return False
        return bool(self._set_apart or self._ended(now_ns))

    def rotate(self, now_ns: int, *, is_stopping: IsStopping = closing.never) -> list[Path]:
        """Close the periods that have ended; returns the closed files.

        Raises LeftOpen as soon as it is stopping, StorageFull if there is no space, OSError if the disk fails
        otherwise; nothing is lost, and unless it is stopping it is due again after half a minute.
        """
        try:
            closed = self._close(lambda: self._ended(now_ns), is_stopping=is_stopping)
        except (StorageFull, OSError):
            self._not_before_ns = now_ns + _RETRY_NS
            raise
        with self._lock:
            self._memory.seen.forget_idle(since_ns=now_ns - _SEEN_DAYS * DAY_NS)
        return closed

    def close_all(self, *, is_stopping: IsStopping = closing.never) -> list[Path]:
        """Close every period, ended or not, and return the closed files; the series can be used further.

        Raises as `rotate`; what is not closed stays plain, which is as safe.
        """
        return self._close(lambda: sorted(self._periods), is_stopping=is_stopping)

    @property
    def open_days(self) -> frozenset[date]:
        """Days with lines in a plain file."""
        return frozenset(map(_date, [*self._periods, *self._set_apart]))

    def set_aside(self, day: date) -> Path | None:
        """Take a whole day out of the tree, in one step; returns the folder to delete, None if the day is open."""
        with self._lock:
            if day in self.open_days or _has_plain(self._layout.day(day)):
                return None
            self._memory.closed_bytes.pop(day.isoformat(), None)
            return removing.set_aside(self._layout, day)

    # --- choosing ----------------------------------------------------------------------------------------------------

    def _fresh(self, runs: Iterable[Run]) -> list[Run]:
        """What is in no file, each line once; nearly always a run is new as a whole."""
        seen, taken = self._memory.seen, Seen()
        fresh: list[Run] = []
        for run in runs:
            span = run.producer, run.number, run.last
            if seen.is_free(*span) and taken.is_free(*span):
                fresh.append(run)
            else:
                keyed = (((one.producer, one.number), one) for one in run.singles())
                fresh += [one for key, one in keyed if key not in seen and key not in taken]
            taken.add_all(*span, now_ns=0)
        return fresh

    def _ended(self, now_ns: int) -> list[int]:
        periods = sorted(self._periods.items(), key=lambda item: item[0])
        return [day for day, period in periods if self._has_ended(day, period, now_ns)]

    def _has_ended(self, day: int, period: _Period, now_ns: int) -> bool:
        if period.first_ns // self._period_ns != now_ns // self._period_ns:
            return True
        is_late = day != now_ns - now_ns % DAY_NS
        return is_late and not 0 <= now_ns - period.last_ns < _IDLE_NS

    def _folder(self, day_ns: int) -> Path:
        return self._layout.day(_date(day_ns))

    def _growing(self, day: int) -> Path:
        """The file that a day's lines are appended to."""
        return self._folder(day) / (BEGUN_LOG_NAME if day in self._set_apart else LOG_NAME)

    # --- closing -----------------------------------------------------------------------------------------------------

    def _close(self, choose: Callable[[], list[int]], *, is_stopping: IsStopping) -> list[Path]:
        """Close what waits for it, and then the days that are chosen."""
        with self._closing:
            closed = [self._close_day(day, is_stopping=is_stopping) for day in sorted(self._set_apart)]
            closed += [self._close_day(day, is_stopping=is_stopping) for day in choose()]
        return list(dict.fromkeys(path for path in closed if path is not None))

    def _close_day(self, day: int, *, is_stopping: IsStopping) -> Path | None:
        """The closed file; None where somebody has taken the plain one away."""
        plain = self._folder(day) / LOG_NAME
        if not self._begin_closing(day, plain):
            return None
        if not closing.is_closed(plain):  # as it is where the disk failed before it could go
            self._stage(day, plain, is_stopping=is_stopping)
            closing.commit(plain)
        self._end_closing(day, plain)
        return plain.with_name(CLOSED_LOG_NAME)

    def _begin_closing(self, day: int, plain: Path) -> bool:
        """Set the plain file apart, so that it changes no more; returns whether it is there."""
        with self._lock:
            self._mend_suspects()
            if day in self._periods and day not in self._set_apart:
                self._set_apart[day] = self._periods.pop(day)
            if day not in self._set_apart:
                return False
            self._plain.close(plain)
            if plain.exists():
                return True
            logger.error("log is gone before it was closed", extra={"file": str(plain)})
            self._drop(day, plain)
            return False

    def _stage(self, day: int, plain: Path, *, is_stopping: IsStopping) -> None:
        try:
            self._check_closed(day)
            self._remember(day, closing.stage(plain, is_stopping=is_stopping))
        except BaseException:
            self._take_up_again(day)
            closing.discard(plain)
            raise

    def _take_up_again(self, day: int) -> None:
        """Let a file grow further that was not closed, unless another one was begun meanwhile."""
        with self._lock:
            self._mend_suspects()
            if day not in self._periods:
                self._periods[day] = self._set_apart.pop(day)

    def _remember(self, day: int, closed_bytes: int) -> None:
        """Save what was seen, with the size of a closed file that will be."""
        with self._lock:
            self._memory.closed_bytes[_date(day).isoformat()] = closed_bytes
            content = self._memory.content(incarnation=self._incarnation)
        Sidecar.save(self._layout.logs / SIDECAR_NAME, content)

    def _end_closing(self, day: int, plain: Path) -> None:
        # Open as it is, the file is given free only after the lock: of a large one that takes long.
        with plain.open("rb"), self._lock:
            self._mend_suspects()
            self._drop(day, plain)
        files.fsync_dir(plain.parent)

    def _drop(self, day: int, plain: Path) -> None:
        """Let what was begun have the place of a plain file; the lock is held."""
        begun = plain.with_name(BEGUN_LOG_NAME)
        if begun.exists():
            self._plain.rename(begun, plain)
        else:
            plain.unlink(missing_ok=True)
        self._set_apart.pop(day, None)

    # --- mending -----------------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Mend all that a killed writer left, and remember what is on disk."""
        sidecar = self._layout.logs / SIDECAR_NAME
        closing.remove_litter(self._layout.logs)
        loaded = Sidecar.load(sidecar)
        self._memory = loaded or Sidecar()
        days = list(self._layout.log_days())
        unknown = self._unknown(days)
        for day in days:
            day_ns = _day_ns(day)
            if day in days[-_REBUILD_DAYS:] or _has_plain(self._folder(day_ns)):
                self._mend_day(day_ns)
            else:
                closing.remove_litter(self._folder(day_ns))
        if unknown:
            told = {"sidecar": str(sidecar), "days": [day.isoformat() for day in unknown]}
            logger.warning("what was seen is read anew from the newest logs", extra=told)
        for day in unknown:
            self._note_day(self._layout.day(day))

    def _unknown(self, days: Sequence[date]) -> list[date]:
        """Days whose closed file is not as the sidecar says, of those written last: what is older cannot come again."""
        found: dict[date, os.stat_result] = {}
        for day in days:
            with contextlib.suppress(FileNotFoundError):
                found[day] = (self._layout.day(day) / CLOSED_LOG_NAME).stat()
        newest_s = max((closed.st_mtime for closed in found.values()), default=0.0)
        known = self._memory.closed_bytes
        unknown = [
            day
            for day, closed in found.items()
            if closed.st_size != known.get(day.isoformat()) and newest_s - closed.st_mtime < _REBUILD_DAYS * _DAY_S
        ]
        return unknown[-_SEEN_DAYS:]

    def _mend_suspects(self) -> None:
        """See what a failed append has left of its files; the lock is held."""
        for path in list(self._plain.suspects):
            day = _day_ns(date(*(int(part) for part in path.parent.parts[-3:])))
            self._periods.pop(day, None)
            self._mend(path, day, self._periods)
            self._plain.suspects.discard(path)

    def _mend_day(self, day: int) -> None:
        folder = self._folder(day)
        plain, begun = folder / LOG_NAME, folder / BEGUN_LOG_NAME
        closing.remove_litter(folder)
        self._check_closed(day)
        if self._mend(begun, day, self._periods):
            if self._mend(plain, day, self._set_apart):
                return
            self._plain.rename(begun, plain)
            files.fsync_dir(folder)
        else:
            self._mend(plain, day, self._periods)

    def _mend(self, path: Path, day: int, periods: dict[int, _Period]) -> bool:
        if not closing.mend_plain(path, note=self._note):
            return False
        periods[day] = _Period(_first_ns(path), self._now_ns())
        return True

    def _check_closed(self, day: int) -> None:
        """See that the closed file is whole, unless it has the size that this or a former writer left."""
        closed, name = self._folder(day) / CLOSED_LOG_NAME, _date(day).isoformat()
        if closed.exists() and closed.stat().st_size != self._memory.closed_bytes.get(name):
            whole_bytes = closing.mend_closed(closed)
            with self._lock:
                self._memory.closed_bytes[name] = whole_bytes

    def _note(self, producer: str, number: int) -> None:
        self._memory.seen.add(producer, number, now_ns=self._now_ns())

    def _note_day(self, folder: Path) -> None:
        for line in log_reader.day_lines(folder):
            key = closing.keys_of(line)
            if key is not None:
                self._note(*key)


def _has_plain(folder: Path) -> bool:
    return (folder / LOG_NAME).exists() or (folder / BEGUN_LOG_NAME).exists()


def _day_of(day_ns: int, *, now_ns: int) -> int:
    """The day whose file an event goes to: its own, unless its clock must have been wrong."""
    today = now_ns - now_ns % DAY_NS
    return day_ns if -_BEHIND_DAYS * DAY_NS <= day_ns - today <= _AHEAD_DAYS * DAY_NS else today


def _date(day_ns: int) -> date:
    return datetime.fromtimestamp(day_ns // clock.NS_PER_S, tz=UTC).date()


def _day_ns(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * clock.NS_PER_S


def _first_ns(plain: Path) -> int:
    """The time of a file's first line: near enough to when it was written, and no harm if it is not."""
    with plain.open("rb") as file:
        first = file.readline()
    try:
        return clock.parse_rfc3339(str(orjson.loads(first)["time"]))
    except (ValueError, KeyError, TypeError):
        return 0
