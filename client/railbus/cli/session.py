"""What all commands share: the root that was asked for, and the way into asyncio and onto the bus."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar
from urllib.parse import urlsplit

import click

from railbus.cli import exit_codes

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.errors import NotAuthorized, RailbusError
    from railbus_shared.layout import Layout
    from railbus_shared.settings import CommonSettings

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_ROOT: Final = Path("learning")
_NEAR: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_NEAR_S: Final = 1.0
"""A server on this host greets within milliseconds, so that `nothing runs` can be said at once."""
_FAR_S: Final = 5.0


@dataclass
class Session:
    """What stands before the command's name."""

    root: Path | None = None
    traceback: bool = False
    error_status: int | None = None
    """The exit status of every error, for a command whose other statuses are those of a job."""

    @property
    def layout(self) -> Layout:
        """The tree under the root that was asked for."""
        from railbus_shared.layout import Layout

        return Layout(self.root or DEFAULT_ROOT)


def session() -> Session:
    """The session of the command that runs."""
    return click.get_current_context().ensure_object(Session)


def exit_with_code_of_another() -> None:
    """From now on every error ends with the status of trouble of ours: the others are those of a job or a command."""
    session().error_status = exit_codes.OUR_TROUBLE


def root_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--root`, which may stand before the command's name as well as after it; the nearer one counts."""

    def keep(context: click.Context, _: click.Parameter, root: Path | None) -> None:
        if root is not None:
            context.ensure_object(Session).root = root

    return click.option(
        "--root",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="RAILBUS_ROOT",
        expose_value=False,
        callback=keep,
        metavar="DIR",
        help="Root of the canonical tree; ./learning if not given.",
    )(command)


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--json`, passed on as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document; one a line for streams.")(command)


def run(work: Coroutine[None, None, R]) -> R:
    """Run a command's asynchronous part. Its log lines stay away: what matters is raised or shown."""
    import asyncio
    import logging

    logging.getLogger().addHandler(logging.NullHandler())
    return asyncio.run(work)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    """A client of the bus of the root; raises BusUnavailable, NotAuthorized."""
    from railbus.client import Client, settings_for
    from railbus_shared.errors import NotAuthorized

    settings = settings_for(session().root)
    if "connect_timeout_s" not in settings.model_fields_set:
        patience_s = _NEAR_S if urlsplit(settings.nats_url).hostname in _NEAR else _FAR_S
        settings = settings.model_copy(update={"connect_timeout_s": patience_s})
    try:
        async with Client.connect(settings) as client:
            yield client
    except NotAuthorized as exc:
        raise refusal(exc, settings) from exc


def refusal(error: NotAuthorized, settings: CommonSettings) -> RailbusError:
    """What to tell whom NATS refused: where nobody named a server, the one at the usual port is another root's."""
    from railbus_shared.errors import BusUnavailable

    if settings.model_fields_set & {"nats_url", "nats_key_file"}:
        return error
    return BusUnavailable(
        f"nothing runs on {str(settings.root)!r}, and the NATS at {settings.nats_url} belongs to something else",
        hint="`railbus up`, or set RAILBUS_NATS_URL and RAILBUS_NATS_KEY_FILE",
    )
