"""Buckets on a real server: compare-and-set, time-to-live, atomic batches, watches over restarts."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from railbus_shared.bus.bucket import Bucket, Entry, SnapshotEnd, Write
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.errors import RevisionConflict
from servers import Server
from until import PATIENCE_S, until


async def test_a_key_can_be_created_once(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.jobs)
    revision = await bucket.create("a", {"x": 1})
    with pytest.raises(RevisionConflict):
        await bucket.create("a", {"x": 2})
    assert await bucket.get("a") == Entry("a", {"x": 1}, revision)


async def test_a_write_with_an_old_revision_is_refused_and_changes_nothing(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.jobs)
    first = await bucket.create("a", {"x": 1})
    second = await bucket.write(Write("a", {"x": 2}, first))
    with pytest.raises(RevisionConflict):
        await bucket.write(Write("a", {"x": 3}, first))
    assert await bucket.get("a") == Entry("a", {"x": 2}, second)


async def test_a_deleted_key_reads_as_none_and_can_be_created_again(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.jobs)
    revision = await bucket.create("a", {"x": 1})
    await bucket.write(Write("a", None, revision))
    assert await bucket.get("a") is None
    await bucket.create("a", {"x": 2})
    entry = await bucket.get("a")
    assert entry is not None
    assert entry.value == {"x": 2}


async def test_a_missing_key_reads_as_none(bus: Bus) -> None:
    assert await Bucket(bus, bus.subjects.jobs).get("nothing") is None


async def _until_gone(bucket: Bucket, key: str) -> None:
    async def is_gone() -> bool:
        return await bucket.get(key) is None

    await until(is_gone)


async def test_a_key_with_a_time_to_live_vanishes_and_renewal_keeps_it(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.leases)
    revision = await bucket.create("lives", {}, ttl_s=3)
    await bucket.write(Write("lives", {}, revision, ttl_s=60))
    await bucket.create("dies", {}, ttl_s=3)  # after the other would have
    await _until_gone(bucket, "dies")
    assert await bucket.get("lives") is not None


async def test_a_renewed_key_still_expires(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.leases)
    revision = await bucket.create("a", {}, ttl_s=60)
    await bucket.write(Write("a", {}, revision, ttl_s=1))
    await _until_gone(bucket, "a")


async def test_several_keys_are_written_all_or_none(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.leases)
    await bucket.create("taken", {"by": "other"}, ttl_s=60)
    with pytest.raises(RevisionConflict):
        await bucket.write_all([Write("free", {}, 0, 60), Write("taken", {}, 0, 60)])
    assert await bucket.get("free") is None
    revisions = await bucket.write_all([Write("a", {"n": 1}, 0, 60), Write("b", {"n": 2}, 0, 60)])
    entries = [await bucket.get("a"), await bucket.get("b")]
    assert [entry.revision for entry in entries if entry] == revisions


async def test_a_snapshot_holds_every_key_but_the_deleted(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.devices)
    assert await bucket.snapshot() == {}
    for number in range(300):
        await bucket.put(f"key{number}", {"n": number})
    entry = await bucket.get("key7")
    assert entry is not None
    await bucket.write(Write("key7", None, entry.revision))
    found = await bucket.snapshot()
    assert len(found) == 299
    assert found["key299"].value == {"n": 299}


async def test_a_snapshot_holds_more_keys_than_the_server_gives_at_once(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.leases)
    for first in range(0, 1500, 500):
        await bucket.write_all([Write(f"key{number}", {"n": number}, 0, 600) for number in range(first, first + 500)])
    await bucket.remove("key7")
    found = await bucket.snapshot()
    assert {key: entry.value for key, entry in found.items()} == {f"key{n}": {"n": n} for n in range(1500) if n != 7}


async def _collect(bucket: Bucket, into: asyncio.Queue[Entry | SnapshotEnd]) -> None:
    async with contextlib.aclosing(bucket.watch()) as watch:
        async for entry in watch:
            into.put_nowait(entry)


async def test_a_watch_tells_what_is_there_then_what_changes(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.jobs)
    await bucket.create("a", {"n": 1})
    told: asyncio.Queue[Entry | SnapshotEnd] = asyncio.Queue()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_S):
        watching = tasks.create_task(_collect(bucket, told))
        first = await told.get()
        assert isinstance(first, Entry)
        assert first.value == {"n": 1}
        assert await told.get() == SnapshotEnd()
        await bucket.create("b", {"n": 2})
        second = await told.get()
        assert isinstance(second, Entry)
        assert (second.key, second.value) == ("b", {"n": 2})
        watching.cancel()


async def test_a_watch_of_an_empty_bucket_ends_its_snapshot(bus: Bus) -> None:
    told: asyncio.Queue[Entry | SnapshotEnd] = asyncio.Queue()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_S):
        watching = tasks.create_task(_collect(Bucket(bus, bus.subjects.jobs), told))
        assert await told.get() == SnapshotEnd()
        watching.cancel()


async def test_a_watch_tells_a_thousand_keys_and_ends_its_snapshot_once_while_others_write(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.jobs)
    for first in range(0, 1000, 250):
        await bucket.write_all([Write(f"key{number}", {"n": number}, 0) for number in range(first, first + 250)])
    told: asyncio.Queue[Entry | SnapshotEnd] = asyncio.Queue()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_S):
        watching = tasks.create_task(_collect(bucket, told))
        for number in range(50):
            await bucket.put(f"key{number}", {"n": -1})
        await bucket.put("last", {})
        seen: list[Entry | SnapshotEnd] = []
        while not (seen and isinstance(seen[-1], Entry) and seen[-1].key == "last"):
            seen.append(await told.get())
        watching.cancel()
    assert seen.count(SnapshotEnd()) == 1
    newest = {entry.key: entry.value for entry in seen if isinstance(entry, Entry)}
    assert newest == {f"key{n}": {"n": -1 if n < 50 else n} for n in range(1000)} | {"last": {}}


async def test_a_watch_leaves_neither_consumer_nor_subscription_behind(bus: Bus) -> None:
    async def num_consumers() -> int:
        info = await bus.client.jetstream().stream_info(f"KV_{bus.subjects.jobs}")
        return int(info.state.consumer_count)

    before = len(bus.client._subs)
    told: asyncio.Queue[Entry | SnapshotEnd] = asyncio.Queue()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_S):
        watching = tasks.create_task(_collect(Bucket(bus, bus.subjects.jobs), told))
        await told.get()
        assert await num_consumers() == 1
        watching.cancel()
    assert await num_consumers() == 0
    assert len(bus.client._subs) == before


async def test_a_watch_begins_anew_after_a_restart_of_the_server(bus: Bus, server: Server) -> None:
    bucket = Bucket(bus, bus.subjects.jobs)
    await bucket.create("a", {"n": 1})
    told: asyncio.Queue[Entry | SnapshotEnd] = asyncio.Queue()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_S):
        watching = tasks.create_task(_collect(bucket, told))
        while await told.get() != SnapshotEnd():
            pass
        server.kill()
        server.start()
        while await told.get() != SnapshotEnd():
            pass
        await bucket.create("b", {"n": 2})
        entry = await told.get()
        assert isinstance(entry, Entry)
        assert entry.key == "b"
        watching.cancel()


async def test_a_value_that_cannot_be_decoded_hides_no_other(bus: Bus) -> None:
    bucket = Bucket(bus, bus.subjects.leases)
    await bucket.create("good", {"x": 1})
    await bus.publish(Outgoing("$KV.railbus_leases.bad", b"\xc1", ""))
    assert sorted(await bucket.snapshot()) == sorted(await bucket.read_all()) == ["good"]
