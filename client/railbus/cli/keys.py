"""`railbus keys`: who may join the bus."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import click

from railbus.cli.groups import DefaultGroup
from railbus.cli.session import json_option, root_option, session

if TYPE_CHECKING:
    from collections.abc import Callable

    from railbus.embedded.members import Place
    from railbus.embedded.permissions import Role

P = ParamSpec("P")
R = TypeVar("R")

_BY_HAND: Final = "docker compose exec nats kill -HUP 1 && sleep 1 && docker compose exec nats kill -HUP 1"
"""Not `docker compose kill`: Docker takes any signal for the wish to stop, and restarts no more what crashes later."""


def _deployment_option(command: Callable[P, R]) -> Callable[P, R]:
    return click.option(
        "--deployment",
        "-d",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        metavar="DIR",
        help="A folder of `railbus init`; without it, the keys of `railbus up` on the root.",
    )(command)


@click.group(cls=DefaultGroup)
def keys() -> None:
    """List, add, revoke and replace keys of the bus. A server of `railbus up` knows at once.

    \b
      railbus keys add ann                   her key is a file: give it to her
      railbus keys add ben --public UABC...  he made it, and keeps the secret
      railbus keys add wall --read-only      for a screen that only shows
      railbus keys revoke ann                cut at once
    """


@keys.command("list")
@_deployment_option
@json_option
@root_option
def list_keys(*, deployment: Path | None, as_json: bool) -> None:
    """List who has a key, and what for."""
    from railbus.cli.render import Column, print_json, show, to_console
    from railbus.embedded.members import all_members

    members = all_members(_place(deployment))
    if as_json:
        print_json([asdict(one) for one in members])
        return
    columns = (Column("NAME", "id"), Column("ROLE", "id"), Column("SECRET", "id"), Column("PUBLIC KEY", "brief"))
    rows = [[one.name, one.role, "here" if one.has_seed else "theirs", one.public] for one in members]
    show(columns, rows, console=to_console())


@keys.command()
@click.argument("name")
@click.option("--read-only", is_flag=True, help="Looks at jobs, devices, data and events, and changes nothing.")
@click.option(
    "--role", type=click.Choice(["user", "read-only", "submit-only"]), help="What for; `user` does all that people do."
)
@click.option("--public", metavar="KEY", help="Public key (`U…`) of someone who keeps the secret.")
@_deployment_option
@json_option
@root_option
def add(
    *, name: str, read_only: bool, role: Role | None, public: str | None, deployment: Path | None, as_json: bool
) -> None:
    """Give a person a key of their own."""
    from railbus.embedded.members import add as add_member

    if read_only and role not in {None, "read-only"}:
        raise click.UsageError(f"--read-only and --role {role} are not the same")
    place = _place(deployment)
    member = add_member(place, name, "read-only" if read_only else role or "user", public=public)
    what = f"{name} has the key {place.seed(name)}" if member.has_seed else f"{name} may join with the key they have"
    _tell(asdict(member), what, _let_know(place, is_embedded=deployment is None), as_json=as_json)


@keys.command()
@click.argument("name")
@_deployment_option
@json_option
@root_option
def revoke(*, name: str, deployment: Path | None, as_json: bool) -> None:
    """End a person's key, and cut whoever uses it."""
    from railbus.embedded.members import revoke as revoke_member
    from railbus.embedded.members import unknown

    place = _place(deployment)
    was_there = revoke_member(place, name)
    known = _let_know(place, is_embedded=deployment is None)
    if not (was_there or known.has_changed):  # else it completes what was cut short
        raise unknown(place, name)
    what = f"the key of {name} is of no use any more"
    _tell({"name": name, "revoked": True}, what, known, as_json=as_json)


@keys.command()
@click.argument("name")
@_deployment_option
@json_option
@root_option
def rotate(*, name: str, deployment: Path | None, as_json: bool) -> None:
    """Replace the key of a person or a service; whoever holds the old one is cut."""
    from railbus.embedded.members import rotate as rotate_member

    place = _place(deployment)
    member = rotate_member(place, name)
    what = f"{name} has another key: {place.seed(name)}"
    _tell(asdict(member), what, _let_know(place, is_embedded=deployment is None), as_json=as_json)


def _place(deployment: Path | None) -> Place:
    from railbus.embedded.members import Place

    return Place.of_root(session().tree.root) if deployment is None else Place.of_deployment(deployment)


@dataclass(frozen=True)
class _Known:
    """What the server knows of a change."""

    has_changed: bool
    """Whether what it reads has."""
    is_reloaded: bool
    is_embedded: bool
    """Whether it is that of a root, which is told; one of a deployment is for its operator to tell."""


def _let_know(place: Place, *, is_embedded: bool) -> _Known:
    """Write what the server reads, and have it do so if it is ours."""
    from railbus.embedded.reloading import reload_embedded, write_accounts
    from railbus.embedded.server_config import ServerFiles
    from railbus_shared.settings import CommonSettings, load

    has_changed = write_accounts(place, load(CommonSettings).subject_prefix)
    is_reloaded = is_embedded and reload_embedded(ServerFiles(place.config.parent))
    return _Known(has_changed, is_reloaded, is_embedded)


def _tell(found: dict[str, object], what: str, known: _Known, *, as_json: bool) -> None:
    """Say what was done and what is left to do."""
    from railbus.cli.render import print_json

    if as_json:
        print_json({**found, "reloaded": known.is_reloaded})
        return
    click.echo(what)
    if not known.is_embedded:
        click.echo(f"tell NATS: {_BY_HAND}", err=True)
    elif not known.is_reloaded:
        click.echo("NATS does not run on this root; the next `railbus up` knows", err=True)
