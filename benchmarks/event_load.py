"""Processes that make events and receive them, for the benchmark `telemetry`.

    python -m benchmarks.event_load bare-receive URL SIZE MESSAGES
    python -m benchmarks.event_load bare-publish URL SIZE MESSAGES FORM
    python -m benchmarks.event_load publish ROOT SIZE MESSAGES PRODUCER FORM
    python -m benchmarks.event_load record ROOT EVENTS PRODUCER
    python -m benchmarks.event_load paced ROOT RATE SECONDS PRODUCER

Each prints `ready`, waits for a line of input, and prints one JSON line at the end. The bare ones know nothing of
railbus: nats-py on uvloop, no stream. `publish` stores messages of SIZE events that were encoded beforehand; `record`
hands complete events to LearningTelemetry, as a runner does with those of its trainers; `paced` records one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import nats
import uvloop
from pydantic import JsonValue

from benchmarks.peers.loggers import metrics
from railbus_shared import clock, wire
from railbus_shared.batches import batch_of
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.sink import BusSink
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import TransientError
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings, running_bus
from railbus_shared.telemetry import About, LearningTelemetry

SUBJECT: Final = "railbus.evt.train.j-4f09ac-17.metrics"
_TOGETHER_BYTES: Final = 4 << 20
_IN_FLIGHT: Final = 2
_BEGAN: Final[list[float]] = []
"""The CPU time that all preparations took."""
_PATIENCE_S: Final = 120.0


def common(producer: str) -> JsonMap:
    """What all events of a producer share."""
    return {"v": 1, "type": "train.metrics", "producer": producer, "severity": "info", "source": "trainer",
            "host": "bench", "job": "j-4f09ac-17", "attempt": 1, "lease_epoch": 1}  # fmt: skip


def event(producer: str, number: int) -> JsonMap:
    """What is the event's own."""
    return {"id": f"{producer}-{number}", "number": number, "time": clock.now(), "step": number,
            "data": dict[str, JsonValue](metrics(number))}  # fmt: skip


def encoded(producer: str, *, size: int, messages: int, form: str = "ours") -> list[bytes]:
    """Batches of `size` events, numbered from 1 on; `form` is one of FORMS."""
    return [FORMS[form](producer, range(first, first + size)) for first in range(1, size * messages + 1, size)]


def _whole(producer: str, numbers: range) -> bytes:
    shared = common(producer)
    return wire.encode({"v": 1, "common": {}, "events": [{**shared, **event(producer, number)} for number in numbers]})


def _shared(producer: str, numbers: range) -> bytes:
    return wire.encode({"v": 1, "common": common(producer), "events": [event(producer, number) for number in numbers]})


def _ours(producer: str, numbers: range) -> bytes:
    shared = common(producer)
    return wire.encode(batch_of([{**shared, **event(producer, number)} for number in numbers]))


FORMS: Final[dict[str, Callable[[str, range], bytes]]] = {"whole": _whole, "shared": _shared, "ours": _ours}
"""Each event whole; a map for each event, and what all share once (version 1); as BusSink sends them."""


async def go() -> None:
    """Say that all is prepared, and wait for the word."""
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    _BEGAN.append(time.process_time())


async def bare_receive(url: str, size: str, messages: str) -> dict[str, float]:
    """Seconds from the first message to the last one."""
    client = await nats.connect(url)
    subscription = await client.subscribe(SUBJECT)
    await client.flush()
    await go()
    await subscription.next_msg(_PATIENCE_S)
    began = time.perf_counter()
    for _ in range(int(messages) - 1):
        await subscription.next_msg(_PATIENCE_S)
    seconds = time.perf_counter() - began
    await client.close()
    return {"seconds": seconds, "events": (int(messages) - 1) * int(size)}


async def bare_publish(url: str, size: str, messages: str, form: str) -> dict[str, float]:
    payloads = encoded("bare", size=int(size), messages=int(messages), form=form)
    client = await nats.connect(url)
    await go()
    for payload in payloads:
        await client.publish(SUBJECT, payload)
    await client.flush(timeout=60)
    await client.close()
    return {}


