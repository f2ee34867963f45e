"""`railbus restore`."""

from __future__ import annotations

import click

from railbus.cli.session import root_option, session


@click.command()
@root_option
@click.option("--join", is_flag=True, help="Take the store as another root has restored it: for the further hosts.")
def restore(*, join: bool) -> None:
    """Accept the store of NATS that was put back from a backup.

    Run it while the services of the root are stopped, once the store is in its place. At their next start they find
    every stream there, or refuse; and they give the store a new incarnation, so that nothing that comes is taken for
    what was there after the backup. On further hosts use --join, after the first one has started.

    \b
      railbus restore                  on the first host
      railbus restore --join           on every other one
    """
    from railbus.embedded.run_files import read_bus
    from railbus_shared.errors import AlreadyRunning, NotFound
    from railbus_shared.store_marker import marker_path, read_marker, write_marker

    layout = session().tree
    if read_bus(layout.root) is not None:
        raise AlreadyRunning(f"`railbus up` runs on {str(layout.root)!r}", hint="stop it first")
    path = marker_path(layout)
    marker = read_marker(path)
    if not marker.streams:
        raise NotFound(f"{str(layout.root)!r} knows no store yet", hint="it takes the first one that it finds")
    write_marker(path, marker.restored(joins=join))
    click.echo("the next start takes the store of NATS as it is then" if join else "the next start renews the store")
