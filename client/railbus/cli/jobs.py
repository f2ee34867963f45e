"""`railbus jobs` and `job`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import click

from railbus.cli.job_names import find_job, job_id
from railbus.cli.render import Cell, Column, print_json, show, show_pairs, shown_state, to_console
from railbus.cli.session import connected, json_option, root_option, run, session
from railbus.cli.timeline import Timeline, thinned, timeline_of
from railbus_shared import clock
from railbus_shared.errors import BusUnavailable

if TYPE_CHECKING:
    from rich.console import Console

    from railbus.client import Client
    from railbus_shared.contracts.jobs import JobRecord, JobState
    from railbus_shared.contracts.requests import JobList

_STATES: Final[tuple[JobState, ...]] = (
    "queued",
    "placed",
    "running",
    "checkpointing",
    "succeeded",
    "failed",
    "cancelled",
)
_METRIC_LINES: Final = 20
_ROWS: Final = 3
"""Of a terminal, for a line that the job has printed or logged."""
_NONE: Final = "no jobs; `railbus submit JOB.yaml` makes one"
_COLUMNS: Final = (
    Column("JOB", "id"),
    Column("STATE", "state"),
    Column("MODEL"),
    Column("STEP", "number"),
    Column("WHEN", "time"),
    Column("WHERE OR WHY", "brief"),
)
_GROUP_COLUMNS: Final = tuple(Column("VALUES") if one.title == "MODEL" else one for one in _COLUMNS)


@click.command()
@click.option("--state", "-s", "states", multiple=True, type=click.Choice(_STATES), help="Only these; may be repeated.")
@click.option("--owner", "-o", metavar="NAME", help="Only jobs of this owner.")
@click.option("--group", "-g", metavar="NAME", help="Only jobs of this group, with a summary of their states.")
@click.option("--limit", "-n", type=click.IntRange(1, 500), default=50, show_default=True, help="At most so many.")
@click.option("--quiet", "-q", is_flag=True, help="Print ids only.")
@json_option
@root_option
def jobs(
    *, states: tuple[str, ...], owner: str | None, group: str | None, limit: int, quiet: bool, as_json: bool
) -> None:
    """List jobs, newest first."""
    wanted = cast("tuple[JobState, ...]", states)
    run(_jobs(wanted, owner=owner, group=group, limit=limit, quiet=quiet, as_json=as_json))


async def _jobs(
    states: tuple[JobState, ...], *, owner: str | None, group: str | None, limit: int, quiet: bool, as_json: bool
) -> None:
    async with connected() as client:
        found = await client.jobs(states=states, owner=owner, group=group, limit=limit)
        totals = await _totals(client, group, owner) if group and not quiet else {}
    if as_json:
        print_json(found.to_map() | ({"states": totals} if group else {}))
    elif quiet:
        for record in found.jobs:
            click.echo(record.id)
    else:
        _show(found, is_group=group is not None)
        if totals:
            counted = ", ".join(f"{count} {state}" for state, count in totals.items())
            click.echo(f"{sum(totals.values())} jobs of group {group}: {counted}", err=True)
        if not found.total:
            click.echo(_NONE if not (states or owner or group) else "no such jobs", err=True)


async def _totals(client: Client, group: str, owner: str | None) -> dict[str, int]:
    """How many jobs of a group are in each state; states without any are left out."""
    asked = {state: await client.jobs(states=(state,), group=group, owner=owner, limit=1) for state in _STATES}
    return {state: found.total for state, found in asked.items() if found.total}


def _show(found: JobList, *, is_group: bool) -> None:
    if found.jobs:
        rows = [_row(record, is_group=is_group) for record in found.jobs]
        show(_GROUP_COLUMNS if is_group else _COLUMNS, rows, console=to_console())
    if found.total > len(found.jobs):
        click.echo(f"{found.total - len(found.jobs):,} more; use --limit", err=True)


def _row(record: JobRecord, *, is_group: bool) -> list[Cell]:
    step = record.checkpoint.step if record.checkpoint else None
    values = (record.spec.name or "").removeprefix(f"{record.spec.group}: ")
    what = values if is_group else record.spec.model
    return [record.id, shown_state(record), what, step, record.changed_at, where_or_why(record)]


def where_or_why(record: JobRecord) -> str:
    """The devices of a job that trains, else why it does not, for instance on a full disk."""
    if record.is_active:
        return record.reason or ", ".join(record.devices)
    return record.reason or (record.error.message if record.error else "")


@click.command()
@click.argument("job")
@json_option
@root_option
def job(*, job: str, as_json: bool) -> None:
    """Show one job and what happened to it.

    JOB is an id, the beginning of one that no other id has, or `@last`.
    """
    run(_job(job, as_json=as_json))


async def _job(wanted: str, *, as_json: bool) -> None:
    try:
        async with connected() as client:
            record = await find_job(client, wanted)
            timeline = await timeline_of(client, record.id)
    except BusUnavailable as exc:
        if as_json or not session().layout.logs.is_dir():
            raise
        _tell_files(await job_id(wanted), why=exc.message)
        return
    if as_json:
        print_json({"job": record.to_map(), "events": timeline.events, "left_out": timeline.left_out})
        return
    console = to_console()
    show_pairs(_pairs(record), console=console)
    if record.error is not None and record.error.hint:
        click.echo(f"hint: {record.error.hint}", err=True)
    click.echo()
    _tell(timeline, record.id, console, begun=record.submitted_at, ended=record.ended_at or clock.now())


def _tell_files(job: str, *, why: str) -> None:
    """What the log files of this host tell of a job whose record nobody can be asked for."""
    from railbus_shared.log_reader import read_events

    timeline = thinned(read_events(session().layout, job=job))
    click.echo(f"job {job} without its record: {why}", err=True)
    times = [time for event in timeline.events if _is_time(time := str(event.get("time")))] or [clock.now()]
    _tell(timeline, job, to_console(), begun=times[0], ended=times[-1])


def _tell(timeline: Timeline, job: str, console: Console, *, begun: str, ended: str) -> None:
    """The timeline in words, with some twenty lines of metrics however long the job ran."""
    from railbus.cli.tell import Teller

    span_s = (_ns(ended) - _ns(begun)) / clock.NS_PER_S
    teller = Teller(console, begins_at=begun, metrics_s=max(2.0, span_s / _METRIC_LINES), rows=_ROWS)
    for event in timeline.events:
        teller.tell(event)
    said = [f"{timeline.left_out:,} metrics and lines are left out"] if timeline.left_out else []
    if teller.num_cut:
        said.append(f"{teller.num_cut} long line{'s are' if teller.num_cut > 1 else ' is'} cut")
    if said:
        click.echo(f"{', and '.join(said)}; all of it: railbus logs {job}", err=True)


def _is_time(text: str) -> bool:
    """Not every event of a stranger has one."""
    try:
        return clock.parse_rfc3339(text) >= 0
    except ValueError:
        return False


def _ns(time: str) -> int:
    return clock.parse_rfc3339(time)


def _pairs(record: JobRecord) -> dict[str, Cell]:
    spec = record.spec
    pairs: dict[str, Cell] = {
        "job": record.id,
        "name": spec.name,
        "state": shown_state(record),
        "reason": _reason(record),
        "end": _end(record),
        "model": spec.model,
        "dataset": spec.dataset,
        "entrypoint": spec.entrypoint,
        "devices": ", ".join(record.devices) or None,
        "priority": record.priority or None,
        "owner": spec.owner,
        "group": spec.group,
        "held by": record.held_by,
        "cancelled by": record.cancelled_by,
        "preempted by": record.preempted_by,
        "retry of": record.retry_of,
        "attempt": f"{record.attempt} of {spec.max_attempts}",
        "submitted": record.submitted_at,
        "started": record.started_at,
        "ended": record.ended_at,
        "checkpoint": _checkpoint(record),
        "error": f"{record.error.code}: {record.error.message}" if record.error else None,
    }
    return {name: value for name, value in pairs.items() if value is not None}


def _reason(record: JobRecord) -> str | None:
    """Nothing where the error says the same."""
    said = record.error.message if record.error else ""
    return record.reason if record.reason not in {"", said} else None


def _end(record: JobRecord) -> str | None:
    """The cause of the last attempt's end, and how its trainer ended where that says more."""
    if record.end_cause is None or record.end_cause == "ok":
        return None
    code = record.exit_code
    if not code:
        return record.end_cause
    return f"{record.end_cause}, {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def _checkpoint(record: JobRecord) -> str | None:
    ref = record.checkpoint
    return None if ref is None else f"checkpoint-{ref.number:06d} at step {ref.step}, sha256 {ref.sha256}"
