"""The life of a service, with a tiny real one in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import nkeys
import pytest

from commands import environment
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.follow import follow
from railbus_shared.errors import NotFound
from railbus_shared.metrics import version
from railbus_shared.settings import CommonSettings
from servers import Server
from until import PATIENCE_S, until

TINY = Path(__file__).with_name("tiny_service.py")


class Process:
    """The tiny service, running."""

    def __init__(self, process: asyncio.subprocess.Process, run_dir: Path, log: Path) -> None:
        self.process = process
        self._run_dir = run_dir
        self._log = log

    async def url(self) -> str:
        """Its address; told as soon as HTTP is served, whether NATS is there or not."""
        path = self._run_dir / "tiny.json"
        async with asyncio.timeout(PATIENCE_S):
            while not path.exists():
                assert self.process.returncode is None, self._log.read_text()
                await asyncio.sleep(0.02)
        found = json.loads(path.read_text())
        assert found["pid"] == self.process.pid
        return str(found["http_url"])

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(f"{await self.url()}/{path}") as response:
            return response.status, await response.text()

    async def until_ready(self, *, status: int = 200, seconds: float = PATIENCE_S) -> str:
        """Waits until /readyz answers with `status`; what it says then."""
        async with asyncio.timeout(seconds):
            while True:
                found, text = await self.get("readyz")
                if found == status:
                    return text
                await asyncio.sleep(0.05)

    def says(self, event: str) -> bool:
        return any(line["event"] == event for line in self.log)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, *, seconds: float = PATIENCE_S) -> int:
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    @property
    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]


@contextlib.asynccontextmanager
async def _tiny(common: CommonSettings, folder: Path, **more: str) -> AsyncIterator[Process]:
    run_dir, log = folder / "run", folder / "tiny.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")},
        "RAILBUS_NATS_URL": common.nats_url,
        "RAILBUS_ROOT": str(common.root),
        "RAILBUS_HOST": "h",
        "RAILBUS_RUN_DIR": str(run_dir),
        "RAILBUS_CONNECT_TIMEOUT_S": "2",
        "RAILBUS_TINY_GRACE_S": "0.5",
        **more,
    }
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(sys.executable, str(TINY), env=environment, stderr=output)
    try:
        yield Process(process, run_dir, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _types(bus: Bus, last: str) -> list[object]:
    """Types of the events in the stream, up to the first `last`."""
    found: list[object] = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in follow(bus, bus.subjects.all_events):
            found.append(event.get("type", "drained"))
            if found[-1] == last:
                break
    return found


async def test_a_service_serves_and_on_sigterm_drains_and_exits_0(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    async with _tiny(common, tmp_path) as tiny:
        assert await tiny.until_ready() == "ok\n"
        assert (await tiny.get("readyz?verbose"))[1] == "[+]nats ok\n[+]jetstream ok\n[+]tiny ok\nok\n"
        assert "railbus_nats_connected 1.0" in (await tiny.get("metrics"))[1]
        asked = asyncio.ensure_future(bus.request("railbus.req.tiny.wait", {"id": "j-1"}, timeout_s=PATIENCE_S))
        await until(lambda: tiny.says("asked"))
        tiny.signal(signal.SIGTERM)
        assert await asked == {"id": "j-1"}
        assert await tiny.ended() == 0
        assert await _types(bus, "service.stopped") == ["service.started", "drained", "service.stopped"]
        assert all(line["level"] == "info" for line in tiny.log), tiny.log
        first = {"event": "starting", "version": version(), "nats": common.nats_url, "root": str(common.root)}
        assert tiny.log[0].items() >= first.items()


async def test_a_second_signal_exits_at_once(bus: Bus, common: CommonSettings, tmp_path: Path) -> None:
    async with _tiny(common, tmp_path, TINY_HANG="1", RAILBUS_TINY_GRACE_S="600") as tiny:
        await tiny.until_ready()
        tiny.signal(signal.SIGTERM)
        await until(lambda: tiny.says("stopping"))
        tiny.signal(signal.SIGINT)
        assert await tiny.ended() == 1


async def test_work_that_does_not_end_in_its_grace_is_abandoned(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    async with _tiny(common, tmp_path, TINY_HANG="1") as tiny:
        await tiny.until_ready()
        tiny.signal(signal.SIGTERM)
        assert await tiny.ended() == 0
        assert any("abandoned" in str(line["event"]) for line in tiny.log)
    assert await _types(bus, "service.stopped") == ["service.started", "service.stopped"]


async def test_a_service_waits_for_nats_alive_but_not_ready(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    server.kill()
    async with _tiny(common, tmp_path) as tiny:
        assert await tiny.get("livez") == (200, "ok\n")
        status, text = await tiny.get("readyz")
        assert status == 503
        assert text.startswith("[-]nats: not connected to nats://127.0.0.1:")
        server.start()
        await tiny.until_ready()
        tiny.signal(signal.SIGTERM)
        assert await tiny.ended() == 0


async def test_a_service_that_waits_for_nats_can_be_stopped_at_once(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    server.kill()
    async with _tiny(common, tmp_path, RAILBUS_CONNECT_TIMEOUT_S="600") as tiny:
        await tiny.url()
        await asyncio.sleep(0.3)
        tiny.signal(signal.SIGTERM)
        assert await tiny.ended() == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_service_without_nats_is_alive_but_not_ready_and_recovers(
    bus: Bus, server: Server, common: CommonSettings, tmp_path: Path, how: signal.Signals
) -> None:
    assert server.process is not None
    async with _tiny(common, tmp_path) as tiny:
        await tiny.until_ready()
        server.process.send_signal(how)
        text = await tiny.until_ready(status=503)
        assert text.startswith(("[-]nats: not connected", "[+]nats ok\n[-]jetstream: NATS at nats://127.0.0.1:"))
        assert await tiny.get("livez") == (200, "ok\n")
        if how is signal.SIGKILL:
            server.kill()
            server.start()
        else:
            server.process.send_signal(signal.SIGCONT)
        await tiny.until_ready()
        tiny.signal(signal.SIGTERM)
        assert await tiny.ended() == 0


async def test_a_service_can_be_stopped_while_nats_is_away(
    bus: Bus, server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with _tiny(common, tmp_path, TINY_QUIET="1") as tiny:
        await tiny.until_ready()
        server.kill()
        await tiny.until_ready(status=503)
        tiny.signal(signal.SIGTERM)
        assert await tiny.ended() == 0


async def test_wrong_credentials_end_a_service_with_one_line_and_2(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    server = Server(tmp_path / "nats", extra='authorization { user: "u", password: "p" }')
    server.start()
    key = tmp_path / "key"
    key.write_bytes(nkeys.encode_seed(b"x" * 32, nkeys.PREFIX_BYTE_USER))
    key.chmod(0o600)
    try:
        common = CommonSettings(root=tmp_path / "learning", nats_url=server.url)
        async with _tiny(common, tmp_path, RAILBUS_NATS_KEY_FILE=str(key), RAILBUS_CONNECT_TIMEOUT_S="600") as tiny:
            assert await tiny.ended() == 2  # and does not try until it may give up
            (line,) = [line for line in tiny.log if line["level"] == "error"]
            assert isinstance(line["error"], dict)
            assert line["error"]["code"] == "NOT_AUTHORIZED"
            assert "traceback" not in line
    finally:
        server.stop()


async def test_a_wiped_store_is_not_made_anew_by_who_starts_or_runs(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with _tiny(common, tmp_path) as tiny:
        await tiny.until_ready()
        server.kill()
        shutil.rmtree(server.folder / "store")
        server.start()
        assert await tiny.ended() == 2
        told = [error for line in tiny.log if isinstance(error := line.get("error"), dict)]
        assert [error["code"] for error in told] == ["STORE_MISSING"]
    (tmp_path / "tiny.log").unlink()
    async with _tiny(common, tmp_path) as tiny:
        assert await tiny.ended() == 2
        (line,) = [line for line in tiny.log if line["level"] == "error"]
        assert isinstance(line["error"], dict)
        assert line["error"]["code"] == "STORE_MISSING"
    async with Bus.open(common, name="test") as bus:
        with pytest.raises(NotFound):
            await bus.last_sequence("RAILBUS_JOBS")


@pytest.mark.parametrize(("name", "status"), [("TINY_BUG", 1), ("TINY_CONFIG", 2), ("TINY_CLOSE", 70)])
async def test_the_exit_status_tells_why_a_service_ended(
    bus: Bus, common: CommonSettings, tmp_path: Path, name: str, status: int
) -> None:
    async with _tiny(common, tmp_path, **{name: "1"}) as tiny:
        await tiny.process.wait()
        assert tiny.process.returncode == status


async def test_a_bad_setting_ends_a_service_with_2(tmp_path: Path, common: CommonSettings) -> None:
    async with _tiny(common.model_copy(update={"nats_url": "nats://192.0.2.1:4222"}), tmp_path) as tiny:
        assert await tiny.ended() == 2
        assert "leaves this host without TLS" in str(tiny.log[-1])


@pytest.mark.parametrize("name", ["dataloader", "device_manager", "runner", "telemetry"])
def test_a_setting_that_cannot_be_read_ends_with_the_status_that_nobody_restarts(name: str) -> None:
    setting = f"RAILBUS_{name.upper()}_GRACE_S"
    words = [sys.executable, "-m", f"railbus_{name}"]
    env = environment({setting: "soon"})
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["code"] == "BAD_SETTING"
    assert setting in error["message"]
    assert "soon" in error["message"]
