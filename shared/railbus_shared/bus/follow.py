"""Events as they happen, and from the stream's memory before that; one at a time, whatever the batching."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Final, Literal

import nats.errors
import nats.js.api as js
import nats.js.errors
from nats.aio.msg import Msg

from railbus_shared import clock, wire
from railbus_shared.bus.client import bus_errors
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BusUnavailable, NoResponder, RequestTimeout, WireError

_POLL_S: Final = 1.0
_FIRST_S: Final = 15.0  # NATS may be restarting just now


async def follow(
    bus: Bus, subject: str, *, since: Literal["all", "new"] = "all"
) -> AsyncGenerator[dict[str, object], None]:
    """Events on a subject, for ever, in the order of the stream; goes on after a restart of the server, without gaps.

    Raises BusUnavailable, NoResponder or RequestTimeout if the first subscription does not succeed within 15 s.
    """
    sequence = 0 if since == "all" else await bus.last_sequence(bus.subjects.events_stream)
    give_up_s: float | None = clock.boottime_s() + _FIRST_S
    while True:
        generation = bus.generation
        try:
            subscription = await _subscribe(bus, subject, after=sequence)
            give_up_s = None
        except (BusUnavailable, NoResponder, RequestTimeout):
            if give_up_s is not None and clock.boottime_s() > give_up_s:
                raise
            await asyncio.sleep(_POLL_S)
            continue
        try:
            while bus.generation == generation:
                try:
                    message: Msg = await subscription.next_msg(_POLL_S)
                except (TimeoutError, nats.errors.TimeoutError):
                    continue
                except nats.errors.Error:
                    break
                sequence = int(message.metadata.sequence.stream)
                for event in events_in(bytes(message.data)):
                    yield event
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()


async def _subscribe(bus: Bus, subject: str, *, after: int):  # type: ignore[no-untyped-def]
    config = js.ConsumerConfig(
        inactive_threshold=60, deliver_policy=js.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=after + 1
    )
    with bus_errors(subject):
        return await bus.client.jetstream().subscribe(
            subject, stream=bus.subjects.events_stream, ordered_consumer=True, config=config
        )


def events_in(data: bytes) -> Iterator[dict[str, object]]:
    """The events of one message, each whole; nothing for bytes that are no message."""
    try:
        message = wire.decode(data)
    except WireError:
        return
    common, events = message.get("common"), message.get("events")
    if not isinstance(common, dict) or not isinstance(events, list):
        yield message
        return
    for event in events:
        if isinstance(event, dict):
            yield {**common, **event}
