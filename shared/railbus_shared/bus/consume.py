"""Durable pull consumers. The branch of an error alone decides what becomes of a message, here and nowhere else.

- handled, `RejectedError`, `TaskError`: acknowledged, and the server confirms it
- `WireError`: terminated; whoever handles the message has recorded why
- `TransientError`, `ConfigError`: negatively acknowledged with a delay, so it comes again
- anything else is a bug: logged with its traceback, and it comes again later
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from railbus_shared.bus.client import MALFORMED
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.pull import pulled
from railbus_shared.errors import RailbusError, RejectedError, TaskError, WireError
from railbus_shared.logs import log_context
from railbus_shared.topology import Consumer
from railbus_shared.waiting import is_any_set_within

logger = logging.getLogger(__name__)

_RETRY_S: Final = 1.0
_BUG_RETRY_S: Final = 10.0
_BATCHES_HELD: Final = 4
_AT_ONCE: Final = 2  # one is written while the next one is decoded
_LEAST_S: Final = 0.001
_FADING: Final = 0.7  # with each batch, of the rate that was: one that comes late makes no thin stream


@dataclass(frozen=True)
class Delivery:
    """One message of a stream."""

    subject: str
    data: bytes
    headers: dict[str, str]
    sequence: int
    """In the stream."""
    delivered: int
    """How often it has been delivered, this time counted."""

    @property
    def is_malformed(self) -> bool:
        """Whether its headers could not be read."""
        return MALFORMED in self.headers


Handle = Callable[[list[Delivery]], Awaitable[Sequence[Exception | None]]]
"""Handles messages, in order, and returns for each what it was refused for or failed with; must be idempotent."""


async def consume(bus: Bus, consumer: Consumer, handle: Handle, *, stopping: asyncio.Event, batch: int = 1) -> None:
    """Hand over what is there, in order and at most `batch` messages at once, until `stopping` is set.

    What one process holds, no other can handle; so not more than is handled soon.
    """
    async with contextlib.aclosing(pulled(bus, consumer, stopping=stopping, limit=batch)) as pulls:
        async for messages in pulls:
            deliveries = [_delivery(message) for message in messages]
            errors = await _handled(handle, deliveries)
            outcomes = [_outcome(error, delivery) for error, delivery in zip(errors, deliveries, strict=True)]
            await _settle_all(bus, messages, outcomes)


async def consume_batches(
    bus: Bus,
    consumer: Consumer,
    handle: Callable[[list[Delivery]], Awaitable[bool]],
    *,
    stopping: asyncio.Event,
    batch: int = 256,
    batch_bytes: int | None = None,
    gap_s: Callable[[float], float] = lambda _: 0.0,
    hurry: asyncio.Event | None = None,
) -> None:
    """Hand messages over in batches and acknowledge each message of a batch, and no other.

    `handle` returns whether the batch is done with. If it is not, nothing is acknowledged, and the same messages come
    again when the consumer's `ack_wait` has passed; `handle` must therefore know what it has done already. A message
    whose delivery was lost with a connection comes again in the same way, after younger ones. The next batch is handed
    over while one is still being handled, and no more; they begin in their order. Batches that are not full begin at
    least `gap_s` after one another, which is told how many bytes a second come, so that few messages make few batches;
    not while `hurry` is set. Of large messages fewer are handed over at once, `batch_bytes` but at least one, and no
    more than six times that is held.
    """
    reasons = (stopping,) if hurry is None else (stopping, hurry)
    loop = asyncio.get_running_loop()
    held_bytes = None if batch_bytes is None else _BATCHES_HELD * batch_bytes
    pulling = pulled(bus, consumer, stopping=stopping, limit=batch, limit_bytes=held_bytes)
    handling: collections.deque[asyncio.Task[None]] = collections.deque()
    former_s, rate = -math.inf, 0.0
    async with contextlib.aclosing(pulling) as pulls, asyncio.TaskGroup() as tasks:
        async for messages in pulls:
            began_s, is_full = loop.time(), len(messages) >= batch
            for some in _portions(messages, batch_bytes):
                is_full |= len(some) < len(messages)
                while len(handling) >= _AT_ONCE:
                    await asyncio.wait([handling.popleft()])
                handling.append(tasks.create_task(_done_with(bus, some, handle)))
            now_rate = sum(len(message.data) for message in messages) / max(began_s - former_s, _LEAST_S)
            rate = max(now_rate, _FADING * rate)
            former_s, rest_s = began_s, began_s + gap_s(rate) - loop.time()
            if not is_full and rest_s > 0:
                await is_any_set_within(reasons, rest_s)


async def _done_with(bus: Bus, messages: list[Msg], handle: Callable[[list[Delivery]], Awaitable[bool]]) -> None:
    if await handle([_delivery(message) for message in messages]):
        await _ack(bus, messages)


def _portions(messages: list[Msg], limit_bytes: int | None) -> Iterator[list[Msg]]:
    """The messages in their order, each portion no larger than that unless it is a single one."""
    some: list[Msg] = []
    size = 0
    for message in messages:
        size += len(message.data)
        if some and limit_bytes is not None and size > limit_bytes:
            yield some
            some, size = [], len(message.data)
        some.append(message)
    yield some


async def _handled(handle: Handle, deliveries: list[Delivery]) -> Sequence[Exception | None]:
    """What became of each message; after an error that is of none of them, they are handled one by one."""
    first, more = deliveries[0].sequence, len(deliveries) - 1
    try:
        with log_context(msg=f"{first}+{more}" if more else str(first)):
            return await handle(deliveries)
    except Exception as exc:  # noqa: BLE001 - `_outcome` tells errors and bugs apart
        if len(deliveries) == 1:
            return [exc]
        return [error for one in deliveries for error in await _handled(handle, [one])]


def _outcome(error: Exception | None, delivery: Delivery) -> float | None:
    """None: done with. A number: to come again after so many seconds. Negative: never again."""
    told = {"subject": delivery.subject, "sequence": delivery.sequence, "problem": str(error)}
    match error:
        case None:
            return None
        case WireError():
            logger.warning("message refused", extra={**told, "code": error.code})
            return -1.0
        case RejectedError() | TaskError():
            logger.info("message answered with a refusal", extra={**told, "code": error.code})
            return None
        case RailbusError():
            logger.warning("message to be tried again", extra={**told, "code": error.code})
            return _RETRY_S
        case _:  # a bug must not end the consumer, and the message must not be lost
            logger.error("bug while handling a message", extra=told, exc_info=error)
            return _BUG_RETRY_S


async def _settle_all(bus: Bus, messages: list[Msg], outcomes: list[float | None]) -> None:
    done = [message for message, outcome in zip(messages, outcomes, strict=True) if outcome is None]
    try:
        for message, outcome in zip(messages, outcomes, strict=True):
            match outcome:
                case None:
                    continue
                case delay if delay < 0:
                    await message.term()
                case delay:
                    await message.nak(delay=delay)
    except nats.errors.Error as exc:
        logger.info("not settled, so it will come again", extra={"problem": repr(exc), "bus": bus.problem})
    if done:
        await _ack(bus, done)


async def _ack(bus: Bus, messages: list[Msg]) -> None:
    """The server takes acknowledgements in their order, so the confirmation of the last one stands for all."""
    *others, last = messages
    try:
        for message in others:
            await message.ack()
        await last.ack_sync(timeout=2)
    except (nats.errors.Error, TimeoutError) as exc:
        logger.info("batch not acknowledged, so it will come again", extra={"problem": repr(exc), "bus": bus.problem})


def _delivery(message: Msg) -> Delivery:
    metadata = message.metadata
    return Delivery(
        subject=message.subject,
        data=bytes(message.data),
        headers=dict(message.headers or {}),
        sequence=int(metadata.sequence.stream),
        delivered=int(metadata.num_delivered or 1),
    )
