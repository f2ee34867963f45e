"""What telemetry does beside writing: indexes of closed days for readers, and what goes as it gets old.

Neither holds up the writer: an index is made from the closed file as a reader sees it, and a day is only renamed while
no line can be written. On a full disk old days still go, and indexes are left undone. For a day after the clock has
jumped nothing goes for its age, neither a day of the log nor what is known of a producer.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from railbus_shared import clock
from railbus_shared.errors import StorageFull
from railbus_shared.layout import Layout
from railbus_shared.metrics import Metrics
from railbus_shared.waiting import whole
from railbus_telemetry import indexing, removing
from railbus_telemetry.removing import Outdated, Rules
from railbus_telemetry.series import LogSeries

logger = logging.getLogger(__name__)

_LOOK_S: Final = 60.0
_FINISH_S: Final = 2.0
_JUMP_S: Final = 3600.0
_STEADY_S: Final = 86_400.0


class Upkeep:
    """One for each writer; `run` may be cancelled at any time. `tell` records an event."""

    def __init__(
        self, layout: Layout, rules: Rules, *, tell: Callable[..., None], metrics: Metrics, look_s: float = _LOOK_S
    ) -> None:
        self._layout = layout
        self._rules = rules
        self._tell = tell
        self._look_s = look_s
        self._closed: deque[Path] = deque()
        """Folders whose closed file has changed."""
        self._has_closed = asyncio.Event()
        self._stopping = threading.Event()
        self._clock = SteadyClock()
        self._days = metrics.counter("log_days_removed", "Days of the log that were removed, by reason.", "reason")
        self._bytes = metrics.counter("log_bytes_removed", "Bytes of the log that were removed.")
        self._tree_bytes = metrics.gauge("log_tree_bytes", "Bytes of the log files.")

    def note_closed(self, closed: Path) -> None:
        """Have the day of a closed file indexed."""
        if closed.parent not in self._closed:
            self._closed.append(closed.parent)
        self._has_closed.set()

    async def run(self, series: LogSeries) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._index())
                tasks.create_task(self._remove(series))
        finally:
            self._stopping.set()

    async def finish(self) -> None:
        """Index what was closed at last, if that is quickly done; else the next start does it."""
        self._stopping = threading.Event()  # another one: what `run` has left under way must not go on
        try:
            async with asyncio.timeout(_FINISH_S):
                while self._closed:
                    await asyncio.to_thread(self._update, self._closed.popleft(), rests=False)
        except TimeoutError:
            logger.info("a log is left without its index: there was no time")
        finally:
            self._stopping.set()

    # --- indexes -----------------------------------------------------------------------------------------------------

    async def _index(self) -> None:
        backlog = await asyncio.to_thread(self._unindexed)
        while True:
            if self._closed:
                await asyncio.to_thread(self._update, self._closed.popleft(), rests=True)
            elif backlog:
                await asyncio.to_thread(self._update, backlog.pop(), rests=True)
            else:
                self._has_closed.clear()
                await self._has_closed.wait()

    def _unindexed(self) -> list[Path]:
        stopping, folders = self._stopping, map(self._layout.day, self._layout.log_days())
        return [folder for folder in folders if not stopping.is_set() and not _is_indexed(folder)]

    def _update(self, folder: Path, *, rests: bool) -> None:
        try:
            indexing.update(folder, is_stopping=self._stopping.is_set, rests=rests)
        except (StorageFull, OSError) as exc:  # no index: readers read more, and the next start makes it
            logger.info("a log is not indexed", extra={"folder": str(folder), "problem": str(exc)})

    # --- removal -----------------------------------------------------------------------------------------------------

    async def _remove(self, series: LogSeries) -> None:
        while True:
            try:
                await asyncio.to_thread(removing.sweep, self._layout)
                await self._remove_outdated(series)
            except OSError as exc:  # the disk fails; what is left over is swept at the next look
                logger.error("a log cannot be removed", extra={"problem": str(exc)})  # noqa: TRY400 - no bug
            await asyncio.sleep(self._look_s)

    async def _remove_outdated(self, series: LogSeries) -> None:
        now_ns = clock.now_ns()
        is_steady = self._clock.is_steady(now_ns, boottime_s=clock.boottime_s())
        if is_steady:
            await asyncio.to_thread(series.forget_idle, now_ns)
        rules = self._rules if is_steady else Rules(None, self._rules.total_bytes)
        for one in await self._outdated(series, rules, now_ns):
            await self._remove_day(one, series)

    async def _remove_day(self, one: Outdated, series: LogSeries) -> None:
        # Not beyond the end of this, when another process may write the root.
        aside = await whole(asyncio.get_running_loop().run_in_executor(None, series.set_aside, one.day.day))
        if aside is not None:
            self._report(one)
            await asyncio.to_thread(shutil.rmtree, aside)

    async def _outdated(self, series: LogSeries, rules: Rules, now_ns: int) -> list[Outdated]:
        days = await asyncio.to_thread(removing.measured, self._layout)
        self._tree_bytes.set(sum(day.num_bytes for day in days))
        today = datetime.fromtimestamp(now_ns // clock.NS_PER_S, tz=UTC).date()
        return removing.outdated(days, today=today, rules=rules, open_days=series.open_days)

    def _report(self, one: Outdated) -> None:
        self._days.labels(one.reason).inc()
        self._bytes.inc(one.day.num_bytes)
        logger.info("removed a day of the log", extra={"day": one.day.day.isoformat(), "reason": one.reason})
        self._tell("logs.removed", day=one.day.day.isoformat(), bytes=one.day.num_bytes, reason=one.reason)


def _is_indexed(folder: Path) -> bool:
    try:
        return indexing.is_indexed(folder)
    except OSError:  # what is wrong is told when the index is made
        return False


class SteadyClock:
    """Whether the wall clock can be believed when it says that a day is old: not for a day after it has jumped."""

    def __init__(self) -> None:
        self._offset_s: float | None = None
        self._not_before_s = 0.0

    def is_steady(self, now_ns: int, *, boottime_s: float) -> bool:
        """Tell it the time now and then."""
        offset_s = now_ns / clock.NS_PER_S - boottime_s
        if self._offset_s is not None and abs(offset_s - self._offset_s) > _JUMP_S:
            logger.warning("the clock has jumped: for a day no log is removed for its age")
            self._not_before_s = boottime_s + _STEADY_S
        self._offset_s = offset_s
        return boottime_s >= self._not_before_s