async def publish(root: str, size: str, messages: str, producer: str, form: str) -> dict[str, float]:
    """Each is stored by the stream, and synced, when this returns; in atomic batches, as `BusSink` does it."""
    payloads = encoded(producer, size=int(size), messages=int(messages), form=form)
    outgoing = [Outgoing(SUBJECT, data, f"{producer}-{place}") for place, data in enumerate(payloads)]
    together = max(1, min(256, _TOGETHER_BYTES // len(payloads[-1])))
    portions = iter([outgoing[at : at + together] for at in range(0, len(outgoing), together)])

    async with _bus(root) as bus:

        async def some() -> None:
            for portion in portions:
                await stored(bus, portion)

        await go()
        began_ns = time.time_ns()
        await asyncio.gather(*(some() for _ in range(_IN_FLIGHT)))
        return {"began_ns": began_ns, "stored_ns": time.time_ns()}


async def stored(bus: Bus, portion: list[Outgoing]) -> None:
    """As `BusSink` does it: what may have been stored is offered again under its id."""
    try:
        await bus.publish_together(portion)
    except TransientError:
        for message in portion:
            while True:
                with contextlib.suppress(TransientError):
                    await bus.publish(message)
                    break


async def record(root: str, events: str, producer: str) -> dict[str, float]:
    shared = common(producer)
    made = [{**shared, **event(producer, number)} for number in range(1, int(events) + 1)]
    telemetry = LearningTelemetry("bench", producer=producer)
    async with _bus(root) as bus, asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(telemetry.with_sink(BusSink(bus)).run())
        await go()
        began_ns = time.time_ns()
        for at in range(0, len(made), 8000):
            telemetry.forward(made[at : at + 8000])
            assert await telemetry.flush(timeout_s=_PATIENCE_S)
        stored_ns = time.time_ns()
        sending.cancel()
    return {"began_ns": began_ns, "stored_ns": stored_ns, "dropped": telemetry.dropped.total()}


async def paced(root: str, rate: str, seconds: str, producer: str) -> dict[str, float]:
    """So many events a second, one at a time."""
    telemetry = LearningTelemetry("bench", producer=producer)
    total = int(rate) * int(seconds)
    async with _bus(root) as bus, asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(telemetry.with_sink(BusSink(bus)).run())
        await go()
        began = time.perf_counter()
        for number in itertools.count(1):
            telemetry.record("train.metrics", metrics(number), about=About(job="j-4f09ac-17", attempt=1, step=number))
            if number == total:
                break
            await asyncio.sleep(max(0.0, began + number / int(rate) - time.perf_counter()))
        assert await telemetry.flush(timeout_s=_PATIENCE_S)
        sending.cancel()
    return {"dropped": telemetry.dropped.total()}


def _bus(root: str) -> contextlib.AbstractAsyncContextManager[Bus]:
    settings = running_bus(Layout(Path(root)))
    assert settings is not None, f"no bus runs on {root}"
    return as_runner(settings)


def as_runner(settings: CommonSettings) -> contextlib.AbstractAsyncContextManager[Bus]:
    """The bus as a runner joins it: people may not tell metrics of jobs."""
    assert settings.nats_key_file is not None, "this bus asks for no key"
    key = settings.nats_key_file.with_name(settings.nats_key_file.name.replace("user", "runner"))
    return Bus.open(settings.model_copy(update={"nats_key_file": key}), name="runner", service=True)


KINDS: Final[dict[str, Callable[..., Awaitable[dict[str, float]]]]] = {
    "bare-receive": bare_receive,
    "bare-publish": bare_publish,
    "publish": publish,
    "record": record,
    "paced": paced,
}


def main() -> None:
    kind, *arguments = sys.argv[1:]

    async def run() -> dict[str, float]:
        return await KINDS[kind](*arguments)

    found = uvloop.run(run())
    print(json.dumps({**found, "cpu_s": time.process_time() - _BEGAN[0]}), flush=True)


if __name__ == "__main__":
    main()
