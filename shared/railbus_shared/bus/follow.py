"""Events as they happen, and from the stream's memory before that; one at a time, whatever the batching."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Final, Literal

import nats.js.api as js

from railbus_shared import clock, wire
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.pull import Tail, tailing
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
        try:
            async with _tail(bus, subject, after=sequence) as tail:
                give_up_s = None
                while (messages := await tail.next_messages()) is not None:
                    for message in messages:
                        sequence = int(message.metadata.sequence.stream)
                        for event in events_in(bytes(message.data)):
                            yield event
        except (BusUnavailable, NoResponder, RequestTimeout):
            if give_up_s is not None and clock.boottime_s() > give_up_s:
                raise
            await asyncio.sleep(_POLL_S)


def _tail(bus: Bus, subject: str, *, after: int) -> contextlib.AbstractAsyncContextManager[Tail]:
    config = js.ConsumerConfig(
        filter_subject=subject, deliver_policy=js.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=after + 1
    )
    return tailing(bus, bus.subjects.events_stream, config)


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
