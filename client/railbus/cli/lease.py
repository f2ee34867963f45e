"""`railbus lease`: devices held by hand, for a command that railbus does not start as a job."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.groups import DefaultGroup
from railbus.cli.render import Column, print_json, show, to_console
from railbus.cli.session import connected, exit_with_code_of_another, json_option, root_option, run

if TYPE_CHECKING:
    from railbus.leasing import DeviceLease
    from railbus_shared.contracts.requests import DeviceState

_COLUMNS: Final = (Column("HOLDER", "id"), Column("DEVICE", "id"), Column("HOST", "id"), Column("WHAT"))
_GRACE_S: Final = 10.0
"""How long a command may take to end once its lease is lost; then it is killed."""
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOT_STARTED: Final = {FileNotFoundError: 127, PermissionError: 126}


class _LeaseGroup(DefaultGroup):
    """Alone it lists; otherwise words that are no command of it are those of `run`."""

    default_name = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["list"])


@click.group(cls=_LeaseGroup)
def lease() -> None:
    """Hold devices by hand: no job gets them meanwhile.

    \b
      railbus lease --gpus 1 -- python train.py      until the command ends
      railbus lease                                  who holds what by hand
      railbus lease release NAME                     take it from them

    In a notebook: `with railbus.connect() as client, client.lease(gpus=1): ...`
    """


@lease.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--gpus", type=click.IntRange(1, 64), help="How many GPUs of this host.")
@click.option("--cpus", type=click.IntRange(1, 64), help="How many CPU slots of this host.")
@click.option("--name", metavar="NAME", help="Under which it is shown; yours and a number by default.")
@click.option("--wait", "wait_s", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="For free ones.")
@root_option
def run_command(
    *, command: tuple[str, ...], gpus: int | None, cpus: int | None, name: str | None, wait_s: float
) -> int:
    """Run a command on leased devices of this host.

    It sees these GPUs and no others, and stays on the cores of these CPU slots. The lease is renewed until the command
    ends; where it is lost, the command is ended. The exit code is the command's, or 125 for trouble with the lease.
    """
    if (gpus is None) == (cpus is None):
        raise click.UsageError("say what to lease: --gpus N or --cpus N")
    exit_with_code_of_another()
    return run(_run(command, gpus=gpus or 0, cpus=cpus or 0, name=name, wait_s=wait_s))


async def _run(command: tuple[str, ...], *, gpus: int, cpus: int, name: str | None, wait_s: float) -> int:
    async with (
        connected() as client,
        client.lease(gpus=gpus, cpus=cpus, holder=name, wait_s=wait_s) as held,
    ):
        click.echo(f"{held.holder} holds {', '.join(device.id for device in held.devices)}", err=True)
        return await _run_on(held, command)


async def _run_on(held: DeviceLease, command: tuple[str, ...]) -> int:
    """Run a command under a lease; returns its exit code, or 128 + N for signal N."""
    from railbus.embedded.process import die_with_parent

    if held.cores:
        os.sched_setaffinity(0, held.cores)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **held.environment},
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
    except (FileNotFoundError, PermissionError) as exc:
        click.echo(f"{command[0]}: {exc.strerror}", err=True)
        return _NOT_STARTED[type(exc)]
    from railbus_shared.waiting import beside

    with _forwarding(process):
        async with beside(_end_when_lost(held, process)):
            code = await process.wait()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _forwarding(process: asyncio.subprocess.Process) -> Iterator[None]:
    """Signals are the command's, which decides what they mean; Ctrl-C it gets from the terminal itself."""

    def forward(number: signal.Signals) -> None:
        is_from_terminal = number == signal.SIGINT and os.isatty(0)
        if process.returncode is None and not is_from_terminal:
            process.send_signal(number)

    loop = asyncio.get_running_loop()
    for number in _FORWARDED:
        loop.add_signal_handler(number, forward, number)
    try:
        yield
    finally:
        for number in _FORWARDED:
            loop.remove_signal_handler(number)


async def _end_when_lost(held: DeviceLease, process: asyncio.subprocess.Process) -> None:
    """Whoever goes on without a lease would share the devices with the next one."""
    await held.lost()
    click.echo("the lease is lost; ending the command", err=True)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        await asyncio.sleep(_GRACE_S)
        process.kill()
    await process.wait()


@lease.command("list")
@json_option
@click.option("--quiet", "-q", is_flag=True, help="Print the holders' names only.")
@root_option
def list_leases(*, quiet: bool, as_json: bool) -> None:
    """List what is held by hand."""
    run(_list(quiet=quiet, as_json=as_json))


async def _list(*, quiet: bool, as_json: bool) -> None:
    found = await _by_hand()
    if as_json:
        keys = ("holder", "device", "host")
        print_json({"leases": [dict(zip(keys, _row(*one), strict=False)) for one in found]})
    elif quiet:
        for holder in dict.fromkeys(holder for holder, _ in found):
            click.echo(holder)
    elif found:
        show(_COLUMNS, [_row(*one) for one in found], console=to_console())
    else:
        click.echo("nothing is held by hand; `railbus devices` shows what jobs have", err=True)


def _row(holder: str, state: DeviceState) -> list[str]:
    return [holder, state.device.id, state.device.host, state.device.name]


async def _by_hand() -> list[tuple[str, DeviceState]]:
    """Devices with holders that are no jobs."""
    from railbus_shared.errors import JobNotFound

    async with connected() as client:
        states = (await client.devices()).devices
        held = [(holder, one) for one in states for holder in one.holders or (one.holder,) if holder is not None]
        jobs = set()
        for holder in {holder for holder, _ in held}:
            with contextlib.suppress(JobNotFound):
                jobs.add((await client.job(holder)).id)
    return sorted(((holder, one) for holder, one in held if holder not in jobs), key=lambda pair: pair[0])


@lease.command("release")
@click.argument("name")
@json_option
@root_option
def release_lease(*, name: str, as_json: bool) -> None:
    """Take back what is held under NAME.

    Whoever holds it learns that at the next renewal; a command of `railbus lease` is ended then.
    """
    run(_release(name, as_json=as_json))


async def _release(name: str, *, as_json: bool) -> None:
    async with connected() as client:
        await client.revoke(name)
    if as_json:
        print_json({"holder": name, "released": True})
    else:
        click.echo(f"{name} holds nothing any more")
