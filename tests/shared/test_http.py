"""Health and metrics over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping

import aiohttp
import pytest

from railbus_shared import http
from railbus_shared.errors import BadSetting, PortInUse
from railbus_shared.http import health_server
from railbus_shared.metrics import Metrics
from until import PATIENCE_S

GOOD = {"nats": "", "disk": ""}
BAD = {"nats": "", "disk": "no space left"}


@contextlib.asynccontextmanager
async def _served(
    found: Mapping[str, str] | Exception | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    names: tuple[str, ...] = (),
) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    async def checks() -> Mapping[str, str]:
        if isinstance(found, Exception):
            raise found
        if found is None:
            await asyncio.sleep(60)
            raise AssertionError("waited too long")
        return found

    async with (
        health_server(name="thing", host=host, port=port, checks=checks, metrics=Metrics("thing"), names=names) as url,
        aiohttp.ClientSession() as session,
    ):
        yield url, session


async def _get(session: aiohttp.ClientSession, url: str, **headers: str) -> tuple[int, str]:
    async with session.get(url, headers=headers) as response:
        return response.status, await response.text()


@pytest.mark.parametrize("path", ["readyz", "healthz"])
async def test_readiness_names_what_is_missing(path: str) -> None:
    async with _served(GOOD) as (url, session):
        assert await _get(session, f"{url}/{path}") == (200, "ok\n")
        assert await _get(session, f"{url}/{path}?verbose") == (200, "[+]nats ok\n[+]disk ok\nok\n")
    async with _served(BAD) as (url, session):
        assert await _get(session, f"{url}/{path}") == (503, "[+]nats ok\n[-]disk: no space left\nnot ready\n")


async def test_readiness_is_told_to_programs_as_json() -> None:
    async with _served(BAD) as (url, session):
        status, text = await _get(session, f"{url}/readyz", Accept="application/json")
        assert (status, json.loads(text)) == (503, {"ready": False, "checks": BAD})


async def test_a_check_that_fails_or_hangs_is_not_ready_while_the_process_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("railbus_shared.http._CHECK_S", 0.3)
    async with _served(ZeroDivisionError("oops")) as (url, session):
        status, text = await _get(session, f"{url}/readyz")
        assert (status, "ZeroDivisionError" in text) == (503, True)
        assert await _get(session, f"{url}/livez") == (200, "ok\n")
    async with _served(None) as (url, session):
        hanging = asyncio.ensure_future(_get(session, f"{url}/readyz"))
        assert await _get(session, f"{url}/livez") == (200, "ok\n")
        status, text = await hanging
        assert (status, text) == (503, "[-]checks: no answer within 0.3 s\nnot ready\n")


async def test_metrics_and_version_are_served() -> None:
    async with _served(GOOD) as (url, session):
        status, text = await _get(session, f"{url}/metrics")
        assert status == 200
        assert 'railbus_build_info{service="thing"' in text
        assert "railbus_nats_connected 0.0" in text
        assert '"service": "thing"' in (await _get(session, f"{url}/version"))[1]
        assert (await _get(session, f"{url}/nothing"))[0] == 404


async def test_no_connection_is_kept_that_would_be_cut_under_a_later_request() -> None:
    async with _served(GOOD) as (url, session), session.get(f"{url}/metrics") as response:
        assert (response.status, response.headers["Connection"]) == (200, "close")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_nothing_can_be_changed(method: str) -> None:
    async with _served(GOOD) as (url, session):
        for path in ("livez", "readyz", "healthz", "metrics", "version"):
            async with session.request(method, f"{url}/{path}", data=b"x") as response:
                assert response.status == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:80", ""])
async def test_on_loopback_other_host_names_are_refused(host: str) -> None:
    async with _served(GOOD) as (url, session):
        for path in ("livez", "readyz", "metrics"):
            assert (await _get(session, f"{url}/{path}", Host=host))[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:80"])
async def test_on_loopback_its_own_names_are_served(host: str) -> None:
    async with _served(GOOD) as (url, session):
        assert (await _get(session, f"{url}/livez", Host=host))[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403), ("10.0.0.1.evil.example", 403), ("", 403), ("monitor.example", 200),
        ("10.0.0.1:80", 200), ("[fe80::1]", 200), ("telemetry:8704", 200), ("localhost", 200),
    ],
)  # fmt: skip
async def test_elsewhere_names_that_somebody_could_register_are_refused(host: str, status: int) -> None:
    async with _served(GOOD, host="0.0.0.0", names=("monitor.example",)) as (url, session):  # noqa: S104 - the case
        assert (await _get(session, f"{url}/livez", Host=host))[0] == status


async def test_whoever_sends_slowly_or_opens_many_connections_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_CONNECTION_S", 0.5)
    monkeypatch.setattr(http, "_MAX_CONNECTIONS", 8)
    async with _served(GOOD) as (url, session):
        port = int(url.rsplit(":", 1)[1])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in opened:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        async with asyncio.timeout(PATIENCE_S):
            for reader, _ in opened:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
        for _, writer in opened:
            writer.close()
        monkeypatch.setattr(http, "_CONNECTION_S", PATIENCE_S)
        assert await _get(session, f"{url}/livez") == (200, "ok\n")


@pytest.mark.parametrize("request_", [b"/" + b"a" * 5000, b"/livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 5000])
async def test_a_long_line_is_refused(request_: bytes) -> None:
    async with _served(GOOD) as (url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"GET " + request_ + b"\r\n\r\n")
        assert int((await reader.readline()).split()[1]) == 400
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("line", [b"GET /livez HTTP/1.1\r\nHost: [evil\r\n\r\n", b"\xff\xfe\r\n\r\n", b"GET\r\n\r\n"])
async def test_what_is_no_request_is_refused(line: bytes) -> None:
    async with _served(GOOD) as (url, session):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(line)
        assert int((await reader.readline()).split()[1]) in {400, 403}
        writer.close()
        await writer.wait_closed()
        assert await _get(session, f"{url}/livez") == (200, "ok\n")


async def test_a_port_that_is_taken_is_told_with_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUse, match="RAILBUS_THING_HTTP_PORT"):
            async with _served(GOOD, port=taken.getsockname()[1]):
                pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
async def test_an_address_that_is_not_ours_is_a_bad_setting(host: str) -> None:
    with pytest.raises(BadSetting, match="RAILBUS_THING_HTTP_HOST"):
        async with _served(GOOD, host=host):
            pass
