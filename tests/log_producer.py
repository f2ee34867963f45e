"""A producer that writes down what the bus has acknowledged: `python log_producer.py URL NOTES RATE`.

It records facts, metrics and lines of output, as a service does, until SIGTERM; then it sends what it holds and ends. A
line of its notes, `<producer> <number>`, is on disk as soon as the stream has the event. Killed, it notes nothing more;
started again, it is another producer.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from railbus_shared.bus.connection import Bus
from railbus_shared.bus.sink import BusSink
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import TransientError
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import About, LearningTelemetry
from railbus_shared.waiting import end, is_set_within

_TICK_S = 0.05
_FLUSH_S = 60.0


class NotingSink:
    """Passes events on to the bus, and notes them once it has them."""

    def __init__(self, sink: BusSink, notes: Path) -> None:
        self._sink = sink
        self._fd = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    async def send(self, events: Sequence[JsonMap]) -> None:
        await self._sink.send(events)
        os.write(self._fd, "".join(f"{event['producer']} {event['number']}\n" for event in events).encode())
        os.fdatasync(self._fd)


def record(telemetry: LearningTelemetry, chance: random.Random) -> None:
    """One event, mostly a metric; some are as long as a page of output."""
    kind = chance.random()
    if kind < 0.05:
        telemetry.event("app.saved", step=chance.randrange(1000))
    elif kind < 0.1:
        telemetry.event("log.line", job="j-1", message="x" * chance.randrange(9000))
    else:
        step = chance.randrange(10_000)
        telemetry.record("train.metrics", {"loss": chance.random()}, about=About(job="j-1", attempt=1, step=step))


async def main(url: str, notes: Path, rate: float) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    chance = random.Random(os.getpid())
    telemetry = LearningTelemetry("tests", host="testhost")
    async with Bus.open(await connectable(url), name="producer") as bus, asyncio.TaskGroup() as tasks:
        telemetry.with_sink(NotingSink(BusSink(bus), notes))
        sending = tasks.create_task(telemetry.run())
        while not await is_set_within(stopping, _TICK_S):
            for _ in range(max(1, round(rate * _TICK_S))):
                record(telemetry, chance)
        is_sent = await telemetry.flush(timeout_s=_FLUSH_S)
        await end(sending)
    sys.exit(0 if is_sent else 1)


async def connectable(url: str) -> CommonSettings:
    """Settings of a bus that answers; a producer may be started while there is none."""
    settings = CommonSettings(nats_url=url, host="testhost")
    while True:
        try:
            async with Bus.open(settings, name="producer"):
                return settings
        except TransientError:
            await asyncio.sleep(_TICK_S)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])))
