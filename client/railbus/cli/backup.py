"""`railbus backup`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from railbus.cli.progress import progress
from railbus.cli.session import json_option, root_option, run, session

if TYPE_CHECKING:
    from railbus.backup.manifest import Manifest
    from railbus_shared.settings import CommonSettings


deployment_option = click.option(
    "--deployment",
    "-d",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="A folder of `railbus init`; without it, the NATS of the root.",
)


def summary(folder: Path, manifest: Manifest) -> dict[str, object]:
    """What is told of a backup as JSON."""
    return {
        "folder": str(folder),
        "incarnation": manifest.incarnation,
        "created_at": manifest.created_at,
        "nats_server": manifest.nats_server,
        "bytes": manifest.num_bytes,
        "streams": [
            {
                "name": one.name,
                "messages": int(one.state["messages"]),
                "bytes": sum(file.bytes for file in one.files),
            }
            for one in manifest.streams
        ],
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@deployment_option
@json_option
@root_option
def backup(*, folder: Path, deployment: Path | None, as_json: bool) -> None:
    """Copy the store of a running NATS into FOLDER, which must not exist.

    Jobs, records, events and all other state, while everything runs. It needs the key of the operator, which lies among
    the keys of the root or the deployment. Copy models, datasets and logs after it: they are plain files.

    \b
      railbus backup /backups/monday
      rsync -a --exclude .railbus learning/ /backups/files/
      railbus backup /backups/monday --deployment deploy
    """
    from railbus.backup.access import named, running
    from railbus.cli.render import print_json, size

    reached = named(session().layout.root, deployment) or running(session().tree.root)
    manifest = run(_saved(folder.absolute(), reached.settings))
    if as_json:
        print_json(summary(folder, manifest))
        return
    messages = sum(int(one.state["messages"]) for one in manifest.streams)
    click.echo(f"{len(manifest.streams)} streams, {messages} messages, {size(manifest.num_bytes)} in {folder}")


async def _saved(folder: Path, settings: CommonSettings) -> Manifest:
    from importlib.metadata import version

    from railbus.backup.saving import save
    from railbus.embedded.permissions import OPERATOR
    from railbus_shared.bus.connection import Bus

    with progress() as report:
        async with Bus.open(settings, name=OPERATOR, service=True) as bus:
            return await save(bus, folder, version=version("railbus"), report=report)
