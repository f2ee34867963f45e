"""Durable consumers: what becomes of a message is decided by the branch of the error, and a restart loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.consume import Delivery, Handle, consume, consume_batches
from railbus_shared.errors import (
    BadMessage,
    BadParams,
    BadSetting,
    BusUnavailable,
    Conflict,
    Internal,
    RailbusError,
)
from railbus_shared.topology import Consumer, event_consumer, job_consumer
from servers import Server
from until import PATIENCE_S, until

HandleOne = Callable[[Delivery], Awaitable[None]]

PROMPT_S = 15  # well under the 30 s after which what is not acknowledged comes again


async def _publish(bus: Bus, *bodies: bytes) -> None:
    for body in bodies:
        await bus.publish(Outgoing(bus.subjects.submit, body, ""))


async def _left(bus: Bus) -> tuple[int, int]:
    """Messages in the stream of jobs, and of them those that are with the consumer."""
    state = (await bus.client.jetstream().stream_info(bus.subjects.jobs_stream)).state
    info = await bus.client.jetstream().consumer_info(bus.subjects.jobs_stream, "device-manager")
    return int(state.messages), int(info.num_ack_pending or 0)


def _each(handle: HandleOne) -> Handle:
    """Handles one message after the other; an error of ours is that message's, a bug the whole batch's."""

    async def handle_all(deliveries: list[Delivery]) -> list[Exception | None]:
        found: list[Exception | None] = []
        for delivery in deliveries:
            try:
                await handle(delivery)
                found.append(None)
            except RailbusError as exc:
                found.append(exc)
        return found

    return handle_all


@contextlib.asynccontextmanager
async def _consuming(bus: Bus, handle: HandleOne, *, batch: int = 4) -> AsyncIterator[None]:
    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(consume(bus, job_consumer(bus.subjects), _each(handle), stopping=stopping, batch=batch))
        try:
            yield
        finally:
            stopping.set()


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (None, 0),
        (Conflict("taken"), 0),
        (BadParams("wrong"), 0),
        (BadMessage("no message"), 0),
        (BusUnavailable("away"), 1),
        (BadSetting("bad"), 1),
        (Internal("bug"), 1),
        (ZeroDivisionError("bug"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception | None) else value,
)
async def test_the_branch_of_the_error_decides_what_becomes_of_the_message(
    bus: Bus, error: RailbusError | None, left: int
) -> None:
    seen: list[bytes] = []

    async def handle(delivery: Delivery) -> None:
        seen.append(delivery.data)
        if error is not None and delivery.data == b"first":
            raise error

    await _publish(bus, b"first", b"second")
    async with _consuming(bus, handle):
        await until(lambda: b"second" in seen)
    assert await _left(bus) == (left, left)


async def test_what_failed_for_a_while_comes_again_and_is_counted(bus: Bus) -> None:
    tries: list[tuple[int, int]] = []

    async def handle(delivery: Delivery) -> None:
        tries.append((delivery.sequence, delivery.delivered))
        if delivery.delivered == 1:
            raise BusUnavailable("away")

    await _publish(bus, b"x")
    began = time.monotonic()
    async with _consuming(bus, handle):
        await until(lambda: len(tries) == 2)
    assert tries == [(1, 1), (1, 2)]
    assert time.monotonic() - began > 0.9
    assert await _left(bus) == (0, 0)


async def test_after_a_restart_of_the_server_what_was_not_acknowledged_comes_again(bus: Bus, server: Server) -> None:
    consumer = Consumer(bus.subjects.events_stream, "restarted", "explicit", ack_wait_s=1, max_ack_pending=100)
    await topology._ensure_consumer(bus, consumer)
    for number in range(5):
        await bus.publish(Outgoing("railbus.evt.a.b.c", str(number).encode(), f"id-{number}"))
    handled: list[bytes] = []
    stopping = asyncio.Event()

    async def handle(delivery: Delivery) -> None:
        handled.append(delivery.data)
        if len(handled) == 3:
            server.kill()
            server.start()
            await until(lambda: bus.generation == 1)

    async def acknowledged() -> bool:
        return await bus.acknowledged(consumer) == 6

    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_S):
        tasks.create_task(consume(bus, consumer, _each(handle), stopping=stopping))
        await until(lambda: set(handled) == {b"0", b"1", b"2", b"3", b"4"})
        await bus.publish(Outgoing("railbus.evt.a.b.c", b"5", "id-5"))
        await until(acknowledged)
        stopping.set()
    assert set(handled) == {b"0", b"1", b"2", b"3", b"4", b"5"}


async def test_a_batch_that_is_done_with_is_acknowledged_whole_and_another_comes_again(bus: Bus) -> None:
    consumer = Consumer(bus.subjects.events_stream, "batches", "explicit", ack_wait_s=1, max_ack_pending=100)
    await topology._ensure_consumer(bus, consumer)
    for number in range(20):
        await bus.publish(Outgoing("railbus.evt.a.b.c", str(number).encode(), f"id-{number}"))
    batches: list[list[int]] = []
    stopping = asyncio.Event()

    async def handle(batch: list[Delivery]) -> bool:
        batches.append([delivery.sequence for delivery in batch])
        if set(itertools.chain(*batches[1:])) == set(range(1, 21)):
            stopping.set()
        return len(batches) > 1

    async with asyncio.timeout(PATIENCE_S):
        await consume_batches(bus, consumer, handle, stopping=stopping, batch=8)
    assert batches[0] == list(range(1, len(batches[0]) + 1))
    assert await bus.acknowledged(consumer) == 20


async def test_a_message_larger_than_all_that_is_held_at_once_comes_alone_and_stops_nobody(bus: Bus) -> None:
    consumer = Consumer(bus.subjects.events_stream, "narrow", "explicit", ack_wait_s=30, max_ack_pending=100)
    await topology._ensure_consumer(bus, consumer)
    sizes = [10, 20_000, 10, 30_000, 40_000, 10]
    for number, size in enumerate(sizes):
        await bus.publish(Outgoing("railbus.evt.a.b.c", b"x" * size, f"id-{number}"))
    taken: list[int] = []
    stopping = asyncio.Event()

    async def handle(batch: list[Delivery]) -> bool:
        taken.extend(len(delivery.data) for delivery in batch)
        if len(taken) == len(sizes):
            stopping.set()
        return True

    async with asyncio.timeout(PATIENCE_S):
        await consume_batches(bus, consumer, handle, stopping=stopping, batch_bytes=1000)
    assert taken == sizes
    assert await bus.acknowledged(consumer) == len(sizes)


async def test_a_batch_does_not_acknowledge_older_messages_whose_delivery_was_lost(bus: Bus) -> None:
    consumer = Consumer(bus.subjects.events_stream, "lossy", "explicit", ack_wait_s=3, max_ack_pending=100)
    await topology._ensure_consumer(bus, consumer)
    assert event_consumer(bus.subjects).ack == consumer.ack
    for number in range(10):
        await bus.publish(Outgoing("railbus.evt.a.b.c", str(number).encode(), f"id-{number}"))
    lost = await bus.client.jetstream().pull_subscribe_bind(durable=consumer.name, stream=consumer.stream)
    assert len(await lost.fetch(3)) == 3
    taken: list[int] = []
    stopping = asyncio.Event()

    async def handle(batch: list[Delivery]) -> bool:
        taken.extend(delivery.sequence for delivery in batch)
        if len(taken) >= 10:
            stopping.set()
        return True

    async with asyncio.timeout(PATIENCE_S):
        await consume_batches(bus, consumer, handle, stopping=stopping)
    assert sorted(taken) == list(range(1, 11))
    assert taken[:7] == list(range(4, 11))
    assert await bus.acknowledged(consumer) == 10


async def test_a_stop_is_prompt_and_leaves_the_rest_to_others(bus: Bus) -> None:
    stopping, handled = asyncio.Event(), list[bytes]()

    async def handle(delivery: Delivery) -> None:
        handled.append(delivery.data)
        stopping.set()

    await _publish(bus, *(str(number).encode() for number in range(10)))
    async with asyncio.timeout(PROMPT_S):
        await consume(bus, job_consumer(bus.subjects), _each(handle), stopping=stopping, batch=3)
    assert handled == [b"0", b"1", b"2"]
    again: list[int] = []

    async def take(delivery: Delivery) -> None:
        again.append(delivery.sequence)

    async with _consuming(bus, take):
        await until(lambda: len(again) == 7, seconds=PROMPT_S)
    assert sorted(again) == list(range(4, 11))


async def test_what_arrives_while_a_consumer_stops_comes_to_another_at_once(bus: Bus) -> None:
    """Not after the half minute in which an acknowledgement may come."""
    taken: list[int] = []

    async def take(delivery: Delivery) -> None:
        taken.append(delivery.sequence)

    for number in range(1, 21):
        async with _consuming(bus, take):
            await asyncio.gather(_publish(bus, b"x"), asyncio.sleep(0.002 * (number % 4)))
    async with _consuming(bus, take):
        await until(lambda: set(taken) == set(range(1, 21)), seconds=PROMPT_S)


async def test_a_lone_message_waits_for_no_company_and_many_come_together(bus: Bus) -> None:
    batches: list[int] = []
    stopping, go_on = asyncio.Event(), asyncio.Event()

    async def handle(deliveries: list[Delivery]) -> list[Exception | None]:
        batches.append(len(deliveries))
        await go_on.wait()
        return [None] * len(deliveries)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(consume(bus, job_consumer(bus.subjects), handle, stopping=stopping, batch=64))
        await _publish(bus, b"alone")
        await until(lambda: batches == [1], seconds=PROMPT_S)
        await _publish(bus, *[b"together"] * 70)
        go_on.set()
        await until(lambda: sum(batches) == 71, seconds=PROMPT_S)
        stopping.set()
    assert batches == [1, 64, 6]


async def test_a_bug_over_one_message_of_a_batch_costs_the_others_nothing(bus: Bus) -> None:
    seen: list[bytes] = []

    async def handle(delivery: Delivery) -> None:
        seen.append(delivery.data)
        if delivery.data == b"bad":
            raise ZeroDivisionError("bug")

    await _publish(bus, b"1", b"bad", b"2", b"3")
    async with _consuming(bus, handle, batch=8):
        await until(lambda: b"3" in seen)
    assert await _left(bus) == (1, 1)


async def test_a_stop_while_nothing_arrives_or_nothing_is_connected_is_prompt(bus: Bus, server: Server) -> None:
    async def handle(delivery: Delivery) -> None:
        raise AssertionError("nothing was published")

    async with asyncio.timeout(PROMPT_S), _consuming(bus, handle):
        await asyncio.sleep(0.1)
    server.kill()
    await until(lambda: not bus.is_connected)
    async with asyncio.timeout(PROMPT_S), _consuming(bus, handle):
        await asyncio.sleep(0.1)


async def test_consumers_leave_no_subscription_behind(bus: Bus, server: Server) -> None:
    async def handle(delivery: Delivery) -> None:
        pass

    await bus.last_sequence(bus.subjects.jobs_stream)
    before = len(bus.client._subs)
    async with _consuming(bus, handle):
        await asyncio.sleep(0.1)
        server.kill()
        server.start()
        await until(lambda: bus.generation == 1)
        await asyncio.sleep(0.3)
    assert len(bus.client._subs) == before
