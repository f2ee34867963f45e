"""Whatever happens to telemetry, to NATS or to a producer: every acknowledged event is in the files once.

The long form is `tests/soak/test_telemetry.py`. Each fault, what is promised, and the test that shows it stand in
`services/telemetry/README.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import signal
from functools import partial
from pathlib import Path
from typing import TextIO

import pytest

from dying_telemetry import ACKNOWLEDGING, APPENDING, CLOSING, some_instant
from log_faults import cluster, die_at, read
from log_processes import Clock, Telemetry, fill, mount, small_disk
from railbus.client import Client
from railbus_shared import clock, wire
from railbus_shared.bus.connection import Bus
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from rawnats import RawClient
from servers import Server
from until import until

SEED = int(os.environ.get("FAULT_SEED") or secrets.randbelow(2**32))
"""Told where a test fails; given back by the variable, the same is chosen again."""


@pytest.mark.timeout(120)  # telemetry is started anew for each kill
async def test_kills_of_telemetry_nats_and_producers_lose_and_double_nothing(tmp_path: Path, server: Server) -> None:
    chance = random.Random(SEED)
    async with cluster(tmp_path, server, producers=2, seed=SEED) as found:
        for fault in chance.sample(["appending", "closing", "any time", "nats", "producer"], 5):
            match fault:
                case "appending" | "closing":
                    points = CLOSING if fault == "closing" else APPENDING + ACKNOWLEDGING
                    await die_at(found, some_instant(chance, points))
                    found.harm_sidecar(chance)
                    found.telemetry.start()
                case "any time":
                    await asyncio.sleep(chance.uniform(0, 0.5))
                    found.telemetry.kill()
                    found.telemetry.start()
                case "nats":
                    server.kill()
                    server.start()
                case "producer":
                    found.producers[0].kill()
                    found.producers[0].start()
        await found.settled()


@pytest.mark.root
@pytest.mark.timeout(60)  # telemetry is started anew
async def test_a_disk_that_is_full_or_read_only_keeps_events_in_the_stream(tmp_path: Path, server: Server) -> None:
    logs = tmp_path / "learning" / "logs"
    with small_disk(logs, "4m") as ballast:
        async with cluster(tmp_path, server) as found:
            telemetry = found.telemetry
            await until(lambda: bool(read(found.layout).counts))
            fill(ballast)
            await until(lambda: "no space left" in telemetry.get("/readyz?verbose"))
            telemetry.kill()
            telemetry.start()
            await until(lambda: "no space left" in telemetry.get("/readyz?verbose"))
            assert await asyncio.to_thread(telemetry.stop) == 0
            telemetry.start()
            await until(lambda: "no space left" in telemetry.get("/readyz?verbose"))
            ballast.unlink()
            await until(telemetry.is_ready)
            while not mount("-o", "remount,ro", logs):  # refused while a file is open for writing
                await found.flush()
            await until(lambda: "Read-only" in telemetry.get("/readyz?verbose"))
            assert mount("-o", "remount,rw", logs)
            await until(telemetry.is_ready)
            await found.settled()


@pytest.mark.timeout(60)  # three starts
async def test_a_stop_leaves_a_period_open_that_it_has_no_time_to_close(tmp_path: Path, server: Server) -> None:
    async with cluster(tmp_path, server) as found:
        assert await asyncio.to_thread(found.telemetry.stop) == 0
        closed = {path: path.read_bytes() for path in found.layout.logs.rglob("*.gz")}
        with Telemetry(tmp_path, server, name="hasty", env={"RAILBUS_TELEMETRY_GRACE_S": "0"}) as hasty:
            await until(lambda: bool(list(found.layout.logs.rglob("trainer.log.jsonl"))))
            assert await asyncio.to_thread(hasty.stop) == 0
        assert list(found.layout.logs.rglob("trainer.log.jsonl"))
        assert {path: path.read_bytes() for path in found.layout.logs.rglob("*.gz")} == closed
        assert not list(found.layout.logs.rglob(".trainer*.tmp"))
        found.telemetry.start()
        await found.settled()


async def test_what_the_stream_holds_at_a_stop_is_on_disk_after_it(tmp_path: Path, server: Server) -> None:
    async with cluster(tmp_path, server) as found:
        (producer,) = found.producers
        await until(producer.is_sending)
        found.telemetry.signal(signal.SIGSTOP)
        noted = len(found.acknowledged())
        await until(lambda: len(found.acknowledged()) > noted + 100)
        assert await asyncio.to_thread(producer.stop) == 0
        found.telemetry.signal(signal.SIGTERM)
        found.telemetry.signal(signal.SIGCONT)
        await until(lambda: not found.telemetry.is_alive)
        found.judge("after the stop")
        assert not list(found.layout.logs.rglob("trainer.log.jsonl"))


@pytest.mark.timeout(60)  # three starts
async def test_of_two_at_once_one_writes_and_the_other_takes_over_when_it_is_gone(
    tmp_path: Path, server: Server
) -> None:
    async with cluster(tmp_path, server) as found:
        with Telemetry(tmp_path, server, name="other") as other:

            def stands_by(one: Telemetry) -> bool:
                return "standing by" in one.get("/readyz?verbose")

            await until(lambda: stands_by(other))
            async with Client.connect(CommonSettings(root=found.layout.root, nats_url=server.url)) as client:
                for _ in range(8):  # either of them may be asked
                    await client.flush()
            found.telemetry.signal(signal.SIGSTOP)
            await asyncio.sleep(1.5)  # longer than the other waits between two looks at the lock
            assert stands_by(other), "one that is only stopped would write on when it goes on"
            found.telemetry.signal(signal.SIGCONT)
            await until(found.telemetry.is_ready)
            found.telemetry.kill()
            await until(other.is_ready)
            found.telemetry.start()
            await until(lambda: stands_by(found.telemetry))
            assert await asyncio.to_thread(other.stop) == 0
            await until(found.telemetry.is_ready)
        await found.settled()


@pytest.mark.timeout(60)  # the load fills each period with some lines
async def test_a_clock_that_jumps_an_hour_forward_and_back_closes_periods_and_no_more(
    tmp_path: Path, server: Server
) -> None:
    wall = Clock(tmp_path / "clock")
    async with cluster(tmp_path, server, env=wall.env) as found:
        for ahead_s in (3600, 0, -3600, 40 * 86_400, 0):
            with await an_open_period(found.layout) as plain:
                wall.set(ahead_s)
                await until(partial(is_removed, plain))
        await found.settled()


async def an_open_period(layout: Layout) -> TextIO:
    """One of the plain files, opened; one that is seen may be closed before that."""
    opened: list[TextIO] = []

    def is_opened() -> bool:
        with contextlib.suppress(FileNotFoundError):
            opened.extend(path.open() for path in itertools.islice(layout.logs.rglob("trainer.log.jsonl"), 1))
        return bool(opened)

    await until(is_opened)
    return opened[0]


def is_removed(file: TextIO) -> bool:
    return os.fstat(file.fileno()).st_nlink == 0


def event(number: int, **other: object) -> bytes:
    fields = {"id": f"p-{number}", "type": "app.made", "time": clock.now(), "producer": "p", "number": number}
    return wire.encode({**fields, "source": "t", "host": "h", **other})


def batch(numbers: range, **common: object) -> bytes:
    shared = {"type": "app.made", "time": clock.now(), "producer": "p", "source": "t", "host": "h", **common}
    return wire.encode({"v": 1, "common": shared, "events": [{"id": f"p-{n}", "number": n} for n in numbers]})


def columns(names: int, **other: object) -> bytes:
    """A batch of another form, whose columns have names as long as that."""
    common = {"type": "app.made", "producer": "p", "source": "t", "host": "h"}
    fields = {"v": 2, "common": common, "time": {"first": clock.now(), "gaps_ns": [0] * 999}, "number": 2000}
    return wire.encode({**fields, "data": {"x" * names: [0] * 1000}, **other})


GOOD = {
    "the last number there can be": event(2**64 - 1),
    "a far future": event(2, time="9999-12-31T23:59:59.999999999Z"),
    "a far past": event(3, time="1970-01-01T00:00:00Z"),
    "text of all kinds": event(4, data={"text": '\u2028\x00\x7f\U0001f600\\"\n'}),
    "numbers twice in one batch": batch(range(10, 20)).replace(b"\x0b", b"\x0a"),
}
BAD = {
    "nothing": b"",
    "no message": b"\xc1" * 100,
    "1 MB of anything": b"\xff" * (1 << 20),
    "1 MB of JSON": b"{" + b" " * ((1 << 20) - 2) + b"}",
    "deep msgpack": b"\x81\xa1a" * 100_000 + b"\x01",
    "deep JSON": b'{"a":' * 500 + b"1" + b"}" * 500,
    "more empty lists than there may be": b"\x81\xa1a\xdc\x03\xe8" + (b"\xdc\x01\xf4" + b"\x90" * 500) * 1000,
    "a list that claims to be longer": b"\x82\xa1v\x01\xa6events\xdc\xff\xff" + b"\x80" * 3,
    "a map that claims to be longer": b"\xdf\xff\xff\xff\xff",
    "too many events": batch(range(30, 5000)),
    "what is in common a thousand times": batch(range(30, 1030), data={"text": "x" * 100_000}),
    "names of columns a thousand times": columns(names=100_000),
    "columns of different lengths": columns(names=1, step=[1, 2, 3]),
    "columns whose numbers end nowhere": columns(names=1, number=2**64 - 5),
    "columns that go back to before 1970": columns(names=1, time={"first": clock.now(), "gaps_ns": [-(2**62)] * 999}),
    "a year that is none": event(5, time="0000-01-01T00:00:00Z"),
    "a number of 65 bits": b'{"number": 18446744073709551616}',
}
HEADERS = {
    "no headers at all": b"XXXX",
    "headers that are binary": b"NATS/1.0\r\n\xff\xfe: \xff\r\n\r\n",
    "a status of the server": b"NATS/1.0 409 Consumer Deleted\r\n\r\n",
    "a heartbeat": b"NATS/1.0 100 Idle Heartbeat\r\n\r\n",
    "48 kB of headers": b"NATS/1.0\r\n" + b"a: b\r\n" * 8000 + b"\r\n",
}
FLOOD_MB = 150


@pytest.mark.timeout(60)  # 150 MB through a store that flushes each message
async def test_no_message_stops_telemetry_or_fills_its_memory_and_none_is_dropped_in_silence(
    bus: Bus, tmp_path: Path, server: Server
) -> None:
    """Also: what the stream held before telemetry ever ran is written like the rest."""
    subject = b"railbus.evt.app.t.made"
    with RawClient(server.port) as raw:
        for data in (*GOOD.values(), *BAD.values()):
            raw.publish(subject, data)
        for number, headers in enumerate(HEADERS.values(), start=100):
            raw.publish(subject, event(number), headers=headers)
            raw.publish(subject, b"bad", headers=headers)
        async with cluster(tmp_path, server) as found:
            pid = found.telemetry.pid
            await found.watch.caught_up()
            held = found.telemetry.peak_bytes()
            for _ in range(FLOOD_MB):
                raw.publish(subject, b"\xff" * (1 << 20))
            await found.settled()
            assert (found.telemetry.pid, found.telemetry.output().count("Traceback")) == (pid, 0)
    counts = read(found.layout).counts
    numbers = {number for producer, number in counts if producer == "p"}
    assert numbers == {2**64 - 1, 2, 3, 4, 10, *range(12, 20), *range(100, 100 + len(HEADERS))}
    rejected = [key for key in counts if key[0].startswith("telemetry-rejected-")]
    assert len(rejected) == len(BAD) + len(HEADERS) + FLOOD_MB
    assert found.peak_bytes - held < 100 << 20
