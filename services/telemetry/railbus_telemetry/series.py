"""The logs tree as its one writer sees it: append, rotate, close; after every kill as if nothing had happened.

A day has up to three files, and a line moves only on:

    trainer.log.jsonl          its lines while a period is open. Once that ends the file is set apart: it grows no more
    trainer.log.jsonl.begun    what comes while a plain file that was set apart joins the closed one, which may take
                               seconds, or fail and be tried again; then this one takes its name, and grows on
    trainer.log.jsonl.gz       all that was closed

The invariant: when `append` returns its lines are on disk, and from then on each stands, at every instant, in a whole
file; in one, but for the instants between the closed file's rename and the plain one's end (`closing`), of which
readers and the next start know. When it raises, none of them counts. Each key that was ever written is known: from the
plain files, or from what is saved (`sidecar`) before one of them goes (`recovery`).

Methods block on the disk. One process holds the lock of the root; in it one thread appends and one closes, and the two
meet for instants, under one lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Final

from railbus_shared import clock, files
from railbus_shared.errors import StorageFull
from railbus_shared.layout import BEGUN_LOG_NAME, CLOSED_LOG_NAME, LOG_NAME, Layout
from railbus_telemetry import closing, removing
from railbus_telemetry.appending import PlainFiles
from railbus_telemetry.closing import IsStopping
from railbus_telemetry.lines import DAY_NS
from railbus_telemetry.periods import PERIOD_NS, Period, Rotation, day_of
from railbus_telemetry.recovery import SEEN_DAYS, has_plain, recovered
from railbus_telemetry.runs import Run
from railbus_telemetry.seen import Seen
from railbus_telemetry.sidecar import SIDECAR_NAME, Sidecar

logger = logging.getLogger(__name__)

_RETRY_NS: Final = 30 * clock.NS_PER_S


def _nobody(_: Path) -> None:
    """Is told."""


class LogSeries:
    """The one writer of a logs tree; mends what a killed writer left when it is made.

    `on_closed` is told each closed file that has changed, by the thread that closes.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        rotation: Rotation,
        incarnation: str,
        now_ns: Callable[[], int],
        on_closed: Callable[[Path], object] = _nobody,
    ) -> None:
        self._layout = layout
        self._period_ns = PERIOD_NS[rotation]
        self._incarnation = incarnation
        self._now_ns = now_ns
        self._on_closed = on_closed
        self._plain = PlainFiles()
        self._lock = threading.Lock()
        self._not_before_ns = 0
        layout.logs.mkdir(parents=True, exist_ok=True)
        found = recovered(layout, now_ns=now_ns())
        self._memory = found.memory
        self._growing = found.growing
        self._set_apart = found.set_apart

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, runs: Iterable[Run]) -> list[Run]:
        """Write the lines that are not in the files yet; when it returns they are on disk.

        Returns those that were new. On an error nothing was written; raises StorageFull where there was no space.
        """
        with self._lock:
            now_ns = self._now_ns()
            fresh = self._fresh(runs)
            by_day = _by_day(fresh, now_ns)
            self._plain.append({self._growing_file(day): data for day, data in by_day.items()})
            for day in by_day:
                self._growing.setdefault(day, Period(now_ns, now_ns)).last_ns = now_ns
            for run in fresh:
                self._memory.seen.add_all(run.producer, run.number, run.last, now_ns=now_ns)
            return fresh

    def due(self, now_ns: int) -> bool:
        """Whether a period has ended and waits to be closed; a look without the lock, which may be held for long."""
        if 0 < self._not_before_ns - now_ns <= _RETRY_NS:
            return False
        return bool(self._set_apart or self._ended(now_ns))

    def rotate(self, now_ns: int, *, is_stopping: IsStopping = closing.never) -> list[Path]:
        """Close the periods that have ended; returns the closed files.

        Raises LeftOpen as soon as it is stopping; StorageFull or OSError if the disk fails, once all that can be closed
        is. Nothing is lost, and unless it is stopping it is due again after half a minute.
        """
        try:
            return self._close(lambda: self._ended(now_ns), is_stopping=is_stopping)
        except (StorageFull, OSError):
            self._not_before_ns = now_ns + _RETRY_NS
            raise

    def close_all(self, *, is_stopping: IsStopping = closing.never) -> list[Path]:
        """Close every period, ended or not, and return the closed files; the series can be used further.

        Raises as `rotate`; what is not closed stays plain, which is as safe.
        """
        return self._close(lambda: sorted(self._growing), is_stopping=is_stopping)

    @property
    def open_days(self) -> frozenset[date]:
        """Days with lines in a plain file; a look without the lock, which may be held for long."""
        return frozenset([*self._growing, *self._set_apart])

    def set_aside(self, day: date) -> Path | None:
        """Take a whole day out of the tree, in one step; returns the folder to delete, None if the day is open."""
        with self._lock:
            if day in self.open_days or has_plain(self._layout.day(day)):
                return None
            self._memory.closed_bytes.pop(day.isoformat(), None)
            return removing.set_aside(self._layout, day)

    def forget_idle(self, now_ns: int) -> None:
        """Forget producers not heard of for longer than the stream holds what they say; by a clock that is right."""
        with self._lock:
            self._memory.seen.forget_idle(since_ns=now_ns - SEEN_DAYS * DAY_NS)

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

    def _ended(self, now_ns: int) -> list[date]:
        periods = sorted(self._growing.items(), key=lambda item: item[0])
        return [day for day, period in periods if period.has_ended(day, now_ns=now_ns, period_ns=self._period_ns)]

    def _growing_file(self, day: date) -> Path:
        """The file that a day's lines are appended to."""
        return self._layout.day(day) / (BEGUN_LOG_NAME if day in self._set_apart else LOG_NAME)

    # --- closing -----------------------------------------------------------------------------------------------------

    def _close(self, choose: Callable[[], list[date]], *, is_stopping: IsStopping) -> list[Path]:
        """Close what was set apart, and then the days that are chosen; one that fails holds up no other."""
        closed: list[Path | None] = []
        problems: list[Exception] = []
        for day in self._one_by_one(choose):
            try:
                closed.append(self._close_day(day, is_stopping=is_stopping))
            except (StorageFull, OSError) as exc:
                problems.append(exc)
        if problems:
            raise problems[0]
        return list(dict.fromkeys(path for path in closed if path is not None))

    def _one_by_one(self, choose: Callable[[], list[date]]) -> Iterator[date]:
        yield from sorted(self._set_apart)
        yield from (day for day in choose() if day not in self._set_apart)  # else it has been tried

    def _close_day(self, day: date, *, is_stopping: IsStopping) -> Path | None:
        """The closed file; None where somebody has taken the plain one away."""
        plain = self._layout.day(day) / LOG_NAME
        closed = plain.with_name(CLOSED_LOG_NAME)
        if not self._begin_closing(day, plain):
            return None
        if not closing.is_closed(plain):  # as it is where the disk failed before it could go
            self._memory.check_closed(day, closed)
            with closing.staged(plain, is_stopping=is_stopping) as closed_bytes:
                self._remember(day, closed_bytes)
                closing.replace(plain)
        files.fsync_dir(plain.parent)
        self._end_closing(day, plain)
        self._on_closed(closed)
        return closed

    def _begin_closing(self, day: date, plain: Path) -> bool:
        """Set the plain file apart, if it is not yet; returns whether it is there."""
        with self._lock:
            self._plain.settle()
            if day not in self._set_apart:
                self._set_apart.add(day)
                del self._growing[day]
            self._plain.close(plain)
            if plain.exists():
                return True
            logger.error("log is gone before it was closed", extra={"file": str(plain)})
            self._drop(day, plain)
            return False

    def _remember(self, day: date, closed_bytes: int) -> None:
        """Save what was seen, with the size of a closed file that will be."""
        with self._lock:
            self._memory.closed_bytes[day.isoformat()] = closed_bytes
            content = self._memory.content(incarnation=self._incarnation)
        Sidecar.save(self._layout.logs / SIDECAR_NAME, content)

    def _end_closing(self, day: date, plain: Path) -> None:
        # Open as it is, the file is given free only after the lock: of a large one that takes long.
        with plain.open("rb"), self._lock:
            self._plain.settle()
            self._drop(day, plain)

    def _drop(self, day: date, plain: Path) -> None:
        """Let what was begun have the place of a plain file; the lock is held."""
        begun = plain.with_name(BEGUN_LOG_NAME)
        if begun.exists():
            self._plain.rename(begun, plain)
        else:
            plain.unlink(missing_ok=True)
        self._set_apart.remove(day)


def _by_day(runs: Iterable[Run], now_ns: int) -> dict[date, list[bytes]]:
    """The lines of each day's file, in their order."""
    by_day: dict[date, list[bytes]] = {}
    of_own: dict[int, list[bytes]] = {}  # nearly all are of one day, which is not looked for each time
    for run in runs:
        some = of_own.get(run.day_ns)
        if some is None:
            some = of_own[run.day_ns] = by_day.setdefault(day_of(run.day_ns, now_ns=now_ns), [])
        some.append(run.data)
    return by_day
