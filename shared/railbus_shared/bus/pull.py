"""Pulling messages of a consumer: an answer comes at once, with all that is there, and waits for no company.

Asked with both `no_wait` and `expires`, nats-server 2.12 waits for the first message, gives it with all others that
are there, and ends the request. nats-py knows no such fetch: it may hold a message back until a second one comes or the
time is over, and asks again every second where nothing comes; its ordered consumers look four times a second whether
the server wants to slow down. A process that waits here does nothing at all for half a minute.

In a cluster a request that waits is lost with the node that leads its consumer, and nobody says so to a client of
another node. There the server is asked for a sign of life every three seconds, and asked anew when it gives none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Final

import nats.errors
import nats.js.api as js
from nats.aio.msg import Msg

from railbus_shared.bus.client import bus_errors
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BusUnavailable, TransientError
from railbus_shared.topology import Consumer
from railbus_shared.waiting import is_any_set_within, is_set_within

logger = logging.getLogger(__name__)

_EXPIRES_S: Final = 30.0
_BEAT_S: Final = 3.0
_SILENT_S: Final = 7.0  # two signs of life have not come
_LATE_S: Final = 3.0  # until a request is given up whose end the server has not told
_RETRY_S: Final = 1.0
_PAUSE_S: Final = 0.25
_COMPANY_S: Final = 0.1  # for the end of a request that has brought messages; it comes with them
_CLOSE_S: Final = 2.0
_UNUSED_S: Final = 90.0  # until the server forgets a consumer whose process has died
_TAIL_LIMIT: Final = 256
_STATUS: Final = "Status"
_DESCRIPTION: Final = "Description"
_EXCEEDS: Final = "MaxBytes"
"""Stands in the description of status 409 if the next message alone is larger than what was asked for."""
_HEARTBEAT: Final = "100"
_ENDS: Final = {"404", "408"}
"""There are no more messages now; the request has run out."""


async def pulled(
    bus: Bus, consumer: Consumer, *, stopping: asyncio.Event, limit: int, limit_bytes: int | None = None
) -> AsyncGenerator[list[Msg], None]:
    """Non-empty lists of messages, some `limit` and `limit_bytes` at most, until `stopping` is set.

    Survives restarts of the server and changes of a cluster's leader; raises NotFound if there is no such consumer.
    A single message that is larger than `limit_bytes` comes alone.
    What comes while it stops is handed back, for whoever else consumes.
    """
    while not stopping.is_set():
        if not bus.is_connected:
            await is_set_within(stopping, _PAUSE_S)
            continue
        try:
            async with _puller(
                bus, consumer.stream, consumer.name, stopping=stopping, limit=limit, limit_bytes=limit_bytes
            ) as puller:
                while (messages := await puller.next_messages()) is not None:
                    yield messages
                await puller.hand_back()
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            logger.warning("cannot fetch", extra={"consumer": consumer.name, "problem": repr(exc)})
            await is_set_within(stopping, _RETRY_S)
        except BusUnavailable as exc:
            logger.info("consumer without a leader", extra={"consumer": consumer.name, "problem": exc.message})
            await _check_exists(bus, consumer)
            await is_set_within(stopping, _RETRY_S)


async def _check_exists(bus: Bus, consumer: Consumer) -> None:
    """Raises NotFound for a consumer that is gone; one that has no leader now may have one soon."""
    with contextlib.suppress(TransientError), bus_errors(consumer.name):
        await bus.client.jetstream().consumer_info(consumer.stream, consumer.name)


class Tail:
    """A consumer of one's own, which acknowledges nothing, over one connection."""

    def __init__(self, puller: _Puller, *, num_pending: int) -> None:
        self.num_pending = num_pending
        """Messages that were there when it was made."""
        self._puller = puller

    async def next_messages(self) -> list[Msg] | None:
        """The next ones, in order and without gaps, once there are any; None after the connection has changed.

        Raises BusUnavailable if the server does not know the consumer any more.
        """
        with bus_errors("the consumer"):
            return await self._puller.next_messages()


@contextlib.asynccontextmanager
async def tailing(bus: Bus, stream: str, config: js.ConsumerConfig) -> AsyncIterator[Tail]:
    """A consumer with `config`'s filter and beginning; it is gone at the end, or soon after its process is.

    Raises BusUnavailable, RequestTimeout, NotFound.
    """
    name = f"tail-{secrets.token_hex(8)}"
    whole = replace(
        config, name=name, ack_policy=js.AckPolicy.NONE, mem_storage=True, num_replicas=1, inactive_threshold=_UNUSED_S
    )
    with bus_errors(stream):
        info = await bus.client.jetstream().add_consumer(stream, whole)
    try:
        async with _puller(bus, stream, name, stopping=asyncio.Event(), limit=_TAIL_LIMIT) as puller:
            yield Tail(puller, num_pending=int(info.num_pending or 0))
    finally:
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            if bus.is_connected:
                async with asyncio.timeout(_CLOSE_S):
                    await bus.client.jetstream().delete_consumer(stream, name)


