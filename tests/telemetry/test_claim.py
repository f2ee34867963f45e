"""Telemetry on different roots of one NATS: one root has the log, and nobody writes a part of it unnoticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from log_processes import Producer, Telemetry
from railbus_shared.bus import topology
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from railbus_telemetry.claim import LogClaim, LogRoot
from running_up import log_lines
from servers import Server
from until import until

pytestmark = pytest.mark.timeout(120)  # processes are started, and lives of two seconds waited for


@contextlib.contextmanager
def on_two_roots(folder: Path, server: Server, *, ttl_s: int = 2) -> Iterator[tuple[Telemetry, Telemetry]]:
    """Neither is started. A writer that is halted for `ttl_s` loses the log to the other one."""
    for name in "ab":
        (folder / name).mkdir()
    env = {"RAILBUS_LEASE_TTL_S": str(ttl_s)}
    first, second = (Telemetry(folder / name, server, env={**env, "RAILBUS_HOST": f"host-{name}"}) for name in "ab")
    try:
        yield first, second
    finally:
        first.kill()
        second.kill()


def lines(folder: Path) -> list[dict[str, Any]]:
    return log_lines(Layout(folder / "learning"))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if line["type"] == kind]


async def test_a_second_root_is_refused_by_name_while_the_log_is_written_on_the_first(
    tmp_path: Path, server: Server
) -> None:
    with on_two_roots(tmp_path, server, ttl_s=12) as (first, second), Producer(tmp_path, server) as producer:
        first.start()
        await until(first.is_ready)
        await until(producer.is_sending)
        second.start()
        await until(lambda: not second.is_alive)
        assert second.process is not None
        assert second.process.returncode == 2, second.output()
        said = json.loads(second.output().splitlines()[-1])["error"]
        assert said["code"] == "BAD_SETTING"
        assert f"{str(tmp_path / 'a' / 'learning')!r} of host 'host-a'" in said["message"]
        assert str(tmp_path / "b" / "learning") in said["message"]
        assert "docs/operations.md" in said["hint"]
        assert await asyncio.to_thread(producer.stop) == 0
        assert await asyncio.to_thread(first.stop) == 0
        written = {(line["producer"], line["number"]) for line in lines(tmp_path / "a")}
        assert producer.acknowledged() <= written
        assert not lines(tmp_path / "b")


async def test_a_log_whose_root_is_lost_goes_on_in_another_one_and_that_is_told(tmp_path: Path, server: Server) -> None:
    with on_two_roots(tmp_path, server) as (first, second):
        first.start()
        await until(first.is_ready)
        first.kill()
        second.start()
        await until(second.is_ready)
        first.start()  # the first comes back, and is the second now
        await until(lambda: not first.is_alive)
        assert "host-b" in first.output().splitlines()[-1]
        assert await asyncio.to_thread(second.stop) == 0
        (told,) = events(tmp_path / "b", "logs.moved")
        assert told["severity"] == "warning"
        assert told["data"] == {
            "path": str(tmp_path / "b" / "learning"),
            "before": str(tmp_path / "a" / "learning"),
            "host_before": "host-a",
        }


async def test_a_root_that_was_stopped_while_another_took_the_log_ends_when_it_goes_on(
    tmp_path: Path, server: Server
) -> None:
    with on_two_roots(tmp_path, server) as (first, second):
        first.start()
        await until(first.is_ready)
        first.signal(signal.SIGSTOP)
        second.start()
        await until(second.is_ready)
        first.signal(signal.SIGCONT)
        await until(lambda: not first.is_alive)
        assert "host-b" in first.output().splitlines()[-1]
        assert second.is_alive


async def test_a_root_that_has_moved_is_the_same_and_need_not_wait(tmp_path: Path, server: Server) -> None:
    with on_two_roots(tmp_path, server) as (first, second):
        first.start()
        await until(first.is_ready)
        assert await asyncio.to_thread(first.stop) == 0
        shutil.copytree(tmp_path / "a" / "learning", tmp_path / "b" / "learning")
        second.start()
        await until(second.is_ready)
        assert await asyncio.to_thread(second.stop) == 0
        assert not events(tmp_path / "b", "logs.moved")


async def test_a_claim_outlives_a_lost_acknowledgement_and_a_store_that_begins_anew(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    await topology.ensure(bus, tmp_path / "store.json")
    bucket = Bucket(bus, bus.subjects.leader)
    claim = LogClaim(bucket, LogRoot("1", "/a", "h"), ttl_s=0.3)
    assert await claim.take(asyncio.Event()) is None
    keeping = asyncio.ensure_future(claim.keep())
    for change in (lambda: bucket.put("log", LogRoot("1", "/a", "h").to_map()), lambda: bucket.remove("log")):
        await change()
        before = await bus.last_sequence("KV_railbus_leader")
        await until(lambda before=before: _is_renewed(bus, before))  # type: ignore[misc]
    assert not keeping.done()
    keeping.cancel()


async def _is_renewed(bus: Bus, before: int) -> bool:
    return await bus.last_sequence("KV_railbus_leader") > before
