"""Durable pull consumers. The branch of an error alone decides what becomes of a message, here and nowhere else.

- handled, `RejectedError`, `TaskError`: acknowledged, and the server confirms it
- `WireError`: terminated; whoever handles the message has recorded why
- `TransientError`, `ConfigError`: negatively acknowledged with a delay, so it comes again
- anything else is a bug: logged with its traceback, and it comes again later
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from railbus_shared.bus.client import MALFORMED
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import RailbusError, RejectedError, TaskError, WireError
from railbus_shared.logs import log_context
from railbus_shared.topology import Consumer

logger = logging.getLogger(__name__)

_FETCH_S: Final = 1.0  # a fetch that is cancelled loses what it had received until ack_wait, so it is kept short
_RETRY_S: Final = 1.0
_BUG_RETRY_S: Final = 10.0

Subscription = JetStreamContext.PullSubscription


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


async def consume(
    bus: Bus, consumer: Consumer, handle: Callable[[Delivery], Awaitable[None]], *, stopping: asyncio.Event
) -> None:
    """Hand messages over one at a time, in order, until `stopping` is set.

    Fetched one at a time, too: where nats-py fetches several and only one comes, it may wait out the whole fetch for
    the others (every fifth submission was 0.1 to 0.6 s late); and what one process holds, no other can handle.
    """
    async with contextlib.aclosing(_fetches(bus, consumer, stopping=stopping, batch=1)) as fetches:
        async for messages in fetches:
            for message in messages:
                if stopping.is_set():
                    await _settle(bus, message, 0.0)  # for whoever else consumes, at once
                    continue
                with log_context(msg=str(message.metadata.sequence.stream)):
                    await _settle(bus, message, await _outcome(handle, _delivery(message)))


async def consume_batches(
    bus: Bus,
    consumer: Consumer,
    handle: Callable[[list[Delivery]], Awaitable[bool]],
    *,
    stopping: asyncio.Event,
    batch: int = 256,
) -> None:
    """Hand messages over in batches and acknowledge each message of a batch, and no other.

    `handle` returns whether the batch is done with. If it is not, nothing is acknowledged, and the same messages come
    again when the consumer's `ack_wait` has passed; `handle` must therefore know what it has done already. A message
    whose delivery was lost with a connection comes again in the same way, after younger ones.
    """
    async with contextlib.aclosing(_fetches(bus, consumer, stopping=stopping, batch=batch)) as fetches:
        async for messages in fetches:
            if await handle([_delivery(message) for message in messages]):
                await _ack(bus, messages)


async def _fetches(
    bus: Bus, consumer: Consumer, *, stopping: asyncio.Event, batch: int
) -> AsyncGenerator[list[Msg], None]:
    """Non-empty lists of messages; survives restarts of the server."""
    while not stopping.is_set():
        if not bus.is_connected:
            await asyncio.sleep(_RETRY_S / 4)
            continue
        try:
            generation = bus.generation
            async with _subscribed(bus, consumer) as subscription:
                while generation == bus.generation and not stopping.is_set():
                    messages: list[Msg] = []
                    with contextlib.suppress(TimeoutError):  # nothing to fetch
                        messages = await subscription.fetch(batch, timeout=_FETCH_S)
                    if messages:  # nats-py may also give an empty list
                        yield messages
        except (nats.errors.Error, OSError) as exc:
            logger.warning("cannot fetch", extra={"consumer": consumer.name, "problem": repr(exc)})
            await asyncio.sleep(_RETRY_S)


@contextlib.asynccontextmanager
async def _subscribed(bus: Bus, consumer: Consumer) -> AsyncGenerator[Subscription, None]:
    subscription = await bus.client.jetstream().pull_subscribe_bind(
        durable=consumer.name, stream=consumer.stream, pending_msgs_limit=4096
    )
    try:
        yield subscription
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()


async def _outcome(handle: Callable[[Delivery], Awaitable[None]], delivery: Delivery) -> float | None:
    """None: done with. A number: to come again after so many seconds. Negative: never again."""
    try:
        await handle(delivery)
    except WireError as exc:
        logger.warning("message refused", extra={"subject": delivery.subject, "code": exc.code, "problem": str(exc)})
        return -1.0
    except (RejectedError, TaskError) as exc:
        logger.info("message answered with a refusal", extra={"code": exc.code, "problem": str(exc)})
        return None
    except RailbusError as exc:
        logger.warning("message to be tried again", extra={"code": exc.code, "problem": str(exc)})
        return _RETRY_S
    except Exception:  # a bug must not end the consumer, and the message must not be lost
        logger.exception("bug while handling a message", extra={"subject": delivery.subject})
        return _BUG_RETRY_S
    return None


async def _settle(bus: Bus, message: Msg, outcome: float | None) -> None:
    try:
        match outcome:
            case None:
                await message.ack_sync(timeout=2)
            case delay if delay < 0:
                await message.term()
            case delay:
                await message.nak(delay=delay)
    except (nats.errors.Error, TimeoutError) as exc:
        logger.info("not acknowledged, so it will come again", extra={"problem": repr(exc), "bus": bus.problem})


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