@contextlib.asynccontextmanager
async def _puller(
    bus: Bus, stream: str, consumer: str, *, stopping: asyncio.Event, limit: int, limit_bytes: int | None = None
) -> AsyncIterator[_Puller]:
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
    puller = _Puller(bus, subject, stopping=stopping, limit=limit, limit_bytes=limit_bytes)
    forget = bus.on_connection(puller.connection_changed)
    try:
        with bus_errors(stream):
            await puller.open()
        yield puller
    finally:
        forget()
        await puller.close()


class _Puller:
    """Asks with one pull request after the other, over one connection."""

    def __init__(self, bus: Bus, subject: str, *, stopping: asyncio.Event, limit: int, limit_bytes: int | None) -> None:
        self._bus = bus
        self._subject = subject
        self._stopping = stopping
        self._limit = limit
        self._inbox = bus.client.new_inbox()
        self._patience_s = _EXPIRES_S + _LATE_S
        request = {"batch": limit, "no_wait": True, "expires": int(_EXPIRES_S * 1e9)}
        if limit_bytes is not None:
            request["max_bytes"] = limit_bytes  # the server ends the request, with 409, before the message beyond it
        if bus.is_clustered:
            request["idle_heartbeat"] = int(_BEAT_S * 1e9)
            self._patience_s = _SILENT_S
        self._request = json.dumps(request).encode()
        self._request_for_one = json.dumps({"batch": 1, "no_wait": True, "expires": request["expires"]}).encode()
        self._news = asyncio.Event()
        self._messages: list[Msg] = []
        self._status = ""
        self._exceeds = False
        """Whether the last request ended before a message that no request with a limit of bytes can bring."""
        self._is_cut = False

    async def open(self) -> None:
        self._subscription = await self._bus.client.subscribe(self._inbox, cb=self._put)

    async def close(self) -> None:
        with contextlib.suppress(nats.errors.Error):
            await self._subscription.unsubscribe()

    def connection_changed(self, _: bool) -> None:
        """No answer comes any more; what has come is still good."""
        self._is_cut = True
        self._news.set()

    async def next_messages(self) -> list[Msg] | None:
        """What comes next, at least one message; None once the connection has changed or all is to stop.

        Raises BusUnavailable if the server refuses such requests, or if a cluster gives no sign of life.
        """
        while not self._is_cut and not self._stopping.is_set():
            request = self._request_for_one if self._exceeds else self._request
            await self._bus.client.publish(self._subject, request, reply=self._inbox)
            messages = await self._answer()
            if messages:
                return messages
            if not self._is_cut and not self._exceeds:
                await is_set_within(
                    self._stopping, _PAUSE_S
                )  # in case the server keeps on saying that nothing is there
        return None

    async def hand_back(self) -> None:
        """Have the server give to others what has come since."""
        if self._is_cut or not self._bus.is_connected:
            return
        async with asyncio.timeout(_CLOSE_S):
            await self._subscription.drain()  # type: ignore[no-untyped-call]
        for message in self._taken():
            await message.nak()

    async def _put(self, message: Msg) -> None:
        status = (message.headers or {}).get(_STATUS, "") if not message.reply else ""
        if status == _HEARTBEAT:
            self._news.set()
            return
        if status:
            self._status = status
            self._exceeds = _EXCEEDS in (message.headers or {}).get(_DESCRIPTION, "")
        else:
            self._messages.append(message)
        if status or len(self._messages) in {1, self._limit}:
            self._news.set()

    async def _answer(self) -> list[Msg]:
        """What one request brings; none if it ends without any."""
        await self._something()
        while self._messages and not self._is_complete:
            self._news.clear()
            if not await is_set_within(self._news, _COMPANY_S):
                break
        if self._stopping.is_set():
            return []  # `hand_back` has them
        status = self._status
        messages = self._taken()
        if messages:
            self._exceeds = False
        if status and status not in _ENDS and not messages and not self._exceeds:
            raise BusUnavailable(f"NATS refuses to be asked by {self._subject!r}: status {status}")
        return messages

    async def _something(self) -> None:
        """Until anything but a sign of life has come, or for as long as the server may take."""
        while await is_any_set_within((self._news, self._stopping), self._patience_s):
            if self._messages or self._is_complete:
                return
            self._news.clear()
        if self._bus.is_clustered:
            raise BusUnavailable(f"NATS has fallen silent on {self._subject!r}", hint="it is asked anew")

    def _taken(self) -> list[Msg]:
        """All messages that have come; the next request begins anew."""
        taken, self._messages, self._status = self._messages, [], ""
        self._news.clear()
        if self._is_cut:
            self._news.set()
        return taken

    @property
    def _is_complete(self) -> bool:
        return bool(self._status) or self._is_cut or len(self._messages) >= self._limit or self._stopping.is_set()
