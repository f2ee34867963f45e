"""One supervised connection to NATS.

`Bus.run` watches it and raises once it is closed for good. Everything that goes out passes the size limit; everything
that comes back is an error of ours or a decoded map.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import StreamState

from railbus_shared import tracing, wire
from railbus_shared.bus.access import (
    MAX_REFUSALS,
    Access,
    FileAccess,
    is_refusal,
    no_connection,
    show_again,
    unknown_key,
    urls_to_dial,
)
from railbus_shared.bus.client import QUICK_S, RailbusClient, bus_errors
from railbus_shared.bus.duplicates import stored_at
from railbus_shared.bus.refusals import Refusals
from railbus_shared.errors import (
    BusUnavailable,
    MessageTooLarge,
    RequestTimeout,
    StorageFull,
    TransientError,
    error_from_wire,
)
from railbus_shared.settings import CommonSettings, uses_tls
from railbus_shared.subjects import SERVICE_INBOX, USER_INBOX, Subjects
from railbus_shared.topology import Consumer
from railbus_shared.waiting import end, heeding_cancellation, is_set_within

logger = logging.getLogger(__name__)

_AT_ONCE: Final = 0.0  # on the clock of the event loop
_PING_S: Final = 3
_WATCH_S: Final = 2.0
_PUBLISH_TIMEOUT_S: Final = 3.0
ERROR_HEADER: Final = "Nats-Service-Error"
ERROR_CODE_HEADER: Final = "Nats-Service-Error-Code"


class BusClosed(TransientError):
    """The connection has closed for good; the process must end and be started again (exit status 70)."""


@dataclass(frozen=True)
class Outgoing:
    """A message for a stream. Its id makes a repeated publish harmless within the stream's duplicate window."""

    subject: str
    data: bytes
    msg_id: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def all_headers(self) -> dict[str, str]:
        return {**self.headers, **({"Nats-Msg-Id": self.msg_id} if self.msg_id else {})}


