"""Events as they happen, and from the stream's memory before that; one at a time, whatever the batching.

They are read from the stream, without a consumer. That there is something new is heard on the subject itself, where an
event may come a moment before it is stored; the second look is for that, and the rare one for what is heard by nobody:
what people tell, who are accounts of their own, and what happened while the connection was away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Final, Literal, NamedTuple

import nats.errors
from nats.aio.msg import Msg

from railbus_shared import clock, wire
from railbus_shared.batches import events_of
from railbus_shared.bus.client import bus_errors
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.reading import Stored, stored_after
from railbus_shared.bus.topology import incarnation_of_store
from railbus_shared.errors import BusUnavailable, NoResponder, NotFound, RequestTimeout, WireError
from railbus_shared.subjects import told_by
from railbus_shared.topology import event_consumer
from railbus_shared.waiting import is_set_within

_POLL_S: Final = 1.0
_LOOKS_S: Final = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Waits before further looks, after something was heard that is not there yet."""
_FIRST_S: Final = 15.0  # NATS may be restarting just now


class Seam(NamedTuple):
    """Where the log files end and the stream goes on: the files hold every message up to it."""

    incarnation: str
    """Of the store whose sequences are meant."""
    sequence: int

    def is_behind(self, line: Mapping[str, object]) -> bool:
        """Whether a line of the files is of a message behind the seam, which the stream gives as well."""
        sequence = line.get("seq")
        return line.get("incarnation") == self.incarnation and isinstance(sequence, int) and sequence > self.sequence


async def seam(bus: Bus) -> Seam:
    """The present one: up to where the writer of the logs has acknowledged everything, which is on disk then."""
    incarnation = await incarnation_of_store(bus)
    try:
        return Seam(incarnation, await bus.acknowledged(event_consumer(bus.subjects)))
    except NotFound:  # no telemetry service ever ran
        return Seam(incarnation, 0)


async def follow(
    bus: Bus, subject: str, *, since: Literal["all", "new"] = "all", after: int = 0
) -> AsyncGenerator[dict[str, object], None]:
    """Events on a subject, for ever, in the order of the stream; goes on after a restart of the server, without gaps.

    All that the stream still has behind the sequence `after`, or only what is new. Another store that has taken the
    place of the one followed is followed from its beginning: its sequences are others.
    Raises BusUnavailable, NoResponder or RequestTimeout if the stream cannot be read within the first 15 s, and
    NotAuthorized once the key is of no use any more.
    """
    sequence = after if since == "all" else await bus.last_sequence(bus.subjects.events_stream)
    store = ""
    give_up_s: float | None = clock.boottime_s() + _FIRST_S
    while True:
        try:
            before, store = store, await _store(bus)
            if before not in {"", store}:
                sequence = 0
            async with contextlib.aclosing(_stored(bus, subject, after=sequence)) as found:
                async for messages in found:
                    give_up_s = None
                    for message in messages:
                        sequence = message.sequence
                        for event in events_in(message.data, subject=message.subject):
                            yield event
        except (BusUnavailable, NoResponder, RequestTimeout):
            if give_up_s is not None and clock.boottime_s() > give_up_s:
                raise
            await asyncio.sleep(_POLL_S)


async def _store(bus: Bus) -> str:
    """The incarnation of the store; raises NoResponder while it holds nothing yet."""
    incarnation = await incarnation_of_store(bus)
    if not incarnation:
        raise NoResponder(f"stream {bus.subjects.events_stream!r} cannot be read: nobody has it")
    return incarnation


async def _stored(bus: Bus, subject: str, *, after: int) -> AsyncGenerator[list[Stored], None]:
    """What is stored after a sequence, and what comes to it, over one connection; an empty list where nothing is."""
    generation = bus.generation
    async with _news(bus, subject) as news:
        looks = iter(_LOOKS_S)
        while bus.generation == generation:
            if news.is_set():
                news.clear()
                looks = iter(_LOOKS_S)
            messages = await stored_after(bus, bus.subjects.events_stream, subject, after)
            yield messages
            if messages:
                after = messages[-1].sequence
            else:
                await is_set_within(news, next(looks, _POLL_S))


@contextlib.asynccontextmanager
async def _news(bus: Bus, subject: str) -> AsyncIterator[asyncio.Event]:
    """Set whenever a message is published there, and after a reconnect."""
    news = asyncio.Event()

    async def hear(_: Msg) -> None:
        news.set()

    bus.need_connection(subject)
    with bus_errors(subject):
        subscription = await bus.client.subscribe(subject, cb=hear)
    forget = bus.on_connection(lambda _: news.set())
    try:
        yield news
    finally:
        forget()
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()


def events_in(data: bytes, *, subject: str) -> Iterator[dict[str, object]]:
    """The events of one message, each whole, with `person` where one told it; nothing for bytes that are no message.

    Nor what is of another area than its subject: permissions are on subjects, and telemetry refuses it too.
    """
    person = told_by(subject)
    area = subject.partition(".evt.")[2].partition(".")[0]
    try:
        for event in events_of(wire.decode(data)):
            kind = event.get("type", "")
            if isinstance(kind, str) and kind.partition(".")[0] in {area, ""}:
                event.pop("person", None)  # anybody may write one
                yield {**event, "person": person} if person else event
    except WireError:
        return
