"""What all commands share: the root that was asked for, and the way into asyncio and onto the bus."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from railbus.cli import exit_codes

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.errors import BusUnavailable, NotAuthorized, RailbusError
    from railbus_shared.layout import Layout
    from railbus_shared.settings import CommonSettings

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_ROOT: Final = Path("learning")
_NEAR: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_NEAR_S: Final = 1.0
"""A server on this host greets within milliseconds, so that `nothing runs` can be said at once."""
_FAR_S: Final = 5.0
_OTHER_ROOT: Final = "name another with --root DIR or RAILBUS_ROOT; `railbus up` makes one"
_START: Final = "start it with `railbus up`, or name another server with RAILBUS_NATS_URL and RAILBUS_NATS_KEY_FILE"
_OTHER_BUS: Final = f"{_OTHER_ROOT}; RAILBUS_NATS_URL joins a server elsewhere"


@dataclass
class Session:
    """What stands before the command's name."""

    root: Path | None = None
    root_from: str = "the default"
    """Who named the root."""
    traceback: bool = False
    error_status: int | None = None
    """The exit status of every error, for a command whose other statuses are those of a job."""

    @property
    def layout(self) -> Layout:
        """The tree under the root that was asked for."""
        from railbus_shared.layout import Layout

        return Layout(self.root or DEFAULT_ROOT)

    @property
    def tree(self) -> Layout:
        """The same, for a command that reads what is there already; raises NotFound where there is no such root."""
        from railbus_shared.errors import NotFound

        if problem := self.root_problem:
            raise NotFound(problem, hint=_OTHER_ROOT)
        return self.layout

    @property
    def root_problem(self) -> str:
        """That the root does not exist, and who named it; empty if it does."""
        root = self.layout.root
        return "" if root.is_dir() else f"root {str(root.absolute())!r} ({self.root_from}) does not exist"


def session() -> Session:
    """The session of the command that runs."""
    return click.get_current_context().ensure_object(Session)


def exit_with_code_of_another() -> None:
    """From now on every error ends with the status of trouble of ours: the others are those of a job or a command."""
    session().error_status = exit_codes.OUR_TROUBLE


def root_option(command: Callable[P, R]) -> Callable[P, R]:
    """`--root`, which may stand before the command's name as well as after it; the nearer one counts.

    The environment counts where neither is there.
    """

    def keep(context: click.Context, parameter: click.Parameter, root: Path | None) -> None:
        is_variable = context.get_parameter_source(str(parameter.name)) is ParameterSource.ENVIRONMENT
        found = context.ensure_object(Session)
        if root is not None and not (is_variable and found.root is not None):
            found.root, found.root_from = root, "from RAILBUS_ROOT" if is_variable else "from --root"

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
    """Run a command's asynchronous part. Its log lines stay away: what matters is raised or shown.

    Ctrl-C ends it although nats-py may lose the cancellation.
    """
    import asyncio
    import logging

    from railbus_shared.waiting import end

    async def until_ended() -> R:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task])
        finally:
            await end(task)
        return task.result()

    logging.getLogger().addHandler(logging.NullHandler())
    return asyncio.run(until_ended())


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Client]:
    """A client of the bus of the root; raises BusUnavailable, NotAuthorized."""
    from railbus.client import Client, settings_for
    from railbus_shared.errors import BusUnavailable, NotAuthorized

    settings = settings_for(session().root)
    if "connect_timeout_s" not in settings.model_fields_set:
        patience_s = _NEAR_S if urlsplit(settings.nats_url).hostname in _NEAR else _FAR_S
        settings = settings.model_copy(update={"connect_timeout_s": patience_s})
    is_open = False
    try:
        async with Client.connect(settings) as client:
            is_open = True
            yield client
    except NotAuthorized as exc:
        raise refusal(exc, settings, session()) from exc
    except BusUnavailable as exc:
        if is_open or _is_named(settings):
            raise
        raise _nothing_runs(session(), f"no NATS answers at {settings.nats_url}") from exc


def refusal(error: NotAuthorized, settings: CommonSettings, asked: Session) -> RailbusError:
    """What to tell whom NATS refused: where nobody named a server, the one at the usual port is another root's."""
    if _is_named(settings):
        return error
    return _nothing_runs(asked, f"the NATS at {settings.nats_url} belongs to something else")


def knows_bus() -> bool:
    """Whether somebody has named a server, or one runs on the root: else there is only the usual port to be tried."""
    from railbus.client import settings_for

    return _is_named(settings_for(session().root))


def _is_named(settings: CommonSettings) -> bool:
    """Whether somebody has named a server, or a key for it."""
    return bool(settings.model_fields_set & {"nats_url", "nats_key_file"})


def _nothing_runs(asked: Session, why: str) -> BusUnavailable:
    """What to tell where nobody named a server: that the root is not there, else that nothing runs on it."""
    from railbus_shared.errors import BusUnavailable

    if problem := asked.root_problem:
        return BusUnavailable(f"{problem}, and {why}", hint=_OTHER_BUS)
    root = str(asked.layout.root.absolute())
    return BusUnavailable(f"nothing runs on root {root!r} ({asked.root_from}), and {why}", hint=_START)
