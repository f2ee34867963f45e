"""Events of the past for people: from the files of the root, or asked of telemetry where there are none."""

from __future__ import annotations

import contextlib
import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.session import connected, run, session

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.bus.follow import Seam
    from railbus_shared.contracts.logs import QueryEvents

_PAGE: Final = 1000
_MOST_ASKED: Final = 100_000
_MOST_WARNINGS: Final = 10
Event = Mapping[str, object]


@dataclass(frozen=True)
class Wanted:
    """Which events are meant."""

    types: tuple[str, ...] = ()
    since_ns: int | None = None
    until_ns: int | None = None
    pattern: re.Pattern[str] | None = None
    job: str | None = None

    def matches(self, event: Event) -> bool:
        """For events from the bus, whose job is asked for there."""
        if self.types and not str(event.get("type", "")).startswith(self.types):
            return False
        if self.since_ns is not None and not self._is_late_enough(event):
            return False
        return self.pattern is None or self.pattern.search(_text(event)) is not None

    def _is_late_enough(self, event: Event) -> bool:
        from railbus_shared import clock

        try:
            return clock.parse_rfc3339(str(event.get("time"))) >= (self.since_ns or 0)
        except ValueError:
            return False


def history(wanted: Wanted, *, newest: int | None, seam: Seam | None = None) -> Iterator[dict[str, object]]:
    """Events that match, oldest first; at most the newest so many. What is behind the seam is left to the stream."""
    is_here = session().layout.logs.is_dir()
    with _damage_told():
        for event in _from_files(wanted, newest) if is_here else run(_asked(wanted, newest)):
            if seam is None or not seam.is_behind(event):
                yield event


def _from_files(wanted: Wanted, newest: int | None) -> Iterable[dict[str, object]]:
    from railbus_shared.log_reader import read_events, tail_events

    layout = session().layout
    if newest is None:
        return read_events(
            layout,
            job=wanted.job,
            types=wanted.types,
            since_ns=wanted.since_ns,
            until_ns=wanted.until_ns,
            pattern=wanted.pattern,
        )
    return tail_events(
        layout,
        limit=newest,
        job=wanted.job,
        types=wanted.types,
        since_ns=wanted.since_ns,
        until_ns=wanted.until_ns,
        pattern=wanted.pattern,
    )


async def _asked(wanted: Wanted, newest: int | None) -> Iterable[dict[str, object]]:
    async with connected() as client:
        return await asked(client, wanted, newest=newest)


async def asked(client: Client, wanted: Wanted, *, newest: int | None = None) -> Iterable[dict[str, object]]:
    """Asked of telemetry page by page, the newest first; what the pattern leaves out is asked for as well."""
    limit = _MOST_ASKED if newest is None else newest
    found: deque[dict[str, object]] = deque()
    answer = await client.events(_query(wanted, limit))
    while True:
        found.extendleft(event for event in reversed(answer.events) if _has_pattern(event, wanted.pattern))
        if answer.older is None or len(found) >= limit:
            break
        answer = await client.events(_query(wanted, limit - len(found), before=answer.older))
    if newest is None and answer.truncated:
        click.echo(f"only the newest {len(found):,} events: the log files are not on this host", err=True)
    while len(found) > limit:
        found.popleft()
    return found


def _query(wanted: Wanted, limit: int, *, before: str | None = None) -> QueryEvents:
    from railbus_shared import clock
    from railbus_shared.contracts.logs import QueryEvents

    since, until = (None if ns is None else clock.rfc3339(ns) for ns in (wanted.since_ns, wanted.until_ns))
    size = min(limit, _PAGE) if wanted.pattern is None else _PAGE
    fields = {"job": wanted.job, "types": wanted.types, "since": since, "until": until}
    return QueryEvents.parse({**fields, "limit": size, "before": before})


def _has_pattern(event: Event, pattern: re.Pattern[str] | None) -> bool:
    return pattern is None or pattern.search(_text(event)) is not None


def _text(event: Event) -> str:
    import orjson

    return orjson.dumps(event).decode()


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Say on stderr what of the files cannot be read, as far as that is not too much to say."""
    logger, handler = logging.getLogger("railbus_shared.day_log"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if handler.left_out:
            click.echo(f"warning: {handler.left_out:,} more lines or members cannot be read", err=True)


class _Warnings(logging.Handler):
    """Writes the first records."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._written = 0
        self.left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._written == _MOST_WARNINGS:
            self.left_out += 1
            return
        self._written += 1
        where = getattr(record, "folder", "")
        at = getattr(record, "at_byte", None)
        problem = getattr(record, "problem", "" if at is None else f"at byte {at:,}")
        click.echo(f"warning: {record.getMessage()} in {where}: {problem}", err=True)
