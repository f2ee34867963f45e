"""Bulk bytes from one process to another: in order, checked, and no faster than the receiver takes them.

A chunk is one message in an inbox of the receiver: eight bytes that tell its offset in the file (little endian), then
the bytes that stand there. A chunk without bytes is a sign of life. A message with an error code in its headers, as in
any answer, says that the sender gives up, and why.

The receiver grants credit: the offset up to which it takes more. It is absolute, so a grant that is lost or comes twice
does no harm, and the sender holds at most what was granted in memory, however slow the receiver is.

NATS may lose any of this in silence, so neither end relies on it: the receiver looks at each offset, both ends give up
after silence or a reconnect, and the receiver asks anew from where it is. Both use a connection of their own for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from railbus_shared import wire
from railbus_shared.bus.client import MALFORMED, bus_errors
from railbus_shared.bus.connection import ERROR_CODE_HEADER, Bus
from railbus_shared.contracts.requests import GrantCredit
from railbus_shared.errors import (
    BadMessage,
    RailbusError,
    TransferBroken,
    UnsafeReply,
    WireError,
    shorten,
)
from railbus_shared.subjects import is_inbox

CHUNK_BYTES: Final = 508 * 1024
"""Of data: whole pages, and with its offset a little under the payload limit of the bus."""

_OFFSET: Final = struct.Struct("<Q")
_POLL_S: Final = 0.5
"""Between two looks at whether the connection is still the one that the transfer began on."""


@dataclass(frozen=True)
class Chunk:
    """Some bytes of a file."""

    offset: int
    data: memoryview


# --- the receiver ----------------------------------------------------------------------------------------------------


class ChunkReceiver:
    """The chunks of one file, as they arrive in an inbox of their own. Made by `receiving`."""

    def __init__(self, bus: Bus, subject: str, arrived: asyncio.Queue[Msg]) -> None:
        self.subject = subject
        self._bus = bus
        self._generation = bus.generation
        self._arrived = arrived

    async def next(self, timeout_s: float) -> Chunk:
        """The next chunk, whatever its offset.

        Raises TransferBroken after so many seconds of silence, after a reconnect, and if the sender gives up, and
        BadMessage for what is no chunk.
        """
        deadline = time.monotonic() + timeout_s
        while self._arrived.empty():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TransferBroken(f"nothing arrived for {timeout_s:g} s", hint="it is asked for again")
            self._check_connection()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _POLL_S)):
                    return _chunk(await self._arrived.get())
        return _chunk(self._arrived.get_nowait())

    def at_hand(self) -> int:
        """How many chunks `next` would give without waiting."""
        return self._arrived.qsize()

    async def grant(self, subject: str, up_to: int, *, done: bool = False) -> None:
        """Tell the sender how far it may go, or that it may stop; raises BusUnavailable, UnsafeReply."""
        if not is_inbox(subject):
            raise UnsafeReply(f"credit was asked for at {shorten(subject)}, which is no inbox")
        await self._bus.send(subject, wire.encode(GrantCredit(up_to=up_to, done=done).to_map()))

    def _check_connection(self) -> None:
        if self._bus.generation != self._generation or not self._bus.is_connected:
            raise TransferBroken("the connection to NATS was cut", hint="it is asked for again")


@contextlib.asynccontextmanager
async def receiving(bus: Bus, *, window_bytes: int) -> AsyncIterator[ChunkReceiver]:
    """An inbox for the chunks of one file; holds at most twice the window, whatever is sent there."""
    arrived: asyncio.Queue[Msg] = asyncio.Queue(max(2, window_bytes // CHUNK_BYTES))
    subject = bus.client.new_inbox()
    with bus_errors(subject):
        subscription = await bus.client.subscribe(
            subject, cb=arrived.put, pending_bytes_limit=window_bytes + CHUNK_BYTES
        )
    try:
        yield ChunkReceiver(bus, subject, arrived)
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()


def _chunk(message: Msg) -> Chunk:
    headers = message.headers or {}
    if ERROR_CODE_HEADER in headers:
        error = wire.decode(message.data)
        raise TransferBroken(f"the sender gave up: {shorten(error.get('message', error.get('code')), limit=300)}")
    if MALFORMED in headers or len(message.data) < _OFFSET.size:
        raise BadMessage(f"a message of {len(message.data)} bytes is no chunk", hint="another source is asked")
    (offset,) = _OFFSET.unpack_from(message.data)
    return Chunk(offset, memoryview(message.data)[_OFFSET.size :])


# --- the sender ------------------------------------------------------------------------------------------------------


class ChunkSender:
    """Sends the chunks of one file into an inbox. Made by `sending`."""

    def __init__(self, bus: Bus, to: str, *, credit_subject: str) -> None:
        self.credit_subject = credit_subject
        self._bus = bus
        self._to = to
        self._generation = bus.generation
        self._granted = 0
        self._is_done = False
        self._told = asyncio.Event()

    async def credit_up_to(self, offset: int, *, timeout_s: float) -> int:
        """Wait until the receiver takes the bytes before `offset`; the offset up to which it takes them.

        Raises TransferBroken if it has left, if it says nothing for so long, and after a reconnect.
        """
        deadline = time.monotonic() + timeout_s
        while self._granted < offset:
            self._check_wanted()
            if time.monotonic() >= deadline:
                raise TransferBroken(f"the receiver granted nothing for {timeout_s:g} s")
            self._told.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_POLL_S, max(deadline - time.monotonic(), 0))):
                    await self._told.wait()
        return self._granted

    async def send(self, offset: int, data: bytes | memoryview) -> None:
        """Send one chunk of at most CHUNK_BYTES; without bytes it is a sign of life.

        The bytes are not copied: they must stay as they are until the receiver grants more than a window beyond them.
        Raises TransferBroken if the receiver has left, and after a reconnect.
        """
        self._check_wanted()
        await self._bus.send_parts(self._to, _OFFSET.pack(offset), data)

    async def give_up(self, error: RailbusError) -> None:
        """Tell the receiver why nothing more will come."""
        await self._bus.send(self._to, wire.encode(error.to_wire()), headers={ERROR_CODE_HEADER: str(error.status)})

    def grant(self, up_to: int) -> None:
        """More credit; less than before changes nothing."""
        self._granted = max(self._granted, up_to)
        self._told.set()

    async def told(self, message: Msg) -> None:
        """What has come to the credit subject; anything but a grant is passed over."""
        with contextlib.suppress(WireError):
            credit = GrantCredit.parse(wire.decode(message.data))
            self._is_done = self._is_done or credit.done
            self.grant(credit.up_to)

    def _check_wanted(self) -> None:
        if self._is_done:
            raise TransferBroken("the receiver takes no more")
        if self._bus.generation != self._generation or not self._bus.is_connected:
            raise TransferBroken("the connection to NATS was cut")


@contextlib.asynccontextmanager
async def sending(bus: Bus, to: str) -> AsyncIterator[ChunkSender]:
    """A sender into an inbox, which hears of credit from now on; raises UnsafeReply if `to` is no inbox."""
    if not is_inbox(to):
        raise UnsafeReply(f"the subject {shorten(to)} for the bytes is not an inbox", hint="use a fresh inbox")
    sender = ChunkSender(bus, to, credit_subject=bus.client.new_inbox())
    with bus_errors(sender.credit_subject):
        subscription = await bus.client.subscribe(sender.credit_subject, cb=sender.told)
        await bus.client.flush()  # the server must know of it before the receiver does
    try:
        yield sender
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()
