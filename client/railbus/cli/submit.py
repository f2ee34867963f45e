"""`railbus submit`: one job, or the jobs of a sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from railbus.cli import exit_codes
from railbus.cli.follow import follow_job, wait_for_jobs
from railbus.cli.render import Column, print_json, show, shown_state, to_console
from railbus.cli.session import connected, exit_with_code_of_another, json_option, root_option, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from railbus.cli.spec_file import JobFile
    from railbus.client import Client
    from railbus.job import Job
    from railbus_shared.contracts.jobs import JobRecord

_ENDS: Final = (Column("JOB", "id"), Column("STATE", "state"), Column("WHY"))


@click.command()
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True, exists=True), metavar="JOB.yaml"
)
@click.option("--follow", "-f", is_flag=True, help="Tell what happens until the job ends; exits with its code.")
@click.option("--wait", "-w", is_flag=True, help="Wait for the end in silence; exits with the job's code.")
@click.option("--dry-run", is_flag=True, help="Submit nothing; say where it could run and when it may start.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set one of the `params`; may be repeated.")
@click.option("--priority", "-p", type=click.IntRange(-100, 100), help="Higher goes first.")
@click.option("--owner", metavar="NAME", help="For whom: the queue is shared fairly between owners.")
@click.option("--hold", is_flag=True, help="Do not start it before `railbus release`.")
@click.option("--quiet", "-q", is_flag=True, help="Print ids only.")
@json_option
@root_option
def submit(
    *, file: Path, follow: bool, wait: bool, dry_run: bool, settings: tuple[str, ...], quiet: bool, as_json: bool,
    **fields: Any,
) -> int:  # fmt: skip
    """Submit the job of a YAML or JSON file, or of stdin (`-`); or all of a sweep.

    \b
      railbus submit job.yaml --follow
      railbus submit job.yaml --set lr=1e-3 --set epochs=5
      railbus submit sweep.yaml --wait
      generate-job | railbus submit -

    The exit codes of --follow and --wait: railbus help exit-codes.
    """
    if follow or wait:
        exit_with_code_of_another()
    jobs = _read(file, settings=settings, **fields)
    if follow and jobs.is_sweep:
        raise click.UsageError("a sweep is many stories: use --wait, and `railbus logs -f JOB` for one of them")
    if dry_run:
        from railbus.cli.why import dry_run as show_dry_run

        return run(show_dry_run(jobs, as_json=as_json, quiet=quiet))
    if jobs.is_sweep:
        return run(_submit_sweep(jobs, wait=wait, quiet=quiet, as_json=as_json))
    return run(_submit(jobs, follow=follow, wait=wait, quiet=quiet, as_json=as_json))


def _read(file: Path, *, settings: tuple[str, ...], priority: int | None, owner: str | None, hold: bool) -> JobFile:
    """The jobs of a file, with what the options say in place of what stands there."""
    from railbus.cli.spec_file import STDIN, read_jobs

    is_stdin = str(file) == STDIN
    text = sys.stdin.buffer.read() if is_stdin else file.read_bytes()
    said = {"priority": priority, "owner": owner, "held": hold or None}
    fields = {name: value for name, value in said.items() if value is not None}
    where = "stdin" if is_stdin else str(file)
    return read_jobs(text.decode("utf-8-sig", "replace"), where=where, settings=settings, fields=fields)


async def _submit(jobs: JobFile, *, follow: bool, wait: bool, quiet: bool, as_json: bool) -> int:
    async with connected() as client:
        record = (await client.submit(jobs.specs[0])).record
        if quiet:
            click.echo(record.id)
        elif as_json and not (follow or wait):
            print_json(record.to_map())
        else:
            told = "" if follow or wait else f"; follow: railbus logs -f {record.id}"
            click.echo(f"{shown_state(record)} job {record.id}{told}", err=as_json)
        if follow:
            return exit_codes.of_record(await follow_job(client, record.id, as_json=as_json))
        if wait:
            (record,) = await wait_for_jobs(client, [record.id])
            _tell_end(record, quiet=quiet, as_json=as_json)
            return exit_codes.of_record(record)
        return exit_codes.OK


def _tell_end(record: JobRecord, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        print_json(record.to_map())
    elif not quiet and record.state != "succeeded":
        why = f"{record.error.code}: {record.error.message}" if record.error else record.reason
        click.echo(f"job {record.id} {record.state}: {why or record.end_cause}", err=True)
        click.echo(f"what happened: railbus job {record.id}", err=True)


async def _submit_sweep(jobs: JobFile, *, wait: bool, quiet: bool, as_json: bool) -> int:
    async with connected() as client:
        submitted = await client.submit_all(jobs.specs)
        if quiet:
            click.echo("\n".join(job.id for job in submitted))
        elif not as_json:
            click.echo(_told(submitted))
        if wait:
            return await _wait_for_sweep(client, submitted, quiet=quiet, as_json=as_json)
        if as_json:
            print_json(_as_map([job.record for job in submitted]))
        return exit_codes.OK


def _told(submitted: Sequence[Job]) -> str:
    """`12 jobs of group g: 10 queued, 2 running`, for some may have been there before."""
    group = submitted[0].record.spec.group
    return f"{len(submitted)} jobs of group {group}: {counts([job.record for job in submitted])}\n" + (
        f"look: railbus jobs --group {group}"
    )


def counts(records: Sequence[JobRecord]) -> str:
    """`10 queued, 2 running`, in the order of a job's way."""
    order = ("held", "queued", "placed", "running", "checkpointing", "succeeded", "failed", "cancelled")
    states = [shown_state(record) for record in records]
    return ", ".join(f"{states.count(state)} {state}" for state in order if state in states)


def _as_map(records: Sequence[JobRecord]) -> dict[str, object]:
    return {"group": records[0].spec.group, "jobs": [record.to_map() for record in records]}


async def _wait_for_sweep(client: Client, submitted: Sequence[Job], *, quiet: bool, as_json: bool) -> int:
    records = await wait_for_jobs(client, [job.id for job in submitted])
    lost = [record for record in records if record.state != "succeeded"]
    if as_json:
        print_json(_as_map(records))
    elif not quiet:
        click.echo(f"{len(records)} jobs have ended: {counts(records)}")
        if lost:
            show(_ENDS, [[one.id, one.state, one.reason or one.end_cause] for one in lost], console=to_console())
    return exit_codes.of_record(lost[0]) if lost else exit_codes.OK
