"""`railbus devices`: who has what, and what takes no new jobs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.groups import DefaultGroup
from railbus.cli.job_names import choose_one
from railbus.cli.render import Cell, Column, print_json, show, size, to_console
from railbus.cli.session import connected, json_option, root_option, run

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.contracts.requests import DeviceList, DeviceState

_COLUMNS: Final = (
    Column("DEVICE", "id"),
    Column("KIND"),
    Column("STATE", "state"),
    Column("HOLDER", "id"),
    Column("MEMORY", "bytes"),
    Column("BUSY", "number"),
    Column("WHAT"),
)
_LOOK_S: Final = 1.0
_BUSY: Final = frozenset({"leased", "reclaiming"})


@click.group(cls=DefaultGroup)
def devices() -> None:
    """List devices, and who has them; take hosts and devices out of service.

    \b
      railbus devices
      railbus devices drain alpha --wait         before a host is stopped
      railbus devices cordon alpha-gpu1 --reason "noisy fan"
    """


@devices.command("list")
@json_option
@click.option("--quiet", "-q", is_flag=True, help="Print ids only.")
@root_option
def list_devices(*, quiet: bool, as_json: bool) -> None:
    """List devices, and who has them."""
    run(_list(quiet=quiet, as_json=as_json))


@devices.command()
@click.argument("host")
@click.option("--wait", "-w", is_flag=True, help="Wait until nothing runs there any more.")
@json_option
@root_option
def drain(*, host: str, wait: bool, as_json: bool) -> None:
    """Let a host take no new jobs; what runs there goes on."""
    run(_drain(host, draining=True, wait=wait, as_json=as_json))


@devices.command()
@click.argument("host")
@json_option
@root_option
def undrain(*, host: str, as_json: bool) -> None:
    """Let a host take jobs again."""
    run(_drain(host, draining=False, wait=False, as_json=as_json))


@devices.command()
@click.argument("device")
@click.option("--reason", "-r", default="", help="Why, for everybody who looks at it.")
@json_option
@root_option
def cordon(*, device: str, reason: str, as_json: bool) -> None:
    """Let a device take no new jobs; what runs on it goes on."""
    run(_cordon(device, cordoned=True, reason=reason, as_json=as_json))


@devices.command()
@click.argument("device")
@json_option
@root_option
def uncordon(*, device: str, as_json: bool) -> None:
    """Let a device take jobs again.

    Also one that was taken out of service after a fault, once that is mended.
    """
    run(_cordon(device, cordoned=False, reason="", as_json=as_json))


async def _list(*, quiet: bool, as_json: bool) -> None:
    async with connected() as client:
        found = await client.devices()
    if as_json:
        print_json(found.to_map())
    elif quiet:
        for state in found.devices:
            click.echo(state.device.id)
    elif not found.devices:
        click.echo("no devices; is a device_manager ready? `railbus doctor` tells", err=True)
    else:
        _show(found)


def _show(found: DeviceList) -> None:
    show(_COLUMNS, [_row(state) for state in found.devices], console=to_console())
    for host in found.hosts:
        if host.draining:
            click.echo(f"{host.host} is draining: it takes no new jobs", err=True)
    for runner in found.runners:
        if not runner.ready:
            click.echo(f"the runner of {runner.host} is not ready: its pre-warmed process is starting", err=True)


def _row(state: DeviceState) -> list[Cell]:
    device = state.device
    busy = None if device.utilisation_frac is None else f"{device.utilisation_frac:.0%}"
    kind = "mig" if device.is_mig else device.kind
    return [device.id, kind, state.state, _holder(state), device.memory_bytes, busy, _what(state)]


def _holder(state: DeviceState) -> str | None:
    return ", ".join(dict.fromkeys(state.holders)) or state.holder


def _what(state: DeviceState) -> str:
    device = state.device
    heat = f"{device.temperature_c:.0f} °C" if device.temperature_c is not None else ""
    used = f"{size(device.memory_used_bytes)} used" if device.memory_used_bytes else ""
    shares = f"{state.free_shares} of {device.shares} shares free" if device.shares > 1 else ""
    later = f"then {state.retired}" if state.retired not in {None, state.state} else ""
    return ", ".join(part for part in (device.name, used, heat, shares, later, device.health_reason) if part)


async def _drain(host: str, *, draining: bool, wait: bool, as_json: bool) -> None:
    async with connected() as client:
        known = sorted({one.host for one in (await client.devices()).hosts})
        name = choose_one(host, known, kind="host", hint="`railbus devices` shows the hosts")
        await client.drain(name, draining=draining)
        click.echo(f"{name} takes {'no new jobs' if draining else 'jobs again'}", err=as_json)
        if wait:
            await _until_empty(client, name)
            click.echo(f"nothing runs on {name} any more", err=as_json)
    if as_json:
        print_json({"host": name, "draining": draining})


async def _until_empty(client: Client, host: str) -> None:
    """Wait until no device of a host is held, saying what it waits for whenever that changes."""
    said: list[str] = []
    while True:
        states = (await client.devices()).devices
        held = [one for one in states if one.device.host == host and (one.state in _BUSY or one.holders)]
        if not held:
            return
        holders = sorted({str(_holder(one)) for one in held})
        if holders != said:
            click.echo(f"waiting for {', '.join(holders)}; `railbus cancel JOB` ends one sooner", err=True)
            said = holders
        await asyncio.sleep(_LOOK_S)


async def _cordon(device: str, *, cordoned: bool, reason: str, as_json: bool) -> None:
    async with connected() as client:
        known = [one.device.id for one in (await client.devices()).devices]
        name = choose_one(device, known, kind="device", hint="`railbus devices` shows them")
        await client.cordon(name, cordoned=cordoned, reason=reason)
    click.echo(f"{name} takes {'no new jobs' if cordoned else 'jobs again'}", err=as_json)
    if as_json:
        print_json({"device": name, "cordoned": cordoned, "reason": reason})
