"""What comes out of a backup may be a thousand times as much as what is in it; a server takes its time over that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backup_stores import EVENTS, another_server, event, joined, restored, saved, state
from railbus_shared.bus.connection import Bus
from railbus_shared.waiting import beside
from servers import Server

HALTED_S, AWAKE_S = 0.1, 0.004


@contextlib.asynccontextmanager
async def slowed(server: Server) -> AsyncIterator[None]:
    """The server has a fraction of a core."""

    async def slow() -> None:
        while True:
            server.pause()
            try:
                await asyncio.sleep(HALTED_S)
            finally:
                server.resume()
            await asyncio.sleep(AWAKE_S)

    async with beside(slow()):
        yield


@pytest.mark.timeout(120)  # 50 MB come out of 10 kB, slowly
async def test_what_a_server_unpacks_for_long_is_put_back_nevertheless(bus: Bus, tmp_path: Path) -> None:
    """It gives up a restore where it has been busy with one piece for 5 s."""
    for number in range(1, 101):
        await event(bus, number, num_bytes=500_000)
    await saved(bus, tmp_path / "backup")
    assert (tmp_path / "backup" / f"{EVENTS}.snapshot").stat().st_size < 50_000
    with another_server(tmp_path / "target") as server:
        async with joined(server, tmp_path) as target:
            async with slowed(server):
                await restored(target, tmp_path / "backup")
            assert (await state(target, EVENTS))["messages"] == 100
