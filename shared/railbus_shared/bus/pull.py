"""Pulling messages of a durable consumer: an answer comes at once, with all that is there, and waits for no company.

Asked with both `no_wait` and `expires`, nats-server 2.12 waits for the first message, gives it with all others that
are there, and ends the request. nats-py knows no such fetch: it may hold a message back until a second one comes or the
time is over, and asks again every second where nothing comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from railbus_shared.bus.connection import Bus
from railbus_shared.topology import Consumer
from railbus_shared.waiting import is_any_set_within, is_set_within

logger = logging.getLogger(__name__)

_EXPIRES_S: Final = 30.0
_LATE_S: Final = 3.0  # until a request is given up whose end the server has not told
_RETRY_S: Final = 1.0
_PAUSE_S: Final = 0.25
_COMPANY_S: Final = 0.1  # for the end of a request that has brought messages; it comes with them
_DRAIN_S: Final = 2.0
_STATUS: Final = "Status"
_HEARTBEAT: Final = "100"
_ENDS: Final = {"404", "408"}
"""There are no more messages now; the request has run out."""


async def pulled(
    bus: Bus, consumer: Consumer, *, stopping: asyncio.Event, limit: int
) -> AsyncGenerator[list[Msg], None]:
    """Non-empty lists of messages, some `limit` at most, until `stopping` is set; survives restarts of the server.

    What comes while it stops is handed back, for whoever else consumes.
    """
    mailbox = _Mailbox(stopping, limit)
    bus.on_connection(mailbox.connection_changed)
    while not stopping.is_set():
        mailbox.clear()
        if not bus.is_connected:
            await is_any_set_within((stopping, mailbox.news), _PAUSE_S)
            continue
        try:
            async with contextlib.aclosing(_while_connected(bus, consumer, mailbox)) as batches:
                async for messages in batches:
                    yield messages
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            logger.warning("cannot fetch", extra={"consumer": consumer.name, "problem": repr(exc)})
            await is_any_set_within((stopping,), _RETRY_S)


async def _while_connected(bus: Bus, consumer: Consumer, mailbox: _Mailbox) -> AsyncGenerator[list[Msg], None]:
    client, inbox = bus.client, bus.client.new_inbox()
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}"
    request = json.dumps({"batch": mailbox.limit, "no_wait": True, "expires": int(_EXPIRES_S * 1e9)}).encode()
    subscription = await client.subscribe(inbox, cb=mailbox.put)
    try:
        while not mailbox.is_cut and not mailbox.stopping.is_set():
            await client.publish(subject, request, reply=inbox)
            messages = await mailbox.next_messages()
            if messages:
                yield messages
            else:
                await is_any_set_within((mailbox.stopping,), _PAUSE_S)  # in case the server keeps on saying no
        if bus.is_connected:
            async with asyncio.timeout(_DRAIN_S):
                await subscription.drain()  # type: ignore[no-untyped-call]
            for message in mailbox.take():
                await message.nak()
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()


class _Mailbox:
    """What comes in answer to pull requests, one after the other."""

    def __init__(self, stopping: asyncio.Event, limit: int) -> None:
        self.stopping = stopping
        self.limit = limit
        self.news = asyncio.Event()
        self.is_cut = False
        """Whether the connection has changed, so that no answer comes any more."""
        self._messages: list[Msg] = []
        self._status = ""

    def connection_changed(self, _: bool) -> None:
        self.is_cut = True
        self.news.set()

    async def put(self, message: Msg) -> None:
        status = (message.headers or {}).get(_STATUS, "") if not message.reply else ""
        if status == _HEARTBEAT:
            return
        if status:
            self._status = status
        else:
            self._messages.append(message)
        if status or len(self._messages) in {1, self.limit}:
            self.news.set()

    def clear(self) -> None:
        """Forget what came over an earlier connection: the server delivers it again."""
        self.take()
        self.is_cut = False

    def take(self) -> list[Msg]:
        """All messages that have come; the next request begins anew."""
        taken, self._messages, self._status = self._messages, [], ""
        self.news.clear()
        return taken

    async def next_messages(self) -> list[Msg]:
        """What one request brings, none if it ends without any; raises if the server refuses such requests."""
        await is_any_set_within((self.news, self.stopping), _EXPIRES_S + _LATE_S)
        while self._messages and not self._is_complete:
            self.news.clear()
            if not await is_set_within(self.news, _COMPANY_S):
                break
        if self.stopping.is_set():
            return []  # `take` hands them back
        status = self._status
        messages = self.take()
        if status and status not in _ENDS and not messages:
            raise nats.errors.Error(f"the server refuses pull requests with status {status}")
        return messages

    @property
    def _is_complete(self) -> bool:
        return bool(self._status) or self.is_cut or len(self._messages) >= self.limit or self.stopping.is_set()
