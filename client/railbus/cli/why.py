"""`railbus why` and `railbus submit --dry-run`: where a job could run, what it waits for, and when it may start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from railbus.cli import exit_codes
from railbus.cli.job_names import find_job
from railbus.cli.render import Cell, Column, print_json, say, show, show_pairs, to_console, until
from railbus.cli.session import connected, json_option, root_option, run
from railbus_shared import clock

if TYPE_CHECKING:
    from rich.console import Console

    from railbus.cli.spec_file import JobFile
    from railbus_shared.contracts.jobs import JobSpec
    from railbus_shared.contracts.waiting import DeviceHolder, HostReason, Why

_HOSTS: Final = (
    Column("HOST", "id"),
    Column("FITTING", "number"),
    Column("FREE", "number"),
    Column("THERE"),
)
_HOLDERS: Final = (
    Column("DEVICE", "id"),
    Column("HOLDER", "id"),
    Column("OWNER", "id"),
    Column("STATE", "state"),
    Column("FREE AGAIN", "until"),
)
_SWEPT: Final = (Column("JOB", "id"), Column("VALUES"))
_NEAREST: Final = 3
_SHOWN_HOLDERS: Final = 20


@click.command()
@click.argument("job")
@click.option("--quiet", "-q", is_flag=True, help="Print the headline's word only.")
@json_option
@root_option
def why(*, job: str, quiet: bool, as_json: bool) -> None:
    """Say why a job waits, who has what it wants, and when it may start.

    JOB is an id, the beginning of one, or `@last`. The words are explained in docs/jobs.md.
    """
    run(_why(job, quiet=quiet, as_json=as_json))


async def _why(wanted: str, *, quiet: bool, as_json: bool) -> None:
    from railbus.job import Job

    async with connected() as client:
        record = await find_job(client, wanted)
        found = await Job(client, record).why()
    if as_json:
        print_json(found.to_map())
    elif quiet:
        click.echo(found.headline)
    elif found.headline == "not_waiting":
        click.echo(f"job {record.id} {found.text or f'is {found.state}'}")
    else:
        show_why(found, title=f"job {record.id}", console=to_console())


async def dry_run(jobs: JobFile, *, as_json: bool, quiet: bool) -> int:
    """Tell what would become of the jobs of a file; of a sweep, of the first job of each wish for devices."""
    kinds = _kinds(jobs)
    async with connected() as client:
        found = [await client.dry_run(spec) for spec in kinds]
    if as_json:
        answers = [{"job": spec.id, "why": why.to_map()} for spec, why in zip(kinds, found, strict=True)]
        listed = [{"spec": one.spec.to_map(), "values": dict(one.values)} for one in jobs.swept]
        print_json({"jobs": listed, "why": answers} if jobs.is_sweep else found[0].to_map())
        return exit_codes.OK
    if quiet:
        click.echo("\n".join(answer.headline for answer in found))
        return exit_codes.OK
    console = to_console()
    if jobs.is_sweep:
        _show_sweep(jobs, console)
    for spec, answer in zip(kinds, found, strict=True):
        if jobs.is_sweep:
            click.echo()
        show_why(answer, title=f"job {spec.id}, if it came now" if spec.id else "if it came now", console=console)
    return exit_codes.OK


def _kinds(jobs: JobFile) -> list[JobSpec]:
    """The first job of each kind that placement tells apart."""
    first: dict[str, JobSpec] = {}
    for spec in jobs.specs:
        first.setdefault(f"{spec.devices!r} {spec.entrypoint} {spec.priority} {spec.owner}", spec)
    return list(first.values())


def _show_sweep(jobs: JobFile, console: Console) -> None:
    from railbus.sweeping import told

    show(_SWEPT, [[one.spec.id, told(one.values)] for one in jobs.swept], console=console)
    click.echo(f"{len(jobs.swept)} jobs of group {jobs.specs[0].group}; nothing was submitted", err=True)


def show_why(found: Why, *, title: str, console: Console) -> None:
    """The headline, then what stands behind it."""
    say(f"{title}: {found.text}", console=console)
    show_pairs({name: value for name, value in _pairs(found).items() if value is not None}, console=console)
    if found.hosts:
        click.echo(file=console.file)
        show(_HOSTS, [_host(host) for host in found.hosts], console=console)
    if found.holders:
        click.echo(file=console.file)
        show(_HOLDERS, [_holder(one) for one in found.holders[:_SHOWN_HOLDERS]], console=console)
        if len(found.holders) > _SHOWN_HOLDERS:
            click.echo(f"and {len(found.holders) - _SHOWN_HOLDERS} more; --json tells all", err=True)


def _pairs(found: Why) -> dict[str, Cell]:
    never = None if found.can_ever_start else "no host that is known"
    return {"why": found.headline, "could run on": never, "place": _place(found), "may start": _start(found)}


def _place(found: Why) -> str | None:
    if found.place is None:
        return None
    nearest = ", ".join(reversed(found.ahead[-_NEAREST:]))
    behind = f", behind {nearest}" if nearest else ""
    return f"{found.place} in the queue{behind}{', …' if len(found.ahead) > _NEAREST else ''}"


def _start(found: Why) -> str | None:
    basis = f" ({found.expected_basis})" if found.expected_basis else ""
    if found.expected_start is None:
        return f"not known{basis}" if basis and found.headline != "starting" else None
    return f"{until(found.expected_start, now_ns=clock.now_ns())}{basis}"


def _host(host: HostReason) -> list[Cell]:
    return [host.host, host.fitting, host.free, host.text or host.word]


def _holder(one: DeviceHolder) -> list[Cell]:
    return [one.device, one.holder, one.owner, one.state or "by hand", one.expected_end]
