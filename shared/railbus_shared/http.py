"""Health and metrics over HTTP: `/livez`, `/readyz` (or `/healthz`), `/metrics`; GET only, no arguments, no secrets.

A page in a browser must not reach them by DNS rebinding, so a request names an address, a name of one label, which
nobody can register, or a name from the settings. A connection is for one request and lives for half a minute, and there
are not more than 128 of them, so that whoever sends slowly holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestHandler
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from railbus_shared.errors import BadSetting, ConfigError, PortInUse
from railbus_shared.metrics import Metrics, version

logger = logging.getLogger(__name__)

Checks = Callable[[], Awaitable[Mapping[str, str]]]
"""Name of each thing that readiness needs, and what is wrong with it; an empty string if nothing is."""

_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_CHECK_S: Final = 4.0
_CONNECTION_S: Final = 30.0
_MAX_CONNECTIONS: Final = 128
_MAX_LINE_BYTES: Final = 4096


@contextlib.asynccontextmanager
async def health_server(
    *, name: str, host: str, port: int, checks: Checks, metrics: Metrics, names: Collection[str] = ()
) -> AsyncIterator[str]:
    """Serve until left, under these host names; yields the base URL. Raises PortInUse."""
    app = web.Application(middlewares=[_guard(loopback=host in _LOOPBACK, names=frozenset(names))])
    app.add_routes(
        [
            web.get("/livez", _livez),
            web.get("/readyz", _readyz(checks)),
            web.get("/healthz", _readyz(checks)),
            web.get("/metrics", _metrics(metrics)),
            web.get("/version", _version(name)),
        ]
    )
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - `setup` has made it
    connections = _Connections(runner.server)
    try:
        try:
            server = await asyncio.get_running_loop().create_server(connections.accept, host, port, backlog=128)
        except OSError as exc:
            raise _unusable(exc, name=name, host=host, port=port) from exc
        bound = server.sockets[0].getsockname()[1]
        try:
            yield f"http://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{bound}"  # noqa: S104 - a comparison
        finally:
            server.close()
    finally:
        await runner.cleanup()


class _Connections:
    """Those that are open, which are not many and not for long."""

    def __init__(self, server: web.Server) -> None:
        self.num_open = 0
        self._server = server

    def accept(self) -> _Connection:
        """The protocol of one more."""
        return _Connection(self, self._server)


class _Connection(RequestHandler):
    """One of them; aiohttp itself waits for a request for ever."""

    __slots__ = ("_all", "_end")

    def __init__(self, connections: _Connections, server: web.Server) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # as its own runner gives it
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
        )
        self._all = connections
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin its time; one too many is refused."""
        super().connection_made(transport)
        self._all.num_open += 1
        limit_s = _CONNECTION_S if self._all.num_open <= _MAX_CONNECTIONS else 0.0
        self._end = self._loop.call_later(limit_s, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Its time is over, or its other side has gone."""
        self._all.num_open -= 1
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)


def _unusable(exc: OSError, *, name: str, host: str, port: int) -> ConfigError:
    """What is wrong with an address that cannot be listened on."""
    setting = f"RAILBUS_{name.upper()}_HTTP"
    if exc.errno == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} of {name} is in use on {host}",
            hint=f"set {setting}_PORT to another one, or to 0 for any free one",
        )
    return BadSetting(
        f"settings {setting}_HOST and {setting}_PORT have values {host!r} and {port}: cannot listen there: {exc}",
        hint="use 127.0.0.1, and a port above 1023 or 0",
    )


def _guard(*, loopback: bool, names: frozenset[str]) -> Middleware:
    """Refuse what names another host; on loopback, all but its own names. Each answer ends its connection."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.url.host or ""
        if host not in _LOOPBACK and host not in names and (loopback or not _is_safe(host)):
            return web.Response(status=403, text="this Host is not served here\n")
        answer = await handler(request)
        answer.force_close()  # else its time may be over while a later request is on its way
        return answer

    return guard


def _is_safe(host: str) -> bool:
    """Whether a name cannot be one of an attacker's own, which leads to us by DNS."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host != "" and "." not in host
    return True


async def _livez(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _readyz(checks: Checks) -> Handler:
    async def readyz(request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_CHECK_S):
                found = await checks()
        except TimeoutError:
            found = {"checks": f"no answer within {_CHECK_S:g} s"}
        except Exception as exc:  # a check that fails in a way of its own must not turn into an empty 500
            logger.exception("bug in a check")
            found = {"checks": f"cannot tell: {exc!r}"}
        failed = {name: problem for name, problem in found.items() if problem}
        shown = found if "verbose" in request.query or failed else {}
        if "application/json" in request.headers.get("Accept", ""):
            return web.json_response({"ready": not failed, "checks": dict(found)}, status=503 if failed else 200)
        lines = [f"[-]{name}: {problem}" if problem else f"[+]{name} ok" for name, problem in shown.items()]
        lines.append("not ready" if failed else "ok")
        return web.Response(status=503 if failed else 200, text="\n".join(lines) + "\n")

    return readyz


def _metrics(metrics: Metrics) -> Handler:
    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return scrape


def _version(name: str) -> Handler:
    async def show(_: web.Request) -> web.Response:
        return web.json_response({"service": name, "version": version()})

    return show
