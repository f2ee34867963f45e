"""Reading events back from the logs tree, while telemetry writes it or after it was killed.

Days come oldest first, and within a day events stand in the order in which they were written (`day_log`). An event
whose time lies more than a day ahead or a month back stands under the day on which it arrived. A day that vanishes
meanwhile has no lines. Where a day's index says that nothing can match, its file is not read.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from railbus_shared import clock, wire
from railbus_shared.contracts.logs import EventLines, QueryEvents
from railbus_shared.day_log import DayLog, Place
from railbus_shared.errors import WireError
from railbus_shared.layout import Layout
from railbus_shared.log_filter import Filter

_ANSWER_BYTES: Final = 448 * 1024  # of events in one answer; an answer is at most 512 KiB
_ANSWER_NODES: Final = wire.MAX_NODES - 1000
_BEHIND: Final = "+"


def read_events(
    layout: Layout,
    *,
    job: str | None = None,
    types: Iterable[str] = (),
    since_ns: int | None = None,
    until_ns: int | None = None,
    pattern: re.Pattern[str] | None = None,
) -> Iterator[dict[str, object]]:
    """Events that match, oldest day first.

    Args:
        job: only events of this job.
        types: only types that begin with one of these; all if empty.
        since_ns: only events of this time or later.
        until_ns: only events before this time.
        pattern: only events in whose line it is found.
    """
    wanted = Filter(job, tuple(types), since_ns, until_ns, pattern)
    for day in days_of(layout, wanted):
        with DayLog.opened(layout.day(day)) as log:
            for found in log.events(wanted):
                yield found.event


def tail_events(
    layout: Layout,
    *,
    limit: int,
    job: str | None = None,
    types: Iterable[str] = (),
    since_ns: int | None = None,
    until_ns: int | None = None,
    pattern: re.Pattern[str] | None = None,
) -> list[dict[str, object]]:
    """The newest `limit` events that match, oldest first; no more is read than they need."""
    wanted = Filter(job, tuple(types), since_ns, until_ns, pattern)
    return [found.event for found in _newest(layout, wanted, limit=limit)][::-1]


def day_lines(folder: Path) -> Iterator[bytes]:
    """Every line of a day once, without its newline, though the writer may be closing a period at this instant."""
    with DayLog.opened(folder) as log:
        yield from log.lines()


async def query(layout: Layout, request: QueryEvents) -> EventLines:
    """Answer a request without holding up the loop; an answer that would be too large loses its oldest events."""
    return await asyncio.to_thread(_answer, layout, request)


def _answer(layout: Layout, request: QueryEvents) -> EventLines:
    since_ns, until_ns = (
        None if time is None else clock.parse_rfc3339(time) for time in (request.since, request.until)
    )
    wanted = Filter(request.job, request.types, since_ns, until_ns)
    before = None if request.before is None else _Cursor.parse(request.before)
    found = list(_newest(layout, wanted, limit=request.limit + 1, before=before))
    kept = _fitting(found[: request.limit])
    truncated = len(kept) < len(found)
    return EventLines(
        events=tuple(one.event for one in reversed(kept)),
        truncated=truncated,
        older=str(kept[-1].cursor) if truncated and kept else None,
    )


# --- the newest ------------------------------------------------------------------------------------------------------


class _Cursor(NamedTuple):
    """Where an event stands in the tree; later ones are greater."""

    day: date
    place: Place

    def __str__(self) -> str:
        member, is_behind, offset = self.place
        return f"{self.day.isoformat()}/{member}{_BEHIND if is_behind else ''}/{offset}"

    @classmethod
    def parse(cls, text: str) -> _Cursor:
        """Raises ValueError."""
        day, member, offset = text.split("/")
        is_behind = member.endswith(_BEHIND)
        return cls(date.fromisoformat(day), Place(int(member.removesuffix(_BEHIND)), is_behind, int(offset)))


class _Found(NamedTuple):
    cursor: _Cursor
    event: dict[str, object]


def _newest(layout: Layout, wanted: Filter, *, limit: int, before: _Cursor | None = None) -> Iterator[_Found]:
    """The newest that match, the newest first."""
    for day in reversed(days_of(layout, wanted)):
        if limit <= 0:
            return
        if before is not None and day > before.day:
            continue
        place = before.place if before is not None and day == before.day else None
        with DayLog.opened(layout.day(day)) as log:
            found = log.newest(wanted, limit=limit, before=place)
        limit -= len(found)
        yield from (_Found(_Cursor(day, one.place), one.event) for one in found)


def _fitting(found: list[_Found]) -> list[_Found]:
    """As many of the first as fit into one answer, in either encoding; one that fits into none loses its data."""
    left_bytes, left_nodes = _ANSWER_BYTES, _ANSWER_NODES
    kept: list[_Found] = []
    for one in found:
        needs = _needs(one.event)
        if needs is None:
            said = f"for an answer; it stands in the log of {one.cursor.day.isoformat()}"
            one = one._replace(event={**one.event, "data": {"too_large": said}})  # noqa: PLW2901
            needs = _needs(one.event) or (0, 0)
        left_bytes, left_nodes = left_bytes - needs[0], left_nodes - needs[1]
        if left_bytes < 0 or left_nodes < 0:
            break
        kept.append(one)
    return kept


def _needs(event: dict[str, object]) -> tuple[int, int] | None:
    """Bytes, in the encoding that takes more, and maps and arrays at most; None if no answer can hold the event."""
    try:
        packed, text = (wire.encode({"events": [event]}, encoding=encoding) for encoding in wire.Encoding)
    except WireError:
        return None
    needs = max(len(packed), len(text)), text.count(b"[") + text.count(b"{")
    return needs if needs[0] <= _ANSWER_BYTES and needs[1] <= _ANSWER_NODES else None


def days_of(layout: Layout, wanted: Filter) -> list[date]:
    """The days on which an event may match by its time, oldest first."""
    return [
        day
        for day in layout.log_days()
        if (wanted.since_ns is None or _midnight_ns(day + timedelta(days=1)) > wanted.since_ns)
        and (wanted.until_ns is None or _midnight_ns(day) < wanted.until_ns)
    ]


def _midnight_ns(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * clock.NS_PER_S
