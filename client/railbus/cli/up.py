"""`railbus up`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from railbus.cli.session import root_option, session
from railbus_shared.errors import ConfigError


@click.command()
@root_option
@click.option(
    "--nats-port", type=click.IntRange(0, 65_535), help="4222, or a free one if that is taken; 0: any free one."
)
@click.option(
    "--http-port-base",
    type=click.IntRange(0, 65_532),
    help="Health and metrics are served from this port on; 0: any free ones. If not given, 8701 where that is free.",
)
@click.option(
    "--rotation", type=click.Choice(["hourly", "daily"]), default="hourly", show_default=True, help="Of the logs."
)
@click.option(
    "--entrypoints",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Folder whose `package.module:function` jobs may name; may be repeated.",
)
@click.option(
    "--cpu-slots", type=click.IntRange(min=0), help="CPU slots of this host; one for each NUMA node if not given."
)
@click.option("--new-store", is_flag=True, help="Begin with a new NATS store where the old one is gone.")
def up(
    *,
    nats_port: int | None,
    http_port_base: int | None,
    rotation: str,
    entrypoints: tuple[Path, ...],
    cpu_slots: int | None,
    new_store: bool,
) -> int:
    """Start NATS and the four services on this machine, and keep them running.

    Ctrl-C drains and stops them; a second Ctrl-C stops at once.
    """
    from railbus.embedded.run_files import read_bus
    from railbus.embedded.supervisor import Options
    from railbus.embedded.up import up as run_up

    layout = session().layout
    if new_store and read_bus(layout.root) is None:  # one that runs goes on with its own
        (layout.state / "store.json").unlink(missing_ok=True)
    env = service_env(rotation=rotation, entrypoints=entrypoints, cpu_slots=cpu_slots)
    return run_up(layout.root, options=Options(nats_port=nats_port, http_port_base=http_port_base, env=env))


def service_env(*, rotation: str, entrypoints: tuple[Path, ...], cpu_slots: int | None) -> dict[str, str]:
    """The options as settings of the services.

    Raises ConfigError where root wants a runner of another user: the tree, keys and all, is that of who starts this.
    """
    if os.geteuid() == 0 and os.environ.get("RAILBUS_RUNNER_USER"):
        raise ConfigError(
            "setting RAILBUS_RUNNER_USER is not for this command: all that it starts is of one user, root here",
            hint="run it as that user, or start the services each by itself: docs/operations.md",
        )
    env = {"RAILBUS_TELEMETRY_ROTATION": rotation}
    if entrypoints:
        env["RAILBUS_RUNNER_ENTRYPOINT_DIRS"] = json.dumps([str(path.resolve()) for path in entrypoints])
    if cpu_slots is not None:
        env["RAILBUS_DEVICE_MANAGER_CPU_SLOTS"] = str(cpu_slots)
    return env
