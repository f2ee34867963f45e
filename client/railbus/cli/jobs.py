"""`railbus submit`, `jobs`, `job` and `cancel`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import click

from railbus.cli import exit_codes
from railbus.cli.follow import follow_job
from railbus.cli.job_names import find_job
from railbus.cli.render import Cell, Column, print_json, show, show_pairs, to_console
from railbus.cli.session import connected, json_option, root_option, run

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.contracts.jobs import JobRecord, JobSpec, JobState

_STATES: Final = ("queued", "placed", "running", "checkpointing", "succeeded", "failed", "cancelled")
_TIMELINE: Final = 1000
_COLUMNS: Final = (
    Column("JOB", "id"),
    Column("STATE", "state"),
    Column("MODEL"),
    Column("STEP", "number"),
    Column("WHEN", "time"),
    Column("WHERE OR WHY"),
)


@click.command()
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True, exists=True), metavar="JOB.yaml"
)
@click.option("--follow", "-f", is_flag=True, help="Tell what happens until the job ends; exits with its code.")
@click.option("--wait", "-w", is_flag=True, help="Wait for the end in silence; exits with the job's code.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set one of the `params`; may be repeated.")
@click.option("--quiet", "-q", is_flag=True, help="Print the job's id only.")
@json_option
@root_option
def submit(*, file: Path, follow: bool, wait: bool, settings: tuple[str, ...], quiet: bool, as_json: bool) -> int:
    """Submit a job from a YAML or JSON file, or from stdin (`-`).

    \b
      railbus submit job.yaml --follow
      railbus submit job.yaml --set lr=1e-3 --set epochs=5
      generate-job | railbus submit -
    """
    from railbus.cli.spec_file import STDIN, read_spec

    is_stdin = str(file) == STDIN
    text = sys.stdin.buffer.read() if is_stdin else file.read_bytes()
    spec = read_spec(text.decode("utf-8-sig", "replace"), where="stdin" if is_stdin else str(file), settings=settings)
    return run(_submit(spec, follow=follow, wait=wait, quiet=quiet, as_json=as_json))


async def _submit(spec: JobSpec, *, follow: bool, wait: bool, quiet: bool, as_json: bool) -> int:
    async with connected() as client:
        record = await client.submit(spec)
        if quiet:
            click.echo(record.id)
        elif as_json and not (follow or wait):
            print_json(record.to_map())
        else:
            told = "" if follow or wait else f"; follow: railbus logs -f {record.id}"
            click.echo(f"{record.state} job {record.id}{told}", err=as_json)
        if not (follow or wait):
            return exit_codes.OK
        state = await follow_job(client, record.id, as_json=as_json, is_silent=wait and not follow)
        if as_json and wait and not follow:
            print_json((await client.job(record.id)).to_map())
        return exit_codes.of_state(state)


@click.command()
@click.option("--state", "-s", "states", multiple=True, type=click.Choice(_STATES), help="Only these; may be repeated.")
@click.option("--limit", "-n", type=click.IntRange(1, 500), default=50, show_default=True, help="At most so many.")
@click.option("--quiet", "-q", is_flag=True, help="Print ids only.")
@json_option
@root_option
def jobs(*, states: tuple[str, ...], limit: int, quiet: bool, as_json: bool) -> None:
    """List jobs, newest first."""
    run(_jobs(cast("tuple[JobState, ...]", states), limit=limit, quiet=quiet, as_json=as_json))


async def _jobs(states: tuple[JobState, ...], *, limit: int, quiet: bool, as_json: bool) -> None:
    async with connected() as client:
        found = await client.jobs(states=states, limit=limit)
    if as_json:
        print_json(found.to_map())
    elif quiet:
        for record in found.jobs:
            click.echo(record.id)
    else:
        if found.jobs:
            show(_COLUMNS, [_row(record) for record in found.jobs], console=to_console())
        if found.total > len(found.jobs):
            click.echo(f"{found.total - len(found.jobs)} more; use --limit", err=True)
        if not found.total:
            click.echo("no jobs; `railbus submit JOB.yaml` makes one", err=True)


def _row(record: JobRecord) -> list[Cell]:
    step = record.checkpoint.step if record.checkpoint else None
    where = ", ".join(record.devices) if record.is_active else record.reason
    return [record.id, record.state, record.spec.model, step, record.changed_at, where]


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
    async with connected() as client:
        record = await find_job(client, wanted)
        events = await _timeline(client, record.id)
    if as_json:
        print_json({"job": record.to_map(), "events": events})
        return
    console = to_console()
    show_pairs(_pairs(record), console=console)
    if record.error is not None and record.error.hint:
        click.echo(f"hint: {record.error.hint}", err=True)
    from railbus.cli.tell import Teller

    click.echo()
    teller = Teller(console, begins_at=record.submitted_at)
    for event in events:
        teller.tell(event)


async def _timeline(client: Client, job: str) -> list[dict[str, object]]:
    """A job's events from the log files; none while telemetry is away, which is said."""
    from railbus_shared.contracts.requests import QueryEvents
    from railbus_shared.errors import TransientError

    try:
        return list((await client.events(QueryEvents(job=job, limit=_TIMELINE))).events)
    except TransientError as exc:
        click.echo(f"no timeline: {exc.message}", err=True)
        return []


def _pairs(record: JobRecord) -> dict[str, Cell]:
    pairs: dict[str, Cell] = {
        "job": record.id,
        "state": record.state,
        "reason": record.reason or None,
        "model": record.spec.model,
        "dataset": record.spec.dataset,
        "entrypoint": record.spec.entrypoint,
        "devices": ", ".join(record.devices) or None,
        "attempt": f"{record.attempt} of {record.spec.max_attempts}",
        "submitted": record.submitted_at,
        "started": record.started_at,
        "ended": record.ended_at,
        "checkpoint": _checkpoint(record),
        "error": f"{record.error.code}: {record.error.message}" if record.error else None,
    }
    return {name: value for name, value in pairs.items() if value is not None}


def _checkpoint(record: JobRecord) -> str | None:
    ref = record.checkpoint
    return None if ref is None else f"checkpoint-{ref.number:06d} at step {ref.step}, sha256 {ref.sha256}"


@click.command()
@click.argument("job")
@click.option("--wait", "-w", is_flag=True, help="Wait for its end.")
@json_option
@root_option
def cancel(*, job: str, wait: bool, as_json: bool) -> None:
    """Ask a job to end; a running one writes a checkpoint first."""
    run(_cancel(job, wait=wait, as_json=as_json))


async def _cancel(wanted: str, *, wait: bool, as_json: bool) -> None:
    async with connected() as client:
        found = await find_job(client, wanted)
        record = await client.cancel(found.id)
        if wait and not record.is_final:
            await follow_job(client, record.id, as_json=False, is_silent=True)
            record = await client.job(record.id)
    if as_json:
        print_json(record.to_map())
    elif record.is_final:
        click.echo(f"job {record.id} is {record.state}")
    else:
        click.echo(f"job {record.id} will end; follow: railbus logs -f {record.id}")
