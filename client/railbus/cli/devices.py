"""`railbus devices`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from railbus.cli.render import Cell, Column, print_json, show, size, to_console
from railbus.cli.session import connected, json_option, root_option, run

if TYPE_CHECKING:
    from railbus_shared.contracts.requests import DeviceState

_COLUMNS: Final = (
    Column("DEVICE", "id"),
    Column("KIND"),
    Column("STATE", "state"),
    Column("HOLDER", "id"),
    Column("MEMORY", "bytes"),
    Column("BUSY", "number"),
    Column("WHAT"),
)


@click.command()
@json_option
@root_option
def devices(*, as_json: bool) -> None:
    """List devices, and who has them."""
    run(_devices(as_json=as_json))


async def _devices(*, as_json: bool) -> None:
    async with connected() as client:
        found = await client.devices()
    if as_json:
        print_json(found.to_map())
        return
    if not found.devices:
        click.echo("no devices; is a device_manager ready? `railbus doctor` tells", err=True)
        return
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
    heat = f"{device.temperature_c:.0f} °C" if device.temperature_c is not None else ""
    used = f"{size(device.memory_used_bytes)} used" if device.memory_used_bytes else ""
    what = ", ".join(part for part in (device.name, used, heat, device.health_reason) if part)
    return [
        device.id,
        "mig" if device.is_mig else device.kind,
        state.state,
        state.holder,
        device.memory_bytes,
        busy,
        what,
    ]
