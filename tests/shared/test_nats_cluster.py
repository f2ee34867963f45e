"""Streams and buckets on three nodes: what a lost, paused or emptied node changes for a process, and what not."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from nats.js.errors import ServiceUnavailableError

from nats_cluster import Cluster, running_cluster
from railbus_shared.bus import topology
from railbus_shared.bus.bucket import Bucket, Write
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.consume import Delivery, consume
from railbus_shared.errors import BadSetting, NoResponder, RevisionConflict, TransientError
from railbus_shared.settings import CommonSettings
from railbus_shared.topology import Consumer, job_consumer
from railbus_shared.topology import topology as declared
from until import until

pytestmark = pytest.mark.timeout(90)  # an election takes 4 to 10 s, and each test waits for one or two

_ELECTING = (TimeoutError, ServiceUnavailableError)
"""What a question of a stream or consumer gives that has no leader now."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
async def bus(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Bus]:
    for node in cluster.nodes:
        if not node.is_alive:  # a test that failed has left it like this
            node.start()
    async with joined(cluster.settings(tmp_path)) as opened:
        yield opened


@contextlib.asynccontextmanager
async def joined(settings: CommonSettings) -> AsyncIterator[Bus]:
    """A connection once everything exists, as a service waits for it."""
    async with Bus.open(settings, name="test") as bus:
        await until(lambda: ensured(bus, settings))
        yield bus


async def ensured(bus: Bus, settings: CommonSettings) -> bool:
    """False while the cluster elects a leader; a store that is missing or another one fails the test."""
    try:
        await topology.ensure(bus, settings.layout.state / "store.json")
    except TransientError:
        return False
    return True


async def copies(bus: Bus, stream: str) -> tuple[int, int]:
    """Wanted, and up to date."""
    info = await bus.client.jetstream().stream_info(stream)
    replicas = info.cluster.replicas if info.cluster and info.cluster.replicas else []
    return info.config.num_replicas or 0, 1 + sum(bool(replica.current) for replica in replicas)


async def have_all_copies(bus: Bus) -> bool:
    try:
        return all([await copies(bus, stream.name) == (3, 3) for stream in declared(bus.subjects).streams])
    except _ELECTING:
        return False


async def has_copies_of_consumer(bus: Bus) -> bool:
    consumer = job_consumer(bus.subjects)
    try:
        info = await bus.client.jetstream().consumer_info(consumer.stream, consumer.name)
    except _ELECTING:
        return False
    return info.cluster is not None and len(info.cluster.replicas or ()) == 2


async def test_every_stream_and_durable_consumer_has_as_many_copies_as_the_setting_says(bus: Bus) -> None:
    await until(lambda: have_all_copies(bus))
    await until(lambda: has_copies_of_consumer(bus))
    assert bus.is_clustered


