"""`railbus logs`, `events` and `decode`: what happened, from the log files and live from the bus.

The files are read directly where they lie on this host, so that nothing need run; otherwise telemetry is asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import click

from railbus.cli import exit_codes
from railbus.cli.event_lines import EventLines
from railbus.cli.job_names import job_id
from railbus.cli.render import to_console
from railbus.cli.session import connected, exit_with_code_of_another, json_option, root_option, run, session
from railbus.cli.tell import Teller, print_event

_NEWEST: Final = 200
_ASKED: Final = 1000
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PERIOD: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])\Z")
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d\Z")


@dataclass(frozen=True)
class Wanted:
    """Which events are meant."""

    types: tuple[str, ...]
    since_ns: int | None
    pattern: re.Pattern[str] | None
    job: str | None = None

    def matches(self, event: Mapping[str, object]) -> bool:
        """For events from the bus, and for the pattern, which no reader knows."""
        if self.types and not str(event.get("type", "")).startswith(self.types):
            return False
        return self.pattern is None or self.pattern.search(_text(event)) is not None


@click.command()
@click.argument("job", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on as things happen; Ctrl-C only leaves.")
@click.option("--since", metavar="WHEN", help="Only from then on: 90s, 30m, 2h, 3d, or a day or time in UTC.")
@click.option(
    "--type", "types", multiple=True, metavar="TYPE", help="Only types that begin so, e.g. `job.`; may be repeated."
)
@click.option("--grep", "pattern", metavar="REGEX", help="Only events whose JSON matches, whatever the case.")
@click.option("--lines", "-n", type=click.IntRange(min=1), help=f"The newest so many; {_NEWEST} without a JOB.")
@json_option
@root_option
def logs(
    *,
    job: str | None,
    follow: bool,
    since: str | None,
    types: tuple[str, ...],
    pattern: str | None,
    lines: int | None,
    as_json: bool,
) -> int:
    """Show what happened, in words; with a JOB and -f until its end, exiting with its code.

    JOB is an id, the beginning of one, or `@last`.

    \b
      railbus logs -f @last
      railbus logs --since 2h --type job. --grep failed
    """
    wanted = Wanted(types, _since_ns(since), _pattern(pattern))
    if job and follow:
        exit_with_code_of_another()
        return run(_follow_one(job, wanted, as_json=as_json))
    if job:
        wanted = Wanted(wanted.types, wanted.since_ns, wanted.pattern, run(job_id(job)))
    write = print_event if as_json else Teller(to_console(), names_job=not job).tell
    found = _from_files(wanted, newest=lines or (None if job else _NEWEST))
    _write_all(found, write)
    if follow:
        run(_follow_all(wanted, write))
    return exit_codes.OK


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Events from now on, as they happen.")
@click.option("--since", metavar="WHEN", help="Only from then on: 90s, 30m, 2h, 3d, or a day or time in UTC.")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only types that begin so; may be repeated.")
@json_option
@root_option
def events(*, follow: bool, since: str | None, types: tuple[str, ...], as_json: bool) -> None:
    """Every event as it is, one a line: all from the log files, or with -f those from now on.

    On a terminal each is cut to its width; with --json, and wherever else it is written to, it is JSON.
    """
    wanted = Wanted(types, _since_ns(since), None)
    write = print_event if as_json or not sys.stdout.isatty() else EventLines(to_console()).write
    if not follow or since:
        _write_all(_from_files(wanted, newest=None), write)
    if follow:
        run(_follow_all(wanted, write))


@click.command()
def decode() -> None:
    """Turn a msgpack message on stdin into JSON lines, one for each event in it.

    \b
      nats sub --translate 'railbus decode' 'railbus.evt.>'
    """
    from railbus_shared import wire

    message = wire.decode(sys.stdin.buffer.read())
    common, batch = message.get("common"), message.get("events")
    if not isinstance(common, dict) or not isinstance(batch, list):
        print_event(message)
        return
    for event in batch:
        print_event({**common, **event} if isinstance(event, dict) else {**common, "event": event})


async def _follow_one(job: str, wanted: Wanted, *, as_json: bool) -> int:
    from railbus.cli.follow import follow_job
    from railbus.cli.job_names import find_job

    async with connected() as client:
        found = await find_job(client, job)
        record = await follow_job(client, found.id, as_json=as_json, is_wanted=wanted.matches)
    return exit_codes.of_record(record)


async def _follow_all(wanted: Wanted, write: Callable[[Mapping[str, object]], None]) -> None:
    async with connected() as client:
        async for event in client.follow_all():
            if wanted.matches(event):
                write(event)
                sys.stdout.flush()


def _write_all(events: Iterable[Mapping[str, object]], write: Callable[[Mapping[str, object]], None]) -> None:
    for event in events:
        write(event)


def _from_files(wanted: Wanted, *, newest: int | None) -> Iterator[dict[str, object]]:
    """Events from the files of the root, or from telemetry where there are none; oldest first."""
    from railbus_shared.log_reader import read_events, tail_events

    layout = session().layout
    if not layout.logs.is_dir():
        found: Iterable[dict[str, object]] = run(_asked(wanted, limit=min(newest or _ASKED, _ASKED)))
    elif newest is not None and wanted.pattern is None:
        found = tail_events(layout, limit=newest, job=wanted.job, types=wanted.types, since_ns=wanted.since_ns)
    else:
        found = read_events(layout, job=wanted.job, types=wanted.types, since_ns=wanted.since_ns)
    matching = (event for event in found if wanted.matches(event))
    return iter(_last(matching, newest)) if newest is not None else matching


def _last(events: Iterable[dict[str, object]], limit: int) -> Iterable[dict[str, object]]:
    from collections import deque

    return deque(events, maxlen=limit)


async def _asked(wanted: Wanted, *, limit: int) -> tuple[dict[str, object], ...]:
    from railbus_shared import clock
    from railbus_shared.contracts.logs import QueryEvents

    since = None if wanted.since_ns is None else clock.rfc3339(wanted.since_ns)
    async with connected() as client:
        query = QueryEvents(job=wanted.job, types=wanted.types, since=since, limit=limit)
        return (await client.events(query)).events


def _since_ns(text: str | None) -> int | None:
    from railbus_shared import clock

    if text is None:
        return None
    if period := _PERIOD.match(text):
        return clock.now_ns() - int(float(period[1]) * _UNIT_S[period[2]] * clock.NS_PER_S)
    try:
        return clock.parse_rfc3339(f"{text}T00:00:00Z" if _DAY.match(text) else text)
    except ValueError as exc:
        raise click.BadParameter(
            f"{text!r} is neither a period (90s, 30m, 2h, 3d) nor a day or time in UTC (2026-11-23T21:00:00Z)",
            param_hint="--since",
        ) from exc


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text, re.IGNORECASE)
    except re.error as exc:
        raise click.BadParameter(f"{text!r} is not a regular expression: {exc}", param_hint="--grep") from exc


def _text(event: Mapping[str, object]) -> str:
    import orjson

    return orjson.dumps(event).decode()
