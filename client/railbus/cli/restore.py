"""`railbus restore`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from railbus.cli.backup import deployment_option, summary
from railbus.cli.progress import progress
from railbus.cli.session import json_option, root_option, run, session

if TYPE_CHECKING:
    from railbus.backup.access import Reached
    from railbus.backup.manifest import Manifest
    from railbus_shared.layout import Layout


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--replace", is_flag=True, help="Put the backup in the place of what NATS holds.")
@deployment_option
@click.option("--join", is_flag=True, help="Take the store as another root has restored it: for the further hosts.")
@json_option
@root_option
def restore(*, folder: Path | None, replace: bool, deployment: Path | None, join: bool, as_json: bool) -> None:
    """Put the backup in FOLDER into NATS; without FOLDER, accept a store that was put back by other means.

    Stop the services of all hosts first. With FOLDER a NATS runs that holds nothing (that of a root is started for
    it), or --replace says that what it holds is to go. RAILBUS_REPLICAS=3 makes three copies of each stream in a
    cluster. The store gets a new incarnation, so that nothing that comes is taken for what was there after the backup.
    An interrupted restore is begun anew by the same command. On further hosts use --join.

    \b
      railbus restore /backups/monday                       into the root
      railbus restore /backups/monday --deployment deploy
      railbus restore            accept the files of NATS that were put back
      railbus restore --join     on every other host
    """
    if folder is None:
        if replace or deployment is not None or as_json:
            raise click.UsageError("--replace, --deployment and --json belong to a FOLDER")
        _accept(session().tree, joins=join)
        return
    if join:
        raise click.UsageError("--join takes what another root has restored: give no FOLDER")
    _put_back(folder, deployment, replaces=replace, as_json=as_json)


def _accept(layout: Layout, *, joins: bool) -> None:
    """Have the next start of the root's services take the store as it is then."""
    from railbus.embedded.run_files import read_bus
    from railbus_shared.errors import AlreadyRunning, NotFound
    from railbus_shared.store_marker import marker_path, read_marker, write_marker

    if read_bus(layout.root) is not None:
        raise AlreadyRunning(f"`railbus up` runs on {str(layout.root)!r}", hint="stop it first")
    path = marker_path(layout)
    marker = read_marker(path)
    if not marker.streams:
        raise NotFound(f"{str(layout.root)!r} knows no store yet", hint="it takes the first one that it finds")
    write_marker(path, marker.restored(joins=joins))
    click.echo("the next start takes the store of NATS as it is then" if joins else "the next start renews the store")


def _put_back(folder: Path, deployment: Path | None, *, replaces: bool, as_json: bool) -> None:
    from railbus.backup.access import named, own_server
    from railbus.backup.manifest import read, verify
    from railbus.cli.render import print_json, size
    from railbus_shared.store_marker import marker_path, read_marker

    manifest = read(folder)
    with progress() as report:
        verify(folder, manifest, report=report)
    root = session().layout.root
    found = named(root, deployment)
    with own_server(root) if found is None else nullcontext(found) as reached:
        incarnation = run(_restored(folder, manifest, reached, replaces=replaces))
    has_accepted = read_marker(marker_path(reached.settings.layout)).incarnation == incarnation
    if as_json:
        told = {"incarnation": incarnation, "backed_up": manifest.incarnation, "root_accepted": has_accepted}
        print_json({**summary(folder, manifest), **told})
        return
    click.echo(f"{len(manifest.streams)} streams, {size(manifest.num_bytes)}, as they were at {manifest.created_at}")
    others = "on every other host" if has_accepted else "on every host, with its root"
    click.echo(f"{others}: railbus restore --join; then start the services", err=True)


async def _restored(folder: Path, manifest: Manifest, reached: Reached, *, replaces: bool) -> str:
    from railbus.backup.restoring import restore as put_back
    from railbus.embedded.permissions import OPERATOR
    from railbus_shared.bus.connection import Bus
    from railbus_shared.store_marker import StoreMarker, marker_path, read_marker, write_marker

    path = marker_path(reached.settings.layout)

    def accept(incarnation: str, places: frozenset[str]) -> None:
        """The root of this host knows the store from now on, if it is of this one and not of another."""
        if reached.is_own or read_marker(path).incarnation in places:
            write_marker(path, StoreMarker(incarnation, tuple(one.name for one in manifest.streams)))

    with progress() as report:
        async with Bus.open(reached.settings, name=OPERATOR, service=True) as bus:
            return await put_back(bus, folder, manifest, replaces=replaces, accept=accept, report=report)
