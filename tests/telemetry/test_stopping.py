"""What a stop of telemetry leaves behind, whatever is under way at that moment: a write, a request, an index."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from railbus_shared.bus.connection import Bus
from railbus_shared.bus.sink import BusSink
from railbus_shared.contracts.requests import Nothing
from railbus_shared.errors import TransientError
from railbus_shared.layout import BEGUN_LOG_NAME, CLOSED_LOG_NAME, LOG_NAME, Layout
from railbus_shared.metrics import Metrics
from railbus_shared.service import Context
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import LearningTelemetry
from railbus_shared.waiting import end
from railbus_telemetry import appending
from railbus_telemetry.service import TelemetryService
from railbus_telemetry.settings import Settings
from until import PATIENCE_S, until


class Writer:
    """A telemetry service within this process."""

    def __init__(self, common: CommonSettings, bus: Bus, *, grace_s: float = 10) -> None:
        self.stopping = asyncio.Event()
        own = LearningTelemetry("telemetry", host="h")
        context = Context(common, bus, own, Metrics("telemetry"), self.stopping)
        self.service = TelemetryService(context, Settings(grace_s=grace_s))
        self.running = asyncio.ensure_future(self.service.run())

    async def is_ready(self) -> bool:
        return not (await self.service.checks())["log"]

    async def flush(self) -> object:
        (flush,) = (one for one in self.service.endpoints() if one.name == "flush")
        return await flush.handle(Nothing())

    async def stop(self) -> None:
        self.stopping.set()
        async with asyncio.timeout(PATIENCE_S):
            await self.running


@contextlib.asynccontextmanager
async def writer(common: CommonSettings, bus: Bus, *, grace_s: float = 10) -> AsyncIterator[Writer]:
    found = Writer(common, bus, grace_s=grace_s)
    try:
        await until(found.is_ready)
        yield found
    finally:
        await end(found.running)


async def tell(bus: Bus, count: int) -> None:
    telemetry = LearningTelemetry("script", host="h").with_sink(BusSink(bus))
    for number in range(count):
        telemetry.event("rows_written", rows=number)
    sending = asyncio.ensure_future(telemetry.run())
    assert await telemetry.flush(timeout_s=PATIENCE_S)
    await end(sending)


def plain_of_today(layout: Layout) -> Path:
    return layout.day(datetime.now(tz=UTC).date()) / LOG_NAME


def is_locked(layout: Layout) -> bool:
    """Whether some writer holds the root."""
    with (layout.state / "telemetry.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


async def test_a_flush_that_comes_after_the_end_closes_no_period_of_the_next_writer(
    common: CommonSettings, bus: Bus
) -> None:
    plain = plain_of_today(common.layout)
    async with writer(common, bus, grace_s=0) as first:
        await tell(bus, 3)
        await until(plain.exists)
        await first.stop()
        assert plain.exists(), "there was no time to close it"
        async with writer(common, bus) as second:
            await tell(bus, 3)
            with pytest.raises(TransientError):
                await first.flush()
            assert plain.exists()
            await second.stop()


async def test_a_root_is_not_given_up_while_a_write_is_under_way(common: CommonSettings, bus: Bus) -> None:
    plain = plain_of_today(common.layout)
    async with writer(common, bus) as found:
        plain.parent.mkdir(parents=True)
        os.mkfifo(plain)  # a disk that hangs: to open it takes until somebody reads
        await tell(bus, 1)
        await until(lambda: any(top.f_code.co_filename == appending.__file__ for top in sys._current_frames().values()))
        found.running.cancel()  # its time to drain is over
        await asyncio.sleep(0.5)
        assert is_locked(common.layout)
        with plain.open("rb"):
            await asyncio.wait([found.running], timeout=PATIENCE_S)
        assert not is_locked(common.layout)


async def test_a_root_is_not_given_up_while_a_start_mends_it(common: CommonSettings, bus: Bus) -> None:
    """Else its thread might cut what the next writer has appended meanwhile."""
    plain = plain_of_today(common.layout)
    plain.parent.mkdir(parents=True)
    os.mkfifo(plain)  # to read it takes until somebody writes
    found = Writer(common, bus)
    await until(lambda: is_locked(common.layout))
    writers: list[int] = []
    await until(lambda: open_if_read(plain, writers))
    found.running.cancel()
    await asyncio.wait([found.running], timeout=0.5)
    assert is_locked(common.layout)
    os.close(writers.pop())
    await asyncio.wait([found.running], timeout=PATIENCE_S)
    assert not is_locked(common.layout)


def open_if_read(fifo: Path, writers: list[int]) -> bool:
    """Open it for writing, once somebody reads it."""
    with contextlib.suppress(OSError):
        writers.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    return bool(writers)


async def test_a_flush_that_is_under_way_at_a_stop_leaves_the_period_open(common: CommonSettings, bus: Bus) -> None:
    plain = plain_of_today(common.layout)
    closed, begun = plain.with_name(CLOSED_LOG_NAME), plain.with_name(BEGUN_LOG_NAME)
    async with writer(common, bus, grace_s=0) as found:
        await tell(bus, 3)
        await until(plain.exists)
        os.mkfifo(closed)
        flushing = asyncio.ensure_future(found.flush())
        while not begun.exists():  # what comes while the period is closed
            await tell(bus, 1)
        found.stopping.set()
        fifo = os.open(closed, os.O_PATH)
        closed.unlink()
        os.close(os.open(f"/proc/self/fd/{fifo}", os.O_WRONLY))  # the flush waits for it, and goes on without
        os.close(fifo)
        with pytest.raises(TransientError):
            await flushing
        await found.stop()
    assert plain.exists()
    assert begun.exists()


async def test_questions_that_hang_on_the_disk_hold_up_no_line(common: CommonSettings, bus: Bus) -> None:
    hung = common.layout.logs / "2020" / "01" / "01" / LOG_NAME
    async with writer(common, bus) as found:
        hung.parent.mkdir(parents=True)
        os.mkfifo(hung)
        (query,) = (one for one in found.service.endpoints() if one.name == "query")
        asking = [asyncio.ensure_future(query.handle(query.request(limit=10))) for _ in range(64)]
        await asyncio.sleep(0.2)
        try:
            await tell(bus, 3)
            await until(plain_of_today(common.layout).exists)
        finally:
            while not all(one.done() for one in asking):
                with contextlib.suppress(OSError):
                    os.close(os.open(hung, os.O_WRONLY | os.O_NONBLOCK))
                await asyncio.sleep(0.01)
        await found.stop()
