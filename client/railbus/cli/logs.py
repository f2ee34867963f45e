"""`railbus logs`, `events` and `decode`: what happened, from the log files and live from the bus.

The files are read directly where they lie on this host, so that nothing need run; otherwise telemetry is asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import click

from railbus.cli import exit_codes
from railbus.cli.event_lines import EventLines
from railbus.cli.history import Wanted, history
from railbus.cli.job_names import job_id
from railbus.cli.render import to_console
from railbus.cli.session import connected, exit_with_code_of_another, json_option, root_option, run
from railbus.cli.tell import Teller, print_event
from railbus_shared.errors import TransientError

if TYPE_CHECKING:
    from railbus.cli.story import Line
    from railbus_shared.bus.follow import Seam

_NEWEST: Final = 200
_EVENTS_A_LINE: Final = (1, 8, 64)
"""How many events are read for each line of the newest, one after the other until there are enough."""
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PERIOD: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])\Z")
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d\Z")
_ENDS: Final = ("job.succeeded", "job.failed", "job.cancelled")
Write = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True)
class Output:
    """Where events go: each as it is, or into words."""

    write: Write
    teller: Teller | None = None

    @classmethod
    def in_words(cls, teller: Teller) -> Output:
        return cls(teller.tell, teller)


_SINCE: Final = "Only from then on: 90s, 30m, 2h, 3d, or a day or time in UTC."
_UNTIL: Final = "Only before then, said in the same way."


@click.command()
@click.argument("job", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on as things happen; Ctrl-C only leaves.")
@click.option("--since", metavar="WHEN", help=_SINCE)
@click.option("--until", metavar="WHEN", help=_UNTIL)
@click.option(
    "--type", "types", multiple=True, metavar="TYPE", help="Only types that begin so, e.g. `job.`; may be repeated."
)
@click.option("--grep", "pattern", metavar="REGEX", help="Only events whose JSON matches, whatever the case.")
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(min=1),
    help=f"The newest so many lines; {_NEWEST} if neither JOB nor a time is given.",
)
@click.option("--check", "checks", is_flag=True, help="Show nothing of it, but whether anything is missing or doubled.")
@json_option
@root_option
def logs(
    *,
    job: str | None,
    follow: bool,
    since: str | None,
    until: str | None,
    types: tuple[str, ...],
    pattern: str | None,
    lines: int | None,
    checks: bool,
    as_json: bool,
) -> int:
    """Show what happened, in words; with a JOB and -f until its end, exiting with its code.

    JOB is an id, the beginning of one, or `@last`.

    \b
      railbus logs -f @last
      railbus logs --since 2h --type job. --grep failed
      railbus logs --check

    Producers number their events, so a gap is a loss. --check reads all that the files hold, or a JOB or a time, tells
    what is missing, doubled or broken, and ends with 6 if anything is.
    """
    wanted = _wanted(types, since=since, until=until, pattern=pattern, follow=follow)
    if checks:
        if follow or types or pattern or lines:
            raise click.UsageError("--check takes a JOB, --since and --until, and no other choice of events")
        from railbus.cli.logs_check import check_logs

        return check_logs(replace(wanted, job=job and run(job_id(job))), as_json=as_json)
    out = Output(print_event) if as_json else Output.in_words(Teller(to_console(), names_job=not job))
    if job is not None and follow:
        exit_with_code_of_another()
        return _follow_one(job, wanted, newest=lines, out=out)
    if job is not None:
        wanted = replace(wanted, job=run(job_id(job)))
    newest = lines or (None if job is not None or since or until else _NEWEST)
    _tell_all(wanted, newest=newest, out=out, follow=follow)
    return exit_codes.OK


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Events from now on, as they happen.")
@click.option("--since", metavar="WHEN", help=_SINCE)
@click.option("--until", metavar="WHEN", help=_UNTIL)
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only types that begin so; may be repeated.")
@click.option("--format", "form", type=click.Choice(["railbus", "cloudevents", "otlp"]), default="railbus",
              help="As CloudEvents 1.0, or as log records of OpenTelemetry.")  # fmt: skip
@json_option
@root_option
def events(
    *, follow: bool, since: str | None, until: str | None, types: tuple[str, ...], form: str, as_json: bool
) -> None:
    """Every event as it is, one a line: all from the log files, or with -f those from now on.

    On a terminal each is cut to its width; with --json, and wherever else it is written to, it is JSON.
    """
    wanted = _wanted(types, since=since, until=until, pattern=None, follow=follow)
    is_json = as_json or form != "railbus" or not sys.stdout.isatty()
    write = _printer(form) if is_json else EventLines(to_console()).write
    if follow and not since:
        run(_follow_all(wanted, None, write))
    else:
        _tell_all(wanted, newest=None, out=Output(write), follow=follow)


def _printer(form: str) -> Callable[[Mapping[str, object]], None]:
    from railbus.interchange import cloud_event, is_event
    from railbus_shared import otlp

    if form == "railbus":
        return print_event
    said = cloud_event if form == "cloudevents" else lambda event: otlp.logs([event])
    return lambda event: print_event(said(event)) if is_event(event) else None


@click.command()
def decode() -> None:
    """Turn a msgpack message on stdin into JSON lines, one for each event in it.

    \b
      nats sub --translate 'railbus decode' 'railbus.evt.>'
    """
    from railbus_shared import wire
    from railbus_shared.batches import events_of

    for event in events_of(wire.decode(sys.stdin.buffer.read())):
        print_event(event)


def _tell_all(wanted: Wanted, *, newest: int | None, out: Output, follow: bool) -> None:
    """What was, and if asked for what comes: from the files as far as they surely go, from there on from the stream."""
    if not follow:
        if not _tell_past(wanted, newest, None, out) and sys.stderr.isatty():
            click.echo("nothing was found", err=True)
        return
    try:
        seam = run(_seam())
    except TransientError:
        _tell_past(wanted, newest, None, out)
        raise
    try:
        _tell_past(wanted, newest, seam, out)
    except TransientError as exc:  # no files here, and nobody to ask
        click.echo(f"without what was before: {exc.message}", err=True)
    sys.stdout.flush()
    run(_follow_all(wanted, seam, out.write))


def _tell_past(wanted: Wanted, newest: int | None, seam: Seam | None, out: Output) -> bool:
    """Returns whether anything was told."""
    if newest is not None and out.teller is not None:
        return _tell_newest(wanted, newest, seam, out.teller)
    event: Mapping[str, object] | None = None
    for event in history(wanted, newest=newest, seam=seam):
        out.write(event)
    return event is not None


def _tell_newest(wanted: Wanted, newest: int, seam: Seam | None, teller: Teller) -> bool:
    """The newest so many lines. Many metrics make one of them, so the past is read as far back as that takes."""
    lines: list[tuple[Line, str]] = []
    for num_events in (newest * times for times in _EVENTS_A_LINE):
        events = list(history(wanted, newest=num_events))
        lines = teller.lines_of(event for event in events if seam is None or not seam.is_behind(event))[-newest:]
        if len(lines) == newest or len(events) < num_events:
            break
    for line, time in lines:
        teller.say(line, time=time)
    return bool(lines)


def _follow_one(job: str, wanted: Wanted, *, newest: int | None, out: Output) -> int:
    """The same for one job, until its end."""
    found, seam = run(_job_and_seam(job))
    wanted, ends = replace(wanted, job=found), Wanted(job=found, types=_ENDS)
    try:
        _tell_past(wanted, newest, seam, out)
        has_ended = any(True for _ in history(ends, newest=1, seam=seam))
    except TransientError:  # no files here, and nobody to ask: the stream has what happened within a week
        seam, has_ended = seam._replace(sequence=0), False
    sys.stdout.flush()
    return run(_follow_rest(found, wanted, None if has_ended else seam, out.write))


async def _seam() -> Seam:
    async with connected() as client:
        return await client.seam()


async def _job_and_seam(job: str) -> tuple[str, Seam]:
    from railbus.cli.job_names import find_job

    async with connected() as client:
        found = await find_job(client, job)
        return found.id, await client.seam()


async def _follow_rest(job: str, wanted: Wanted, seam: Seam | None, write: Write) -> int:
    from railbus.cli.follow import follow_behind

    async with connected() as client:
        if seam is None:
            (record,) = await client.wait([job])
        else:
            record = await follow_behind(client, job, seam.sequence, write=write, is_wanted=wanted.matches)
    return exit_codes.of_record(record)


async def _follow_all(wanted: Wanted, seam: Seam | None, write: Write) -> None:
    async with connected() as client:
        async for event in client.follow_all(after=None if seam is None else seam.sequence):
            if wanted.matches(event):
                write(event)
                sys.stdout.flush()


def _wanted(
    types: tuple[str, ...], *, since: str | None, until: str | None, pattern: str | None, follow: bool
) -> Wanted:
    if follow and until is not None:
        raise click.UsageError("--until says where to end, and -f not to")
    since_ns, until_ns = _time_ns(since, "--since"), _time_ns(until, "--until")
    if since_ns is not None and until_ns is not None and since_ns >= until_ns:
        raise click.UsageError("--since is no earlier than --until, and nothing lies between them")
    return Wanted(types, since_ns, until_ns, _pattern(pattern))


def _time_ns(text: str | None, option: str) -> int | None:
    from railbus_shared import clock

    if text is None:
        return None
    if period := _PERIOD.match(text):
        now_ns = clock.now_ns()
        return now_ns - int(min(float(period[1]) * _UNIT_S[period[2]] * clock.NS_PER_S, now_ns))
    try:
        return clock.parse_rfc3339(f"{text}T00:00:00Z" if _DAY.match(text) else text)
    except ValueError as exc:
        raise click.BadParameter(
            f"{text!r} is neither a period (90s, 30m, 2h, 3d) nor a day or time in UTC (2026-11-23T21:00:00Z)",
            param_hint=option,
        ) from exc


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text, re.IGNORECASE)
    except re.error as exc:
        raise click.BadParameter(f"{text!r} is not a regular expression: {exc}", param_hint="--grep") from exc