async def test_copies_are_added_to_what_exists_and_never_taken_away(
    bus: Bus, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = cluster.settings(tmp_path / "other").model_copy(update={"subject_prefix": "other", "replicas": 1})
    async with joined(settings) as single:
        sequence = await single.publish(Outgoing(single.subjects.submit, b"{}", "a"))
        assert await copies(single, single.subjects.jobs_stream) == (1, 1)
    for replicas in (3, 1):
        async with joined(settings.model_copy(update={"replicas": replicas})) as again:
            await until(partial(have_all_copies, again))
            assert await again.last_sequence(again.subjects.jobs_stream) == sequence
            await until(partial(has_copies_of_consumer, again))
    told = [record for record in caplog.records if record.message == "stream replicated"]
    assert len(told) == len(declared(bus.subjects).streams)


async def test_copies_on_a_single_server_are_a_setting_to_change(common: CommonSettings, tmp_path: Path) -> None:
    async with Bus.open(common.model_copy(update={"replicas": 3}), name="test") as single:
        with pytest.raises(BadSetting, match="RAILBUS_REPLICAS"):
            await topology.ensure(single, tmp_path / "store.json")
    async with Bus.open(common, name="test") as single:
        await topology.ensure(single, tmp_path / "store.json")
    async with Bus.open(common.model_copy(update={"replicas": 3}), name="test") as single:
        with pytest.raises(BadSetting, match="RAILBUS_REPLICAS"):
            await topology.ensure(single, tmp_path / "store.json")


async def test_what_is_read_through_a_node_that_lags_behind_is_never_old(
    bus: Bus, cluster: Cluster, tmp_path: Path
) -> None:
    """Direct reads would be: in about half of the rounds they give what was there before the pause."""
    leader = await cluster.leader("KV_railbus_jobs")
    lagging, *_ = cluster.others(leader)
    through = cluster.settings(tmp_path).model_copy(update={"nats_url": lagging.url})
    direct = cluster.settings(tmp_path).model_copy(update={"nats_url": leader.url})
    async with Bus.open(through, name="reader") as reader, Bus.open(direct, name="writer") as writer:
        written, read = Bucket(writer, bus.subjects.jobs), Bucket(reader, bus.subjects.jobs)
        for number in range(12):
            await until(lambda: have_all_copies(writer))
            lagging.pause()
            try:
                for step in range(20):
                    await written.put("a", {"n": number, "step": step})
                one, all_of_them = asyncio.create_task(read.get("a")), asyncio.create_task(read.snapshot())
                await asyncio.sleep(0.1)
            finally:
                lagging.resume()
            newest = {"n": number, "step": 19}
            assert getattr(await one, "value", None) == newest
            assert (await all_of_them)["a"].value == newest
        assert await read.get("nothing") is None
        assert await Bucket(reader, bus.subjects.leader).snapshot() == {}


async def test_what_a_leader_took_is_there_when_it_is_killed_and_work_goes_on_without_it(
    bus: Bus, cluster: Cluster, tmp_path: Path
) -> None:
    """Messages, atomic batches, keys with a time to live; a consumer that waits at another node goes on as well."""
    await until(lambda: have_all_copies(bus))
    consumer = job_consumer(bus.subjects)
    leader = await cluster.consumer_leader(consumer)
    elsewhere = cluster.settings(tmp_path).model_copy(update={"nats_url": cluster.others(leader)[0].url})
    stopping, handled = asyncio.Event(), list[bytes]()

    async def handle(deliveries: list[Delivery]) -> Sequence[Exception | None]:
        handled.extend(delivery.data for delivery in deliveries)
        return [None] * len(deliveries)

    async with Bus.open(elsewhere, name="other") as other, asyncio.TaskGroup() as tasks:
        leases = Bucket(other, other.subjects.leases)
        tasks.create_task(consume(other, consumer, handle, stopping=stopping, batch=16))
        held = await leases.create("held", {"by": "a"}, ttl_s=60)
        await leases.create("lapses", {"by": "a"}, ttl_s=3)
        jobs = [Outgoing(other.subjects.submit, b"job %d" % number, f"job{number}") for number in range(20)]
        events = [
            [Outgoing(other.subjects.event("job", "j", f"e{batch}"), b"%d" % n, f"{batch}.{n}") for n in range(10)]
            for batch in range(10)
        ]
        before = await other.last_sequence(other.subjects.events_stream)
        for number, job in enumerate(jobs):
            if number == 5:
                await until(lambda: _is_waiting(bus, consumer))
                leader.kill()
            await until(partial(_stored, other, [job]))
        for batch in events:
            await until(partial(_stored, other, batch))
        await until(lambda: len(set(handled)) == len(jobs))
        assert await other.last_sequence(other.subjects.events_stream) == before + 100
        await until(lambda: _is_taken(leases, "held"))
        await until(lambda: _written(leases, Write("held", {"by": "a"}, held, ttl_s=60)))
        await until(lambda: _created(leases, "lapses"))
        stopping.set()
    leader.start()
    await until(lambda: have_all_copies(bus))


async def test_a_request_for_messages_that_a_paused_leader_has_taken_with_it_is_made_anew(
    bus: Bus, cluster: Cluster, tmp_path: Path
) -> None:
    """The next leader does not know of it, so it would wait for half a minute."""
    consumer = job_consumer(bus.subjects)
    leader = await cluster.consumer_leader(consumer)
    elsewhere = cluster.settings(tmp_path).model_copy(update={"nats_url": cluster.others(leader)[0].url})
    handled = asyncio.Event()
    stopping = asyncio.Event()

    async def handle(deliveries: list[Delivery]) -> Sequence[Exception | None]:
        handled.set()
        return [None] * len(deliveries)

    async with Bus.open(elsewhere, name="other") as other, asyncio.TaskGroup() as tasks:
        leader.pause()
        try:
            tasks.create_task(consume(other, consumer, handle, stopping=stopping))
            await until(lambda: _stored(other, [Outgoing(other.subjects.submit, b"{}", "anew")]))
            await until(handled.is_set, seconds=26)
        finally:
            leader.resume()
            stopping.set()


async def _is_waiting(bus: Bus, consumer: Consumer) -> bool:
    """Whether everything has been handled and somebody waits for more."""
    try:
        info = await bus.client.jetstream().consumer_info(consumer.stream, consumer.name)
    except _ELECTING:
        return False
    return (info.num_waiting, info.num_pending, info.num_ack_pending) == (1, 0, 0)


async def _stored(bus: Bus, messages: list[Outgoing]) -> bool:
    """Published as `BusSink` and the clients do: again until it is taken, under the same ids."""
    try:
        await bus.publish_together(messages)
    except TransientError as exc:
        return type(exc).__name__ == "DuplicateBatch"
    return True


async def _is_taken(bucket: Bucket, key: str) -> bool:
    """Whether a key is known to be somebody else's; it must not be given twice."""
    try:
        await bucket.create(key, {"by": "b"}, ttl_s=60)
    except RevisionConflict:
        return True
    except TransientError:
        return False
    raise AssertionError(f"{key} was given twice")


async def _written(bucket: Bucket, change: Write) -> bool:
    """False while the bucket has no leader; any other refusal fails the test."""
    try:
        await bucket.write(change)
    except NoResponder:
        return False
    return True


async def _created(bucket: Bucket, key: str) -> bool:
    try:
        await bucket.create(key, {"by": "b"}, ttl_s=60)
    except TransientError:
        return False
    return True


async def test_nodes_that_are_restarted_one_after_the_other_cost_no_connection_and_no_message(
    bus: Bus, cluster: Cluster
) -> None:
    before = await bus.last_sequence(bus.subjects.events_stream)
    for number, node in enumerate(cluster.nodes):
        node.kill(signal.SIGTERM)
        message = Outgoing(bus.subjects.event("job", "rolling", "told"), b"%d" % number, f"rolling{number}")
        await until(partial(_stored, bus, [message]))
        node.start()
        await until(lambda: have_all_copies(bus))
    assert await bus.last_sequence(bus.subjects.events_stream) == before + 3


async def test_a_node_that_comes_back_empty_is_filled_again_and_nothing_is_reported_missing(
    bus: Bus, cluster: Cluster, tmp_path: Path
) -> None:
    """Whoever asks while it is being filled finds everything that there was, through this node as well."""
    settings = cluster.settings(tmp_path)
    marker = settings.layout.state / "store.json"
    incarnation, sequence = bus.incarnation, await bus.publish(Outgoing(bus.subjects.submit, b"{}", "kept"))
    node = await cluster.leader(bus.subjects.jobs_stream)
    node.kill()
    node.empty()
    node.start()
    through = settings.model_copy(update={"nats_url": node.url})
    async with Bus.open(through, name="through") as opened:
        for _ in range(50):
            with contextlib.suppress(TransientError):
                opened.incarnation = incarnation
                await topology.check(opened, marker)
                await topology.ensure(opened, marker)
        await until(lambda: ensured(opened, settings))
        await until(lambda: have_all_copies(opened))
        assert opened.incarnation == incarnation
        assert await opened.last_sequence(opened.subjects.jobs_stream) >= sequence
