"""`railbus cancel`, `retry`, `hold`, `release` and `priority`: what a person may order of jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.follow import wait_for_jobs
from railbus.cli.job_names import find_group, find_jobs
from railbus.cli.render import print_json
from railbus.cli.session import connected, json_option, root_option, run

if TYPE_CHECKING:
    from railbus.job import Job
    from railbus_shared.contracts.jobs import JobRecord, JobState

    Order = Callable[[Job], Awaitable[Job]]
    Tell = Callable[[JobRecord], str]

_NOT_ENDED: Final[tuple[JobState, ...]] = ("queued", "placed", "running", "checkpointing")


def _jobs_of(command: Callable[..., None]) -> Callable[..., None]:
    """JOB… or --group, and how to print what became of them."""
    for decorate in (
        root_option,
        json_option,
        click.option("--quiet", "-q", is_flag=True, help="Print ids only."),
        click.option("--group", "-g", metavar="NAME", help="All jobs of a group for which this can be done."),
        click.argument("jobs", nargs=-1, metavar="JOB..."),
    ):
        command = decorate(command)
    return command


@click.command()
@click.option("--now", is_flag=True, help="Without the grace in which a checkpoint is written.")
@click.option("--wait", "-w", is_flag=True, help="Wait for their ends.")
@_jobs_of
def cancel(*, jobs: tuple[str, ...], group: str | None, now: bool, wait: bool, quiet: bool, as_json: bool) -> None:
    """Ask jobs to end; a running one writes a checkpoint first.

    JOB is an id, the beginning of one, or `@last`; it may be several.
    """

    ended: set[str] = set()

    async def order(job: Job) -> Job:
        if job.record.is_final:
            ended.add(job.id)
        return await job.cancel(now=now)

    def tell(record: JobRecord) -> str:
        return _told_cancel(record, had_ended=record.id in ended)

    run(_order(jobs, group, _NOT_ENDED, order, tell, wait=wait, quiet=quiet, as_json=as_json))


def _told_cancel(record: JobRecord, *, had_ended: bool) -> str:
    if had_ended:
        return f"job {record.id} had ended already: {record.state}"
    if record.is_final:
        return f"job {record.id} is {record.state}"
    return f"job {record.id} will end; follow: railbus logs -f {record.id}"


@click.command()
@click.option("--from-scratch", is_flag=True, help="Begin from nothing, not from the last checkpoint.")
@_jobs_of
def retry(*, jobs: tuple[str, ...], group: str | None, from_scratch: bool, quiet: bool, as_json: bool) -> None:
    """Submit jobs that have ended once more, each as a new job.

    A new job begins from the old one's last checkpoint. With --group those that failed or were cancelled.
    """

    async def order(job: Job) -> Job:
        return await job.retry(from_scratch=from_scratch)

    def tell(record: JobRecord) -> str:
        return f"{record.state} job {record.id}, a retry of {record.retry_of}; follow: railbus logs -f {record.id}"

    run(_order(jobs, group, ("failed", "cancelled"), order, tell, quiet=quiet, as_json=as_json))


@click.command()
@_jobs_of
def hold(*, jobs: tuple[str, ...], group: str | None, quiet: bool, as_json: bool) -> None:
    """Keep waiting jobs from starting, until `railbus release`."""

    def tell(record: JobRecord) -> str:
        return f"job {record.id} is held"

    run(_order(jobs, group, ("queued",), lambda job: job.hold(), tell, quiet=quiet, as_json=as_json))


@click.command()
@_jobs_of
def release(*, jobs: tuple[str, ...], group: str | None, quiet: bool, as_json: bool) -> None:
    """Let jobs start that were held."""

    def tell(record: JobRecord) -> str:
        return f"job {record.id} is {record.state} and no longer held"

    run(_order(jobs, group, ("queued",), lambda job: job.hold(held=False), tell, quiet=quiet, as_json=as_json))


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("job")
@click.argument("priority", type=click.IntRange(-100, 100))
@click.option("--quiet", "-q", is_flag=True, help="Print the id only.")
@json_option
@root_option
def priority(*, job: str, priority: int, quiet: bool, as_json: bool) -> None:
    """Give a waiting job another priority, -100 to 100; higher goes first."""

    def tell(record: JobRecord) -> str:
        return f"job {record.id} has priority {record.priority}"

    run(_order((job,), None, (), lambda one: one.set_priority(priority), tell, quiet=quiet, as_json=as_json))


async def _order(
    wanted: tuple[str, ...],
    group: str | None,
    states: tuple[JobState, ...],
    order: Order,
    tell: Tell,
    *,
    wait: bool = False,
    quiet: bool,
    as_json: bool,
) -> None:
    """Give an order to each job and tell what became of it; the first that is refused ends the command."""
    from railbus.job import Job

    if bool(wanted) == (group is not None):
        raise click.UsageError("name jobs, or a --group of them")

    def say(record: JobRecord) -> None:
        if not as_json:
            click.echo(record.id if quiet else tell(record))

    async with connected() as client:
        meant = await (find_jobs(client, wanted) if group is None else find_group(client, group, states=states))
        records = []
        for found in meant:
            records.append((await order(Job(client, found))).record)
            if not wait:
                say(records[-1])
        if wait and records:
            records = await wait_for_jobs(client, [record.id for record in records])
            for record in records:
                say(record)
    if as_json:
        print_json(records[0].to_map() if len(wanted) == 1 else {"jobs": [record.to_map() for record in records]})
    elif not records:
        click.echo(f"no job of group {group} is {' or '.join(states)}", err=True)
