"""`railbus init`."""

from __future__ import annotations

from pathlib import Path

import click

from railbus.cli.session import json_option


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="deploy", metavar="[DIR]")
@click.option("--tls", is_flag=True, help="Make an authority and a certificate, so that NATS is reached by TLS.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name or address of NATS, for its certificate; repeatable.",
)
@json_option
def init(*, folder: Path, tls: bool, hosts: tuple[str, ...], as_json: bool) -> None:
    """Make keys and the configuration of NATS for a deployment, in DIR (./deploy).

    What is there is kept: run it again after an update, or to add TLS. Each service and person is given one file of
    DIR/keys, and no other.

    \b
      railbus init deploy
      railbus init deploy --tls --host nats.example.com
      railbus keys add ann --deployment deploy
    """
    from railbus.cli.render import print_json
    from railbus.deployment import deploy, own_names
    from railbus.embedded.members import Place, all_members
    from railbus_shared.settings import CommonSettings, load

    if hosts and not tls:
        raise click.UsageError("--host names what a certificate is for: give --tls, too")
    prefix = load(CommonSettings).subject_prefix
    has_changed = deploy(folder, tls_hosts=(*own_names(), *hosts) if tls else (), prefix=prefix)
    members = all_members(Place.of_deployment(folder))
    if as_json:
        print_json({"folder": str(folder), "changed": has_changed, "users": [one.name for one in members], "tls": tls})
        return
    changed = "what NATS reads has changed" if has_changed else "nothing has changed"
    click.echo(f"{len(members)} keys in {folder}/keys, those that were there as they were; {changed}")
    if tls:
        click.echo(f"clients need {folder}/tls/ca.crt as RAILBUS_NATS_CA_FILE, and a tls:// URL", err=True)