class Bus:
    """A connection, and what goes over it. Made by `Bus.open`."""

    def __init__(self, settings: CommonSettings, *, name: str, inbox: str, access: Access | None = None) -> None:
        self.subjects = Subjects(settings.subject_prefix)
        self.name = name
        self.generation = 0
        """Raised at every reconnect; a watch of an older generation must begin anew."""
        self.incarnation = ""
        """Of the store; set once the topology has been ensured."""
        self.problem = "not connected yet"
        """The last error of the connection, for /readyz."""
        self.storage_problem = ""
        """Why the last write into a stream failed, if it did for want of space or of an answer; for /readyz."""
        self._settings = settings
        self._access = access or FileAccess(settings)
        self._inbox = inbox
        self._client = RailbusClient(needs_tls=uses_tls(settings.nats_url), may_roam=settings.insecure)
        self._num_refused = 0
        self._is_unproven = False
        self._refusals = Refusals()
        self._closed = asyncio.Event()
        self._connecting: asyncio.Timeout | None = None
        self._on_connection: list[Callable[[bool], None]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: CommonSettings, *, name: str, service: bool = False) -> AsyncIterator[Self]:
        """Connect, and close at the end.

        A service's inboxes lie under `_RINBOX.<name>`, a person's under `_INBOX`.
        Raises BusUnavailable, NotAuthorized, InsecureUrl, BadSetting.
        """
        bus = cls(settings, name=name, inbox=f"{SERVICE_INBOX}.{name}" if service else USER_INBOX)
        await bus.connect()
        try:
            yield bus
        finally:
            await bus.close()

    @property
    def is_connected(self) -> bool:
        """Whether messages go through as far as this end can tell; the reader's task counts, not only the flag."""
        reader = self._client._reading_task  # noqa: SLF001 - nats-py has no other sign of a dead reader
        return bool(self._client.is_connected) and reader is not None and not reader.done()

    @property
    def is_clustered(self) -> bool:
        """Whether the server is a node of a cluster: what one node says may then be older than what another does."""
        return bool(self._client._server_info.get("cluster"))  # noqa: SLF001 - nats-py does not tell

    @property
    def replicas(self) -> int:
        """Copies that are wanted of each stream."""
        return self._settings.replicas

    @property
    def client(self) -> RailbusClient:
        """The nats-py client; for this package only."""
        return self._client

    def on_connection(self, listener: Callable[[bool], None]) -> Callable[[], None]:
        """Call `listener` with True after a reconnect and with False after a loss, until what is returned is called."""
        self._on_connection.append(listener)
        return lambda: self._on_connection.remove(listener)

    async def connect(self) -> None:
        """One attempt, bounded by `connect_timeout_s`; raises BusUnavailable or NotAuthorized."""
        settings = self._settings
        connecting = asyncio.ensure_future(
            self._client.connect(
                urls_to_dial(settings),
                name=self.name,
                nkeys_seed_str=self._access.seed(),
                inbox_prefix=self._inbox.encode(),
                error_cb=self._error,
                disconnected_cb=self._disconnected,
                reconnected_cb=self._reconnected,
                closed_cb=self._was_closed,
                ping_interval=_PING_S,
                max_outstanding_pings=2,
                max_reconnect_attempts=-1,
                reconnect_time_wait=QUICK_S,  # type: ignore[arg-type]  # it only ever sleeps this long
                connect_timeout=2,
                drain_timeout=5,
                flush_timeout=5.0,
                tls=self._access.trusted(),
            )
        )
        try:
            async with asyncio.timeout(settings.connect_timeout_s) as self._connecting:
                await asyncio.wait([connecting])
            await connecting
        except TimeoutError as exc:
            await end(connecting)
            await self._give_up()
            raise no_connection(settings.nats_url, self.problem, is_unproven=self._is_unproven) from exc
        finally:
            self._connecting = None
            await end(connecting)
        self.problem = ""

    async def close(self) -> None:
        """Send what is buffered and close; never raises for a connection that is gone already."""
        self._closed.clear()
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            if self._client.is_connected:
                await self._client.flush(timeout=2)
        await self._give_up()

    async def run(self) -> None:
        """Watch the connection until cancelled; raises BusClosed once it is closed for good, NotAuthorized if so."""
        while True:
            if await is_set_within(self._closed, _WATCH_S):
                self._need_key()
                raise BusClosed(f"the connection to NATS is closed: {self.problem}", hint="the process starts anew")
            if self._client.is_connected and not self.is_connected:
                logger.error("reader of the connection is dead", extra={"problem": self.problem})
                await self._client.force_reconnect()

    # --- requests ----------------------------------------------------------------------------------------------------

    async def request(
        self, subject: str, message: Mapping[str, object], *, timeout_s: float = 5.0
    ) -> dict[str, object]:
        """Ask a service and return its answer.

        Raises what the service answered, NoResponder, RequestTimeout, BusUnavailable or NotAuthorized.
        """
        trace = tracing.current.get()
        headers = {tracing.HEADER: trace} if trace is not None else None
        async with self.asking(subject):
            reply: Msg = await self._client.request(subject, wire.encode(message), timeout=timeout_s, headers=headers)
        body = wire.decode(reply.data) if reply.data else {}
        if reply.headers and ERROR_CODE_HEADER in reply.headers:
            raise error_from_wire(body)
        return body

    async def send(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Publish without any acknowledgement: for answers in inboxes only."""
        if len(data) > wire.MAX_BYTES:
            raise MessageTooLarge(size_bytes=len(data), limit_bytes=wire.MAX_BYTES, subject=subject)
        with bus_errors(subject):
            await self._client.publish(subject, data, headers=dict(headers) if headers else None)

    async def send_parts(self, subject: str, *parts: bytes | memoryview) -> None:
        """As `send`, without copying: the parts must stay as they are until the receiver has them."""
        size = sum(map(len, parts))
        if size > wire.MAX_BYTES:
            raise MessageTooLarge(size_bytes=size, limit_bytes=wire.MAX_BYTES, subject=subject)
        with bus_errors(subject):
            await self._client.publish_parts(subject, *parts)

    @contextlib.asynccontextmanager
    async def inbox(self) -> AsyncIterator[tuple[str, Callable[[float], Awaitable[bytes]]]]:
        """A fresh inbox and a function that waits so many seconds for its next message, raising RequestTimeout."""
        subject = self._client.new_inbox()
        subscription = await self._client.subscribe(subject)

        async def next_message(timeout_s: float) -> bytes:
            try:
                message: Msg = await subscription.next_msg(timeout_s)
            except (TimeoutError, nats.errors.TimeoutError) as exc:
                raise RequestTimeout(f"nothing arrived in {subject!r} within {timeout_s} s") from exc
            return bytes(message.data)

        try:
            yield subject, next_message
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    # --- streams -----------------------------------------------------------------------------------------------------

    async def publish(self, message: Outgoing) -> int:
        """Store a message in its stream and return its sequence; durable when this returns.

        Raises RequestTimeout (it may have been stored: publish the same message again), BusUnavailable, QueueFull,
        RevisionConflict, MessageTooLarge.
        """
        if len(message.data) > wire.MAX_BYTES:
            raise MessageTooLarge(size_bytes=len(message.data), limit_bytes=wire.MAX_BYTES, subject=message.subject)
        self.need_connection(message.subject)
        return await self._stored(message.subject, message.data, message.all_headers())

    async def publish_together(self, messages: Sequence[Outgoing]) -> int:
        """Store messages of one stream all or none, in one atomic batch; returns the last sequence.

        Raises like `publish`; RevisionConflict if any of their expectations does not hold.
        Source: ADR-50, atomic batch publishing of nats-server 2.12.
        """
        if not messages:
            raise ValueError("publish_together needs at least one message")
        if len(messages) == 1:
            return await self.publish(messages[0])
        batch_id = secrets.token_hex(11)
        self.need_connection(messages[0].subject)
        *others, last = (
            (message, {**message.all_headers(), "Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(number)})
            for number, message in enumerate(messages, start=1)
        )
        for message, headers in others:
            await self.send(message.subject, message.data, headers=headers)
        message, headers = last
        return await self._stored(message.subject, message.data, {**headers, "Nats-Batch-Commit": "1"})

    async def _stored(self, subject: str, data: bytes, headers: dict[str, str]) -> int:
        """Publish into a stream and wait for its acknowledgement; remembers whether the store could take it."""
        try:
            async with self.asking(subject):
                ack = await self._client.jetstream().publish(subject, data, timeout=_PUBLISH_TIMEOUT_S, headers=headers)
                seq = await stored_at(self._client, ack, subject, data, headers, events=self.subjects.event_root)
        except (RequestTimeout, StorageFull) as exc:
            self.storage_problem = f"the last write failed: {exc.message}"
            raise
        self.storage_problem = ""
        return seq

    async def api(self, verb: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """A raw request to the JetStream API, for what nats-py has no method for."""
        subject, data = f"$JS.API.{verb}", json.dumps(body).encode() if body else b""
        async with self.asking(subject):
            reply: Msg = await self._client.request(subject, data, timeout=_PUBLISH_TIMEOUT_S)
        answer: dict[str, object] = json.loads(reply.data)
        return answer

    async def last_sequence(self, stream: str) -> int:
        """The sequence of the newest message of a stream; 0 if there never was one."""
        return int((await self._state(stream)).last_seq)

    async def newest(self, stream: str) -> int:
        """Like `last_sequence`, but 0 for a stream that holds no message now."""
        state = await self._state(stream)
        return int(state.last_seq) if state.messages else 0

    async def _state(self, stream: str) -> StreamState:
        async with self.asking(f"$JS.API.STREAM.INFO.{stream}", name=stream):
            return (await self._client.jetstream().stream_info(stream)).state

    async def acknowledged(self, consumer: Consumer) -> int:
        """The sequence up to which a consumer has acknowledged everything."""
        async with self.asking(f"$JS.API.CONSUMER.INFO.{consumer.stream}.{consumer.name}", name=consumer.name):
            info = await self._client.jetstream().consumer_info(consumer.stream, consumer.name)
        return int(info.ack_floor.stream_seq) if info.ack_floor is not None else 0

    async def check_jetstream(self) -> None:
        """Raises unless JetStream answers; for /readyz."""
        await self.api("INFO")

    @contextlib.asynccontextmanager
    async def asking(self, subject: str, *, name: str = "") -> AsyncIterator[None]:
        """Around a request, which fails at once while disconnected or for a key that may not ask; errors name it."""
        self.need_connection(name or subject)
        with heeding_cancellation(), bus_errors(name or subject):
            async with self._refusals.ending(subject):
                yield

    def need_connection(self, subject: str) -> None:
        """Fail at once while disconnected: what nats-py would buffer could be stored long after the caller gave up.

        Raises BusUnavailable, or NotAuthorized once the server knows the key no more.
        """
        self._need_key()
        if not self.is_connected:
            raise BusUnavailable(
                f"NATS is not connected, so {subject!r} cannot be reached: {self.problem or 'reconnecting'}",
                hint="it is retried once the connection is back",
            )

    def _need_key(self) -> None:
        if self._num_refused >= MAX_REFUSALS:
            raise unknown_key(self._settings.nats_url, self.problem)

    # --- callbacks of nats-py; they must never raise, or its tasks die ------------------------------------------------

    async def _error(self, exc: Exception) -> None:
        if self._connecting is not None and self._connecting.when() == _AT_ONCE:
            return  # what follows a refusal, such as a reset by the server, says less
        self.problem = str(exc) or type(exc).__name__
        self._is_unproven = isinstance(exc, ssl.SSLError)
        self._refusals.heard(self.problem)
        if self._connecting is not None and (is_refusal(self.problem) or self._is_unproven):
            self._connecting.reschedule(_AT_ONCE)  # nats-py would ask again and again; no answer will be another
        elif is_refusal(self.problem):
            self._num_refused += 1
            show_again(self._client, self._access)
            if self._num_refused >= MAX_REFUSALS:
                self._client.give_up()
                self._closed.set()
        logger.warning("bus error", extra={"problem": self.problem})

    async def _disconnected(self) -> None:
        self.problem = self.problem or "disconnected"
        self._tell(connected=False)

    async def _reconnected(self) -> None:
        self.generation += 1
        self._num_refused = 0
        self.problem = self.storage_problem = ""
        logger.info("reconnected to NATS", extra={"generation": self.generation})
        self._tell(connected=True)

    async def _was_closed(self) -> None:
        self._closed.set()

    def _tell(self, *, connected: bool) -> None:
        for listener in tuple(self._on_connection):
            listener(connected)

    async def _give_up(self) -> None:
        self._closed.clear()
        if not self._client.is_connected:  # it would be written into a closed transport, which uvloop refuses
            self._client._pending, self._client._pending_data_size = [], 0  # noqa: SLF001
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
            await self._client.close()
        reconnecting = self._client._reconnection_task  # noqa: SLF001 - its cancellation by `close` may be lost
        if reconnecting is not None:
            await end(reconnecting)
        with contextlib.suppress(TimeoutError, OSError):
            transport = self._client._transport  # noqa: SLF001 - left open by a `connect` that was cancelled
            if transport is not None:
                transport.close()  # type: ignore[no-untyped-call]
                async with asyncio.timeout(1):
                    await transport.wait_closed()  # type: ignore[no-untyped-call]
