"""Reading events back from the logs tree, while telemetry writes it or after it was killed.

Days come oldest first, and within a day events stand in the order in which they were written. An event whose time lies
more than a day ahead or a month back stands under the day on which it arrived. Torn tails are left out, in the closed
file as in the plain one; a line that is no JSON is reported and skipped. Memory is bounded, whatever the files hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from railbus_shared import clock, inflate, wire
from railbus_shared.contracts.requests import EventLines, QueryEvents
from railbus_shared.layout import CLOSED_LOG_NAME, LOG_NAME, Layout

logger = logging.getLogger(__name__)

_ANSWER_BYTES: Final = 448 * 1024  # of events in one answer; an answer is at most 512 KiB
_OPEN_TRIES: Final = 100


def read_events(
    layout: Layout,
    *,
    job: str | None = None,
    types: Iterable[str] = (),
    since_ns: int | None = None,
    until_ns: int | None = None,
) -> Iterator[dict[str, object]]:
    """Events that match, oldest day first.

    Args:
        job: only events of this job.
        types: only types that begin with one of these; all if empty.
        since_ns: only events of this time or later.
        until_ns: only events before this time.
    """
    wanted = _Filter.of(job=job, types=types, since_ns=since_ns, until_ns=until_ns)
    for day in _days(layout, wanted):
        yield from _events(layout.day(day), wanted)


def tail_events(
    layout: Layout,
    *,
    limit: int,
    job: str | None = None,
    types: Iterable[str] = (),
    since_ns: int | None = None,
    until_ns: int | None = None,
) -> list[dict[str, object]]:
    """The newest `limit` events that match, oldest first; older days are read only as far as they are needed."""
    wanted = _Filter.of(job=job, types=types, since_ns=since_ns, until_ns=until_ns)
    newest: deque[dict[str, object]] = deque()
    for day in reversed(_days(layout, wanted)):
        found = deque(_events(layout.day(day), wanted), maxlen=limit - len(newest))
        newest.extendleft(reversed(found))
        if len(newest) >= limit:
            break
    return list(newest)


async def query(layout: Layout, request: QueryEvents) -> EventLines:
    """Answer a request without holding up the loop; an answer that would be too large loses its oldest events."""
    return await asyncio.to_thread(_answer, layout, request)


def _answer(layout: Layout, request: QueryEvents) -> EventLines:
    since_ns = None if request.since is None else clock.parse_rfc3339(request.since)
    found = tail_events(layout, limit=request.limit + 1, job=request.job, types=request.types, since_ns=since_ns)
    kept = _fitting(found[-request.limit :])
    return EventLines(events=tuple(kept), truncated=len(kept) < len(found))


def _fitting(events: list[dict[str, object]]) -> list[dict[str, object]]:
    """The newest of the events that fit into one answer, in either encoding."""
    left = _ANSWER_BYTES
    for at in range(len(events) - 1, -1, -1):
        left -= max(len(wire.encode(events[at], encoding=encoding)) for encoding in wire.Encoding) + 1
        if left < 0:
            return events[at + 1 :]
    return events


# --- what matches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Filter:
    job: str | None
    types: tuple[str, ...]
    since_ns: int | None
    until_ns: int | None
    job_bytes: bytes
    type_bytes: tuple[bytes, ...]
    """What a line that matches must hold somewhere; quick to look for before the line is parsed."""

    @classmethod
    def of(cls, *, job: str | None, types: Iterable[str], since_ns: int | None, until_ns: int | None) -> _Filter:
        prefixes = tuple(types)
        job_bytes = b"" if job is None else b'"job":' + orjson.dumps(job)
        type_bytes = tuple(b'"type":' + orjson.dumps(prefix)[:-1] for prefix in prefixes)
        return cls(job, prefixes, since_ns, until_ns, job_bytes, type_bytes)

    def may_match(self, line: bytes) -> bool:
        return self.job_bytes in line and (not self.type_bytes or any(part in line for part in self.type_bytes))

    def matches(self, event: dict[str, object]) -> bool:
        if self.job is not None and event.get("job") != self.job:
            return False
        if self.types and not str(event.get("type")).startswith(self.types):
            return False
        if self.since_ns is None and self.until_ns is None:
            return True
        time_ns = clock.parse_rfc3339(str(event.get("time")))
        return (self.since_ns is None or time_ns >= self.since_ns) and (
            self.until_ns is None or time_ns < self.until_ns
        )


def _days(layout: Layout, wanted: _Filter) -> list[date]:
    return [
        day
        for day in layout.log_days()
        if (wanted.since_ns is None or _midnight_ns(day + timedelta(days=1)) > wanted.since_ns)
        and (wanted.until_ns is None or _midnight_ns(day) < wanted.until_ns)
    ]


def _midnight_ns(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * clock.NS_PER_S


# --- one day ---------------------------------------------------------------------------------------------------------


def _events(folder: Path, wanted: _Filter) -> Iterator[dict[str, object]]:
    for line in day_lines(folder):
        event = _matching(line, wanted, folder) if wanted.may_match(line) else None
        if event is not None:
            yield event


def _matching(line: bytes, wanted: _Filter, folder: Path) -> dict[str, object] | None:
    try:
        event = orjson.loads(line)
        return event if isinstance(event, dict) and wanted.matches(event) else None
    except ValueError as exc:
        logger.warning("unreadable log line", extra={"folder": str(folder), "problem": str(exc), "bytes": len(line)})
        return None


def day_lines(folder: Path) -> Iterator[bytes]:
    """Every line of a day once, without its newline, though the writer may be closing a period at this instant."""
    with contextlib.ExitStack() as stack:
        closed, plain = _opened(folder, stack)
        if closed is not None:
            skips_plain = plain is not None and inflate.ends_with(closed, plain)
            members = inflate.Members(closed)
            yield from inflate.complete_lines(members.chunks())
            if members.is_torn:
                logger.warning("closed log is torn", extra={"folder": str(folder), "whole_bytes": members.whole_end})
            if skips_plain:
                return
        if plain is not None:
            plain.seek(0)
            yield from inflate.complete_lines(inflate.chunks_of(plain))


def _opened(folder: Path, stack: contextlib.ExitStack) -> tuple[BinaryIO | None, BinaryIO | None]:
    """The closed and the plain file of a day as they were at one instant.

    The writer puts a plain file's lines into the closed file, and then removes it. So the plain one is opened first:
    if it still has its name once the closed one is open, then its lines are in at most the last member.
    """
    for _ in range(_OPEN_TRIES):
        with contextlib.ExitStack() as attempt:
            plain = _open(folder / LOG_NAME, attempt)
            closed = _open(folder / CLOSED_LOG_NAME, attempt)
            if plain is None or _has_name(plain):
                stack.push(attempt.pop_all())
                return closed, plain
    raise TimeoutError(f"the log in {str(folder)!r} changes faster than it can be opened")


def _open(path: Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    try:
        return stack.enter_context(path.open("rb"))
    except FileNotFoundError:
        return None


def _has_name(file: BinaryIO) -> bool:
    return os.fstat(file.fileno()).st_nlink > 0
