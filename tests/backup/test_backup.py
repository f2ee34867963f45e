"""A store is copied while it is written to, and put back: with real servers, and what happens in between on purpose."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import nats.errors
import nats.micro
import pytest

from backup_stores import (
    EVENTS,
    JOBS,
    RECORDS,
    another_server,
    ensured,
    event,
    joined,
    messages,
    newest,
    restored,
    saved,
    set_key,
    state,
)
from railbus.backup.manifest import BackupDamaged, read
from railbus.backup.saving import Report, save
from railbus_shared import clock, wire
from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.snapshots import forget_consumers_ahead, stream_info
from railbus_shared.errors import AlreadyRunning, BadSetting, Conflict, IncarnationMismatch, StoreMissing
from railbus_shared.topology import event_consumer, job_consumer
from railbus_shared.topology import topology as topology_of
from servers import Server
from until import until

LARGE = 100_000
DATASETS = "KV_railbus_datasets"


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Bus]:
    """A connection to a server that holds nothing."""
    with another_server(tmp_path / "target") as server:
        async with joined(server, tmp_path) as opened:
            yield opened


async def _saved_while(bus: Bus, folder: Path, stage: str, act: Callable[[], Awaitable[None]]) -> None:
    """Take a backup, and do something when the first piece of one stream has come and is not acknowledged yet."""
    loop, done = asyncio.get_running_loop(), False

    def report(at: str, _done: int, _total: int | None) -> None:
        nonlocal done
        if at == stage and not done:
            done = True
            asyncio.run_coroutine_threadsafe(_awaited(act()), loop).result()

    await save(bus, folder, version="0", report=report)
    assert done


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def _consume(bus: Bus, stream: str, consumer: str, count: int) -> list[int]:
    """Acknowledge the next messages of a durable consumer; their sequences."""
    pulled = await bus.client.jetstream().pull_subscribe_bind(consumer, stream)
    taken: list[int] = []
    while len(taken) < count:
        for message in await pulled.fetch(count - len(taken), timeout=10):
            await message.ack_sync()
            taken.append(message.metadata.sequence.stream)
    return taken


async def test_all_streams_come_back_with_their_consumers_under_a_new_incarnation(
    bus: Bus, target: Bus, tmp_path: Path
) -> None:
    for number in range(1, 31):
        await event(bus, number)
        await set_key(bus, "railbus_datasets", f"k{number % 10}", f"v{number}".encode())
        await bus.publish(Outgoing(bus.subjects.submit, b"{}", f"job-{number}"))
    await _consume(bus, EVENTS, "telemetry-writer", 20)
    await _consume(bus, JOBS, "device-manager", 5)
    manifest = await saved(bus, tmp_path / "backup")
    assert (manifest, manifest.incarnation) == (read(tmp_path / "backup"), bus.incarnation)
    names = [stream.name for stream in topology_of(bus.subjects).streams]
    assert ([one.name for one in manifest.streams][:: len(names) - 1], len(manifest.streams)) == (
        [JOBS, EVENTS],
        len(names),
    )

    incarnation = await restored(target, tmp_path / "backup")
    assert {name: await messages(target, name) for name in names} == {name: await messages(bus, name) for name in names}
    assert await target.acknowledged(event_consumer(bus.subjects)) == 20
    assert await target.acknowledged(job_consumer(bus.subjects)) == 5
    assert await ensured(target, tmp_path / "fresh.json") == incarnation != bus.incarnation
    with pytest.raises(IncarnationMismatch):
        await topology.ensure(target, tmp_path / "learning" / ".railbus" / "store.json")
    await event(target, 31)
    assert await _consume(target, EVENTS, "telemetry-writer", 11) == list(range(21, 32))


async def test_a_key_that_changes_while_its_bucket_is_copied_is_in_the_backup_as_it_is_then(
    bus: Bus, target: Bus, tmp_path: Path
) -> None:
    """nats-server leaves out what was overwritten before its turn, so that such a key would be lost."""
    for number in range(200):
        await set_key(bus, "railbus_datasets", f"k{number}", bytes(LARGE // 4) + number.to_bytes(2, "big") * LARGE)

    async def change() -> None:
        for number in range(180, 200):
            await set_key(bus, "railbus_datasets", f"k{number}", b"new")
        await set_key(bus, "railbus_datasets", "another", b"one")
        await set_key(bus, "railbus_datasets", "k170", b"", KV_Operation="PURGE", Nats_Rollup="sub")

    await _saved_while(bus, tmp_path / "backup", DATASETS, change)
    entry = next(one for one in read(tmp_path / "backup").streams if one.name == DATASETS)
    assert entry.later is not None
    assert entry.later.messages == 22
    assert entry.least_messages <= 180
    await restored(target, tmp_path / "backup")
    assert await newest(target, DATASETS) == await newest(bus, DATASETS)
    assert (await newest(target, DATASETS))["$KV.railbus_datasets.k199"] == base64.b64encode(b"new").decode()


async def test_a_key_with_a_lifetime_lives_no_longer_for_having_been_copied(
    bus: Bus, target: Bus, tmp_path: Path
) -> None:
    await set_key(bus, "railbus_leases", "dev0", b"1", Nats_TTL="600")
    renewed_s = clock.boottime_s()

    async def renew() -> None:
        await set_key(bus, "railbus_leases", "dev0", b"2", Nats_TTL="600")
        await set_key(bus, "railbus_leases", "dev1", b"1", Nats_TTL="1")

    await _saved_while(bus, tmp_path / "backup", "KV_railbus_leases", renew)
    await asyncio.sleep(1.1)  # the lifetime of a key is in whole seconds
    await restored(target, tmp_path / "backup")
    age_s = clock.boottime_s() - renewed_s

    async def is_alone() -> bool:
        return len(await messages(target, "KV_railbus_leases")) == 1

    await until(is_alone)
    [kept] = await messages(target, "KV_railbus_leases")
    assert (kept["subject"], kept["data"]) == ("$KV.railbus_leases.dev0", base64.b64encode(b"2").decode())
    assert 600 - age_s - 1 <= int(base64.b64decode(str(kept["hdrs"])).split(b"Nats-TTL:")[1].split()[0]) < 600


async def test_a_job_that_gets_its_record_while_the_store_is_copied_runs_once(
    bus: Bus, target: Bus, tmp_path: Path
) -> None:
    for number in range(1, 4):
        await bus.publish(Outgoing(bus.subjects.submit, b"{}", f"job-{number}"))

    async def record() -> None:
        [sequence] = await _consume(bus, JOBS, "device-manager", 1)
        made = {"id": "j-1", "sequence": sequence, "incarnation": bus.incarnation}
        await set_key(bus, "railbus_jobs", "j-1", wire.encode(made))
        foreign = {"id": "j-2", "sequence": 2, "incarnation": "of another store"}
        await set_key(bus, "railbus_jobs", "j-2", wire.encode(foreign))

    await _saved_while(bus, tmp_path / "backup", RECORDS, record)
    await restored(target, tmp_path / "backup")
    assert [one["seq"] for one in await messages(target, JOBS)] == [2, 3]
    assert set(await newest(target, RECORDS)) == {"$KV.railbus_jobs.j-1", "$KV.railbus_jobs.j-2"}
    await ensured(target, tmp_path / "fresh.json")
    assert await _consume(target, JOBS, "device-manager", 2) == [2, 3]


async def test_events_that_are_told_and_acknowledged_meanwhile_move_no_position(
    bus: Bus, target: Bus, tmp_path: Path
) -> None:
    for number in range(1, 201):
        await event(bus, number, num_bytes=LARGE)
    await _consume(bus, EVENTS, "telemetry-writer", 50)

    async def go_on() -> None:
        for number in range(201, 231):
            await event(bus, number)
        await _consume(bus, EVENTS, "telemetry-writer", 180)

    await _saved_while(bus, tmp_path / "backup", EVENTS, go_on)
    await restored(target, tmp_path / "backup")
    assert await state(target, EVENTS) == {"messages": 200, "first_seq": 1, "last_seq": 200}
    await ensured(target, tmp_path / "fresh.json")
    position = await target.acknowledged(event_consumer(bus.subjects))
    assert 50 <= position <= 200
    await event(target, 231)
    assert await _consume(target, EVENTS, "telemetry-writer", 201 - position) == list(range(position + 1, 202))


class Writers:
    """Everybody who writes, until `done`, and how many of each kind have been acknowledged."""

    def __init__(self, bus: Bus) -> None:
        self.bus, self.done = bus, asyncio.Event()
        self.told = {"jobs": 0, "events": 0, "keys": 0}

    async def jobs(self) -> None:
        while not self.done.is_set():
            await self.bus.publish(Outgoing(self.bus.subjects.submit, b"{}", f"job-{self.told['jobs'] + 1}"))
            self.told["jobs"] += 1

    async def events(self) -> None:
        while not self.done.is_set():
            await event(self.bus, self.told["events"] + 1, num_bytes=2000)
            self.told["events"] += 1

    async def records(self) -> None:
        """As a device_manager: the record first, and then the message is taken off the queue."""
        pulled = await self.bus.client.jetstream().pull_subscribe_bind("device-manager", JOBS)
        while not self.done.is_set():
            with contextlib.suppress(TimeoutError, nats.errors.TimeoutError):
                for message in await pulled.fetch(1, timeout=1):
                    number = message.metadata.sequence.stream
                    made = {"id": f"j-{number}", "sequence": number, "incarnation": self.bus.incarnation}
                    await set_key(self.bus, "railbus_jobs", f"j-{number}", wire.encode(made))
                    await message.ack_sync()

    async def keys(self) -> None:
        while not self.done.is_set():
            await set_key(self.bus, "railbus_devices", f"k{self.told['keys'] % 50}", b"x")
            self.told["keys"] += 1


async def test_a_store_that_is_written_to_all_the_time_loses_nothing_that_was_acknowledged(
    bus: Bus, target: Bus, tmp_path: Path
) -> None:
    writers, before = Writers(bus), dict[str, int]()
    async with asyncio.TaskGroup() as tasks:
        for work in (writers.jobs, writers.events, writers.records, writers.keys):
            tasks.create_task(work())
        await until(lambda: writers.told["keys"] >= 50)  # one round of them
        for number in range(5):
            await asyncio.sleep(0.3)
            before = dict(writers.told)
            await saved(bus, tmp_path / f"backup{number}")
        writers.done.set()
    await restored(target, tmp_path / "backup4")
    queue = {int(str(one["seq"])) for one in await messages(target, JOBS)}
    records = {int(subject.rpartition("-")[2]) for subject in await newest(target, RECORDS)}
    assert set(range(1, before["jobs"] + 1)) <= queue | records
    assert not queue & records
    last = max(queue | records)
    assert queue | records == set(range(1, last + 1))
    assert [one["seq"] for one in await messages(target, EVENTS)][: before["events"]] == list(
        range(1, before["events"] + 1)
    )
    assert len(await newest(target, "KV_railbus_devices")) == 50


async def test_a_backup_needs_a_name_that_is_free_and_leaves_nothing_where_it_fails(
    bus: Bus, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(Conflict, match="exists already"):
        await saved(bus, tmp_path / "there")

    async def second() -> None:
        with pytest.raises(AlreadyRunning):
            await saved(bus, tmp_path / "two")

    with pytest.raises(OSError, match="cut"):
        await save(bus, tmp_path / "one", version="0", report=_cut(EVENTS))
    await _saved_while(bus, tmp_path / "two", EVENTS, second)
    await bus.client.jetstream().delete_stream(DATASETS)
    with pytest.raises(StoreMissing, match=DATASETS):
        await saved(bus, tmp_path / "three")
    assert {path.name for path in tmp_path.iterdir()} == {"nats", "learning", "there", "two"}


def _cut(stage: str) -> Report:
    """Fails when it hears of a stream."""

    def report(at: str, _done: int, _total: int | None) -> None:
        if at == stage:
            raise OSError("cut")

    return report


@pytest.mark.parametrize("stage", [RECORDS, EVENTS])
async def test_a_restore_that_is_cut_short_leaves_a_store_that_is_refused_and_can_be_begun_anew(
    bus: Bus, target: Bus, tmp_path: Path, stage: str
) -> None:
    for number in range(1, 11):
        await event(bus, number)
        await bus.publish(Outgoing(bus.subjects.submit, b"{}", f"job-{number}"))
    await saved(bus, tmp_path / "backup")
    with pytest.raises(OSError, match="cut"):
        await restored(target, tmp_path / "backup", report=_cut(stage))
    with pytest.raises(StoreMissing, match="not whole"):
        await topology.ensure(target, tmp_path / "fresh.json")
    with pytest.raises(Conflict, match="has not come to its end"):
        await saved(target, tmp_path / "half")
    incarnation = await restored(target, tmp_path / "backup")
    assert await ensured(target, tmp_path / "fresh.json") == incarnation
    for name in (JOBS, RECORDS, EVENTS):
        assert await messages(target, name) == await messages(bus, name)


async def test_a_service_that_runs_notices_that_a_backup_is_put_into_its_store(bus: Bus, tmp_path: Path) -> None:
    marker = tmp_path / "learning" / ".railbus" / "store.json"
    await topology.check(bus, marker)
    await saved(bus, tmp_path / "backup")
    with pytest.raises(OSError, match="cut"):
        await restored(bus, tmp_path / "backup", replaces=True, report=_cut(EVENTS))
    with pytest.raises(StoreMissing, match="not whole"):
        await topology.check(bus, marker)


async def test_a_store_that_holds_something_is_replaced_only_if_that_is_said(bus: Bus, tmp_path: Path) -> None:
    await event(bus, 1)
    await saved(bus, tmp_path / "backup")
    await event(bus, 2)
    with pytest.raises(Conflict, match=r"RAILBUS_EVENTS \(2 messages\).*--replace"):
        await restored(bus, tmp_path / "backup")
    assert await state(bus, EVENTS) == {"messages": 2, "first_seq": 1, "last_seq": 2}
    await restored(bus, tmp_path / "backup", replaces=True)
    assert await state(bus, EVENTS) == {"messages": 1, "first_seq": 1, "last_seq": 1}


async def test_nothing_is_put_back_while_services_run(bus: Bus, target: Bus, tmp_path: Path) -> None:
    await saved(bus, tmp_path / "backup")
    service = await nats.micro.add_service(target.client, name="telemetry", version="1.0.0")
    with pytest.raises(Conflict, match="services run on this bus: telemetry"):
        await restored(target, tmp_path / "backup")
    await service.stop()
    await restored(target, tmp_path / "backup")


async def test_what_is_damaged_is_named_and_not_put_back(bus: Bus, target: Bus, tmp_path: Path) -> None:
    for number in range(1, 11):
        await event(bus, number)

    async def change() -> None:
        await set_key(bus, "railbus_leader", "placer", b"me")

    folder = tmp_path / "backup"
    await _saved_while(bus, folder, "KV_railbus_leader", change)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 9
    for name in names:
        whole = (folder / name).read_bytes()
        for damaged in (whole[:-2], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], None):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            with pytest.raises(BackupDamaged, match=name):
                await restored(target, folder)
            (folder / name).write_bytes(whole)
    assert await stream_info(target, JOBS) is None
    await restored(target, folder)


async def test_a_backup_of_another_prefix_or_for_more_nodes_than_there_are_is_refused(
    bus: Bus, target: Bus, tmp_path: Path
) -> None:
    await saved(bus, tmp_path / "backup")
    settings = target._settings
    for changed, said in (({"subject_prefix": "other"}, "SUBJECT_PREFIX"), ({"replicas": 3}, "is no cluster")):
        async with Bus.open(settings.model_copy(update=changed), name="operator", service=True) as opened:
            with pytest.raises(BadSetting, match=said):
                await restored(opened, tmp_path / "backup")


async def test_a_consumer_that_was_given_more_than_the_stream_holds_is_forgotten(bus: Bus) -> None:
    for number in range(1, 6):
        await event(bus, number)
    await _consume(bus, EVENTS, "telemetry-writer", 5)
    assert await forget_consumers_ahead(bus, EVENTS, 5) == []
    assert await forget_consumers_ahead(bus, EVENTS, 4) == ["telemetry-writer"]
    assert (await bus.api(f"CONSUMER.LIST.{EVENTS}"))["consumers"] == []
