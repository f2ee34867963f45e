"""Health and metrics over HTTP: `/livez`, `/readyz` (or `/healthz`), `/metrics`; GET only, no arguments, no secrets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from railbus_shared.errors import BadSetting, ConfigError, PortInUse
from railbus_shared.metrics import Metrics, version

logger = logging.getLogger(__name__)

Checks = Callable[[], Awaitable[Mapping[str, str]]]
"""Name of each thing that readiness needs, and what is wrong with it; an empty string if nothing is."""

_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_CHECK_S: Final = 4.0


@contextlib.asynccontextmanager
async def health_server(*, name: str, host: str, port: int, checks: Checks, metrics: Metrics) -> AsyncIterator[str]:
    """Serve until left; yields the base URL. Raises PortInUse."""
    app = web.Application(middlewares=[_guard(loopback=host in _LOOPBACK)])
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
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as exc:
            raise _unusable(exc, name=name, host=host, port=port) from exc
        bound = runner.addresses[0][1]
        yield f"http://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{bound}"  # noqa: S104 - a comparison
    finally:
        await runner.cleanup()


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


def _guard(*, loopback: bool) -> Middleware:
    """On loopback, refuse other Host names: a page in a browser must not reach us by DNS rebinding."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if loopback and (request.url.host or "") not in _LOOPBACK:
            return web.Response(status=403, text="this Host is not served here\n")
        return await handler(request)

    return guard


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
