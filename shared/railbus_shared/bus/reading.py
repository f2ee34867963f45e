"""Reading a stream without a consumer: whoever reads leaves nothing on the server, and may be given no more than that.

Source: ADR-31, batched direct gets of nats-server 2.11.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BusUnavailable, NoResponder

_BATCH: Final = 256
_BATCH_BYTES: Final = 4 << 20
_TIMEOUT_S: Final = 3.0
_NO_RESPONDER: Final = "503"
_ENDS: Final = {"204", "404"}
"""All that was asked for has come; there is nothing."""


@dataclass(frozen=True)
class Stored:
    """One message of a stream."""

    sequence: int
    subject: str
    data: bytes


async def stored_after(bus: Bus, stream: str, subject: str, sequence: int) -> list[Stored]:
    """The next messages of a stream on a subject, which may hold wildcards, in their order; none if there are none yet.

    Each call has an inbox of its own: nats-server keeps the way of an answer to another account until nobody listens at
    its end any more (1.4 kB each).
    Raises RequestTimeout, NoResponder, BusUnavailable, NotAuthorized.
    """
    wanted = {"seq": sequence + 1, "batch": _BATCH, "max_bytes": _BATCH_BYTES, "next_by_subj": subject}
    inbox = bus.client.new_inbox()
    asked = f"$JS.API.DIRECT.GET.{stream}"
    async with bus.asking(asked, name=stream):
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        subscription = await bus.client.subscribe(inbox, cb=answers.put)
        try:
            await bus.client.publish(asked, json.dumps(wanted).encode(), reply=inbox)
            return await _collected(stream, answers)
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()


async def _collected(stream: str, answers: asyncio.Queue[Msg]) -> list[Stored]:
    """`Subscription.next_msg` of nats-py may lose the cancellation of whoever waits in it."""
    found: list[Stored] = []
    while True:
        async with asyncio.timeout(_TIMEOUT_S):
            answer = await answers.get()
        headers = answer.headers or {}
        status = headers.get("Status")
        if status in _ENDS:
            return found
        if status == _NO_RESPONDER:
            raise NoResponder(f"stream {stream!r} cannot be read: nobody has it")
        if status is not None:
            raise BusUnavailable(f"stream {stream!r} cannot be read: status {status}")
        found.append(Stored(int(headers["Nats-Sequence"]), headers["Nats-Subject"], bytes(answer.data)))
