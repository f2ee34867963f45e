"""From a single server into three nodes and back: three copies of each stream, with its consumers, also after a cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import nats.errors
import pytest

from backup_stores import EVENTS, JOBS, another_server, ensured, event, joined, messages, restored, saved
from nats_cluster import Cluster, running_cluster
from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.snapshots import stream_info
from railbus_shared.errors import StoreMissing, TransientError
from railbus_shared.topology import event_consumer
from railbus_shared.topology import topology as topology_of
from until import until

pytestmark = pytest.mark.timeout(240)  # waits for elections


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path) as cluster:
        yield cluster


async def _answers(cluster: Cluster, root: Path) -> bool:
    try:
        async with Bus.open(cluster.settings(root), name="operator", service=True) as bus:
            await bus.check_jetstream()
            found = await bus.api("INFO")
    except TransientError:
        return False
    return "error" not in found


async def test_a_single_server_moves_into_three_nodes_and_back(bus: Bus, nodes: Cluster, tmp_path: Path) -> None:
    for number in range(1, 31):
        await event(bus, number)
        await bus.publish(Outgoing(bus.subjects.submit, os.urandom(200_000), f"job-{number}"))
    pulled = await bus.client.jetstream().pull_subscribe_bind("telemetry-writer", EVENTS)
    for message in await pulled.fetch(12, timeout=10):
        await message.ack_sync()
    await saved(bus, tmp_path / "backup")
    names = [stream.name for stream in topology_of(bus.subjects).streams]
    await until(lambda: _answers(nodes, tmp_path))
    async with Bus.open(nodes.settings(tmp_path), name="operator", service=True) as target:
        with pytest.raises(OSError, match="cut"):
            await restored(target, tmp_path / "backup", report=_cut_in_the_midst_of_the_queue)
        if await stream_info(target, JOBS) is not None:
            with pytest.raises(StoreMissing, match="not whole"):
                await topology.ensure(target, tmp_path / "fresh.json")
        incarnation = await restored(target, tmp_path / "backup", replaces=True)
        for name in names:
            info = await stream_info(target, name)
            assert info is not None
            assert info["config"]["num_replicas"] == 3
            assert [await messages(target, name)] == [await messages(bus, name)]
            await until(lambda stream=name: nodes.is_whole(stream))  # type: ignore[misc]
        assert await ensured(target, tmp_path / "fresh.json") == incarnation
        assert await target.acknowledged(event_consumer(target.subjects)) == 12
        (await nodes.leader(EVENTS)).kill()
        await until(lambda: _is_told(target))
        taken = await _rest_of_the_events(target)
        await until(lambda: _is_saved(target, tmp_path / "again"))
    assert taken == list(range(13, 32))
    with another_server(tmp_path / "target") as server:
        async with joined(server, tmp_path) as single:
            await restored(single, tmp_path / "again")
            assert [one["seq"] for one in await messages(single, EVENTS)] == list(range(1, 32))
            assert len(await messages(single, JOBS)) == 30
            assert await single.acknowledged(event_consumer(single.subjects)) == 31


def _cut_in_the_midst_of_the_queue(at: str, done: int, _total: int | None) -> None:
    if at == JOBS and done > 4_000_000:
        raise OSError("cut")


async def _is_told(target: Bus) -> bool:
    """One more event; it has a key, so that telling it again is harmless."""
    try:
        await event(target, 31)
    except TransientError:
        return False
    return True


async def _is_saved(target: Bus, folder: Path) -> bool:
    """A backup fails where a stream has no leader, and may be taken a moment later."""
    try:
        await saved(target, folder)
    except TransientError:
        assert not folder.exists()
        return False
    return True


async def _rest_of_the_events(target: Bus) -> list[int]:
    """What the consumer is given, as telemetry would be, until it has been given all."""
    found: set[int] = set()
    pulled = await target.client.jetstream().pull_subscribe_bind("telemetry-writer", EVENTS)
    async with asyncio.timeout(60):
        while len(found) < 19:
            with contextlib.suppress(nats.errors.Error, TimeoutError):  # an election goes on: it is asked again
                for message in await pulled.fetch(19 - len(found), timeout=3):
                    await message.ack_sync()
                    found.add(message.metadata.sequence.stream)
    return sorted(found)
