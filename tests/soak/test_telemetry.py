"""Everything that can happen to telemetry, together and for minutes, with the waits that users have: `make soak`."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
from functools import partial
from pathlib import Path

import orjson
import pytest

from dying_telemetry import some_instant
from log_faults import Cluster, cluster, die_at, read
from log_processes import Clock, Producer, Telemetry, fill, mount, small_disk
from railbus_shared import clock
from railbus_shared.layout import Layout
from servers import Server
from until import until

SEED = int(os.environ.get("FAULT_SEED") or secrets.randbelow(2**32))
"""Told where a test fails; given back by the variable, the same is chosen again."""
KILLS = 30
COME_AGAIN_S = 120.0
"""More than the 30 s after which what is not acknowledged comes again."""
LARGE_BYTES = 200 << 20


@pytest.mark.timeout(900)  # thirty starts, with the 30 s until lost deliveries come again at the end
async def test_thirty_kills_and_all_else_at_once_lose_and_double_nothing(tmp_path: Path, server: Server) -> None:
    print(f"\nFAULT_SEED={SEED}")
    chance = random.Random(SEED)
    wall = Clock(tmp_path / "clock")
    with small_disk(tmp_path / "learning" / "logs", "64m") as ballast:
        async with cluster(
            tmp_path, server, producers=3, ack_wait_s=None, env=wall.env, pause_s=0.1, seed=SEED
        ) as found:
            for kill in range(KILLS):
                await some_fault(found, chance, wall, ballast)
                await some_kill(found, chance, wall)
                print(f"kill {kill + 1}: {len(found.acknowledged())} events acknowledged")
            await found.ready(seconds=COME_AGAIN_S)
            await found.settled(seconds=COME_AGAIN_S)


async def some_kill(found: Cluster, chance: random.Random, wall: Clock) -> None:
    async def jump() -> None:
        """Ends a period; a flush would wait for what comes again only after 30 s."""
        wall.set(3600 * chance.randint(-9, 9))
        await asyncio.sleep(1.5)

    match chance.choice(["instant", "instant", "any time", "nats", "producer"]):
        case "instant":
            await die_at(found, some_instant(chance), close=jump)
            found.harm_sidecar(chance)
            found.telemetry.start()
        case "any time":
            await asyncio.sleep(chance.uniform(0, 2))
            found.telemetry.kill()
            found.harm_sidecar(chance)
            found.telemetry.start()
        case "nats":
            await asyncio.sleep(chance.uniform(0, 2))
            found.server.kill()
            await asyncio.sleep(chance.uniform(0, 2))
            found.server.start()
        case "producer":
            producer = chance.choice(found.producers)
            await until(producer.is_sending)
            producer.kill()
            producer.start()


async def some_fault(found: Cluster, chance: random.Random, wall: Clock, ballast: Path) -> None:
    match chance.choice(["nothing", "clock", "full disk", "read-only", "stopped", "nats stopped"]):
        case "clock":
            wall.set(chance.choice([-86_400, -3600, -1, 0, 1, 3600, 86_400]))
        case "full disk":
            fill(ballast)
            await asyncio.sleep(chance.uniform(0, 2))
            ballast.unlink()
        case "read-only":
            if mount("-o", "remount,ro", ballast.parent):  # refused while a file is open for writing
                await asyncio.sleep(chance.uniform(0, 2))
                assert mount("-o", "remount,rw", ballast.parent)
        case "stopped":
            await paused(found.telemetry.pid, chance.uniform(0, 3))
        case "nats stopped":
            assert found.server.process is not None
            await paused(found.server.process.pid, chance.uniform(0, 3))


async def paused(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(400)  # a minute stopped, and then all that has come meanwhile
async def test_a_minute_stopped_beside_one_that_stands_by_loses_nothing(tmp_path: Path, server: Server) -> None:
    async with cluster(tmp_path, server, producers=2, rate=1000, ack_wait_s=None, pause_s=0.1) as found:
        with Telemetry(tmp_path, server, name="other", ack_wait_s=None) as other:
            await until(lambda: "standing by" in other.get("/readyz?verbose"))
            await asyncio.sleep(2)
            await paused(found.telemetry.pid, 60)
            assert "standing by" in other.get("/readyz?verbose")
            await until(found.telemetry.is_ready)
        await found.settled(seconds=COME_AGAIN_S)


@pytest.mark.timeout(400)  # 200 MB are closed some times over
async def test_a_kill_while_more_is_written_beside_a_large_period_that_is_closed_loses_nothing(
    tmp_path: Path, server: Server
) -> None:
    plain = large_period(Layout(tmp_path / "learning"))
    num_lines = plain.read_bytes().count(b"\n")
    temporary, begun = plain.with_name(f".{plain.name}.gz.tmp"), plain.with_name(f"{plain.name}.begun")
    async with cluster(tmp_path, server, rate=1000) as found, asyncio.TaskGroup() as tasks:
        for least_bytes in (1, 12 << 20):
            await found.ready(seconds=120)
            flushing = tasks.create_task(found.flush())
            await until(partial(is_larger, temporary, least_bytes), seconds=120)
            await until(begun.exists)
            found.telemetry.kill()
            found.telemetry.start()
            await flushing
        await found.ready(seconds=120)
        await found.settled(seconds=COME_AGAIN_S)
        counts = read(found.layout).counts
        assert sum(1 for producer_id, _ in counts if producer_id == "large") == num_lines


@pytest.mark.timeout(400)  # 200 MB are read at each of some starts
async def test_a_kill_while_a_large_period_is_compressed_loses_nothing(tmp_path: Path, server: Server) -> None:
    layout = Layout(tmp_path / "learning")
    plain = large_period(layout)
    num_lines = plain.read_bytes().count(b"\n")
    temporary = plain.with_name(f".{plain.name}.gz.tmp")
    telemetry = Telemetry(tmp_path, server)
    for least_bytes in (1, 4 << 20, 12 << 20):
        with telemetry:
            await until(telemetry.is_ready, seconds=120)
            telemetry.signal(signal.SIGTERM)
            await until(partial(is_larger, temporary, least_bytes), seconds=120)
            telemetry.kill()
            assert plain.exists()
    with telemetry, Producer(tmp_path, server) as producer:
        await until(telemetry.is_ready, seconds=120)
        await until(producer.is_sending)
        assert await asyncio.to_thread(telemetry.stop, timeout_s=120) == 0
    counts = read(layout).counts
    assert sum(1 for producer_id, _ in counts if producer_id == "large") == num_lines
    assert max(counts.values()) == 1
    assert not plain.exists()


def is_larger(path: Path, size_bytes: int) -> bool:
    return path.exists() and path.stat().st_size > size_bytes


def large_period(layout: Layout) -> Path:
    """What a telemetry that was killed has left of a busy hour."""
    now_ns = clock.now_ns()
    year, month, day = clock.rfc3339(now_ns)[:10].split("-")
    plain = layout.logs / year / month / day / "trainer.log.jsonl"
    plain.parent.mkdir(parents=True)
    chance = random.Random(SEED)
    with plain.open("wb") as file:
        number = 0
        while file.tell() < LARGE_BYTES:
            number += 1
            event = {"id": f"large-{number}", "type": "app.made", "time": clock.rfc3339(now_ns), "producer": "large",
                     "number": number, "source": "t", "host": "h", "data": {"noise": chance.randbytes(100).hex()},
                     "seq": number, "incarnation": "4f"}  # fmt: skip
            file.write(orjson.dumps(event) + b"\n")
    return plain
