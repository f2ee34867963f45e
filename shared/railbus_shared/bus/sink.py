"""Events onto the bus: facts alone, metrics and log lines in batches of one job and one type.

A message is composed once and published until it is stored: the same events under the same `Nats-Msg-Id`, so that a
lost acknowledgement doubles nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from railbus_shared import wire
from railbus_shared.batches import batch_of
from railbus_shared.bus.client import DuplicateBatch
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.contracts.events import BATCHED_TYPES
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import BusUnavailable, InvalidName, MessageTooLarge, WireError
from railbus_shared.names import checked_name, key_token
from railbus_shared.subjects import Subjects

_AT_ONCE: Final = 64
_TOGETHER: Final = 256
_TOGETHER_BYTES: Final = 4 << 20
_WORTH_A_BATCH: Final = 5
_MAX_EVENTS: Final = 1000


class BusSink:
    """Publishes events into the stream of events."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: list[Outgoing] = []
        self._events: Sequence[JsonMap] = ()

    async def send(self, events: Sequence[JsonMap]) -> None:
        """Store all events; raises TransientError, after which the same events must be offered again."""
        if events is not self._events:
            self._waiting = list(messages(events, subjects=self._bus.subjects))
            self._events = events
        while self._waiting:
            some = _portion(self._waiting)
            if len(some) < _WORTH_A_BATCH or not await self._stored_together(some):
                await self._store_each(some[:_AT_ONCE])
            else:
                del self._waiting[: len(some)]
        self._events = ()

    async def _stored_together(self, some: list[Outgoing]) -> bool:
        """Whether one atomic batch took them: four flushes of the store instead of one for each message."""
        try:
            await self._bus.publish_together(some)
        except (DuplicateBatch, BusUnavailable):
            return False  # one of them was stored before, or is refused: that must not keep the others back
        return True

    async def _store_each(self, some: list[Outgoing]) -> None:
        results = await asyncio.gather(*(self._bus.publish(message) for message in some), return_exceptions=True)
        failed = [(m, r) for m, r in zip(some, results, strict=True) if isinstance(r, BaseException)]
        self._waiting[: len(some)] = [message for message, _ in failed]
        if failed:
            raise failed[0][1]


def _portion(waiting: Sequence[Outgoing]) -> list[Outgoing]:
    """The first messages, as many as go out at once."""
    some, size = list(waiting[:1]), len(waiting[0].data)
    for message in waiting[1:_TOGETHER]:
        size += len(message.data)
        if size > _TOGETHER_BYTES:
            break
        some.append(message)
    return some


def messages(events: Sequence[JsonMap], *, subjects: Subjects) -> Iterator[Outgoing]:
    """The messages for some events, in the order of each group's first event; a fact that was told twice is one."""
    groups: dict[tuple[object, ...], list[JsonMap]] = {}
    for key, run in groupby(events, key=_group_of):
        if key[0] in BATCHED_TYPES:
            groups.setdefault(key, []).extend(run)
        else:
            for fact in run:
                groups.setdefault((fact["id"],), [fact])
    for group in groups.values():
        for start in range(0, len(group), _MAX_EVENTS):
            yield from _fitting(group[start : start + _MAX_EVENTS], subjects)


def _group_of(event: JsonMap) -> tuple[object, ...]:
    return event["type"], event.get("job"), event["producer"]


def _fitting(events: list[JsonMap], subjects: Subjects) -> Iterator[Outgoing]:
    """One message, or several halves where one would be too large; an event that is too large alone loses its data.

    So does one that cannot be encoded: a single bad event must not hold up all others for ever.
    """
    try:
        yield _message(events, subjects)
    except WireError as exc:
        if len(events) == 1:
            why = "too_large" if isinstance(exc, MessageTooLarge) else "not_encodable"
            yield _message([{**events[0], "data": {why: str(exc)}}], subjects)
            return
        middle = len(events) // 2
        yield from _fitting(events[:middle], subjects)
        yield from _fitting(events[middle:], subjects)


def _message(events: list[JsonMap], subjects: Subjects) -> Outgoing:
    first = events[0]
    if len(events) == 1:
        return Outgoing(subject_of(first, subjects=subjects), wire.encode(first), str(first["id"]))
    data = wire.encode(batch_of(events))
    return Outgoing(subject_of(first, subjects=subjects), data, f"{first['id']}+{len(events) - 1}")


def subject_of(event: JsonMap, *, subjects: Subjects) -> str:
    """`<prefix>.evt.<area>.<id>.<what>`: the id is the job's, else that of what the event is about, else the source."""
    area, _, what = str(event["type"]).partition(".")
    data = event.get("data")
    about = data.get(area) if isinstance(data, dict) else None
    token = next((t for t in map(_token, (event.get("job"), about, event["source"])) if t), "unknown")
    return subjects.event(area, token, what.replace(".", "_"))


def _token(value: object) -> str:
    """A name as a token of a subject; empty for what may not stand in one."""
    try:
        return key_token(checked_name(value)) if isinstance(value, str) else ""
    except InvalidName:
        return ""
