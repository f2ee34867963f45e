"""A nats-py client that no publisher can deafen or turn against us, and the errors of nats-py as errors of ours."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import nats.errors
import nats.js.errors
from nats.aio.client import PING_PROTO, Client, Srv
from nats.aio.msg import Msg

from railbus_shared.bus.payloads import READ_BYTES, LargePayloads, LargeReads
from railbus_shared.errors import (
    BadMessage,
    BusUnavailable,
    NoResponder,
    NotAuthorized,
    NotFound,
    QueueFull,
    RailbusError,
    RequestTimeout,
    RevisionConflict,
    StorageFull,
    TransientError,
)
from railbus_shared.subjects import is_inbox

logger = logging.getLogger(__name__)

MALFORMED: Final = "Railbus-Malformed-Headers"
"""Set on a message whose headers could not be parsed."""

QUICK_S: Final = 0.25
"""Between two attempts to connect to a server."""
_QUICK_ATTEMPTS: Final = 20
"""Before they become rarer: those of the first five seconds, in which a restart is over."""
_RARE_S: Final = 1.0
"""Between two of the later ones: each costs a millisecond of CPU, and whoever follows may do so for days."""
_WRONG_LAST_SEQUENCE: Final = {10071, 10164}
_STATUS: Final = "Status"
_STORAGE_FULL: Final = {10023, 10047}
_QUEUE_FULL: Final = {10077}
_DUPLICATE: Final = {10201}


class DuplicateBatch(TransientError):
    """A message of an atomic batch has been stored before, so that none of it was stored now."""


class RailbusClient(Client):
    """nats-py 2.16, without three ways in which any publisher could harm whoever reads its messages.

    An exception while a message is taken in, for its headers or for a subject that is not UTF-8, ends its read loop.
    A stored message whose headers look like a status of the server makes every fetch fail. And its own answers on
    `$SRV.*` go to any reply subject, with the asker's headers, so that they could overwrite a key.

    A server that offers no TLS where the URL wants it is refused; nats-py would talk to it in the open. Other servers
    that a server names are dialled over TLS only, unless the client `may_roam`.

    Large payloads are copied less often on their way in, and by `publish_parts` on their way out.
    """

    def __init__(self, *, needs_tls: bool = False, may_roam: bool = False) -> None:
        super().__init__()
        self._needs_tls = needs_tls
        self._may_roam = may_roam or needs_tls
        self._ps = LargePayloads(self)

    async def _connect_to_server(self, s: Srv) -> None:
        if s.uri.scheme in {"ws", "wss"}:
            await super()._connect_to_server(s)
            return
        if not isinstance(self._transport, LargeReads):
            self._transport = LargeReads()
        s.last_attempt = time.monotonic()
        self.options["reconnect_time_wait"] = QUICK_S if s.reconnects < _QUICK_ATTEMPTS else _RARE_S
        await self._transport.connect(s.uri, READ_BYTES, self.options["connect_timeout"])

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if isinstance(self._transport, LargeReads):
            self._transport.end()
        await super()._close(status, do_cbs)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self._needs_tls and initial_connection and not info.get("tls_required"):
            raise nats.errors.Error("the server offers no TLS")
        if not self._may_roam:
            info.pop("connect_urls", None)
        await super()._process_info(info, initial_connection)

    def take_seed(self, seed: str) -> None:
        """Show this nkey from the next connection on."""
        self._nkeys_seed_str = seed
        self._setup_nkeys_seed_connect()

    def is_own_inbox(self, subject: str) -> bool:
        """Whether whoever has this key listens there, and nobody else."""
        return is_inbox(subject) and subject.startswith(f"{self._inbox_prefix.decode()}.")

    def give_up(self) -> None:
        """Let a reconnect that goes on end with a closed connection."""
        self.options["max_reconnect_attempts"] = 1  # it counts those of the past, too

    async def publish_parts(self, subject: str, *parts: bytes | memoryview) -> None:
        """Publish parts as one payload, without copying them: they must stay as they are until they have been sent.

        Raises what `publish` does; the subject is not looked at.
        """
        if not self.is_connected:
            raise nats.errors.ConnectionClosedError
        size = sum(map(len, parts))
        if size > self._max_payload:
            raise nats.errors.MaxPayloadError
        head = f"PUB {subject}  {size}\r\n".encode()
        pending: list[bytes | memoryview] = self._pending  # type: ignore[assignment]  # written to a socket, no more
        pending += (head, *parts, b"\r\n")  # at once: nothing may come between the parts
        self._pending_data_size += len(head) + size + 2
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += size
        if self._pending_data_size > self._max_pending_size:
            await self._flush_pending(force_flush=True)
        elif self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except Exception:  # the read loop must outlive every message
            logger.exception("message lost", extra={"subject": repr(subject[:80])})

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """Behind all that waits to be sent: nats-py writes it ahead of that, and `flush` then confirms nothing."""
        if not self.is_connected:
            await super()._send_ping(future)
            return
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        """Taken also where nobody waits for it any more: the exception would end the read loop."""
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except (ValueError, IndexError, UnicodeError) as exc:
            logger.warning("malformed headers", extra={"problem": repr(exc), "bytes": len(headers)})
            return {MALFORMED: "1"}
        return parsed

    def _build_message(  # pyright: ignore[reportIncompatibleMethodOverride] - its caller checks for None
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg | None:
        if reply.startswith(b"$JS.ACK.") and headers and _STATUS in headers:  # the server's own have no such reply
            headers.clear()  # in place: the caller looks at them too
            headers[MALFORMED] = "1"
        if subject.startswith(b"$SRV."):
            headers = None
            if not is_inbox(reply.decode("ascii", "replace")):
                logger.warning("request refused: its reply subject is not an inbox", extra={"reply": repr(reply[:80])})
                return None
        built: Msg | None = super()._build_message(sid, _utf8(subject), _utf8(reply), data, headers)
        return built


def _utf8(subject: bytes) -> bytes:
    """A subject as nats-py can decode it."""
    return subject if subject.isascii() else subject.decode("utf-8", "replace").encode()


@contextmanager
def bus_errors(subject: str) -> Iterator[None]:
    """Translate what nats-py raises into errors of ours, naming the subject."""
    try:
        yield
    except RailbusError:
        raise
    except (nats.errors.Error, TimeoutError, OSError, ValueError) as exc:
        raise translated(exc, subject=subject) from exc


def translated(exc: Exception, *, subject: str) -> RailbusError:
    """The error of ours that says what an exception of nats-py means."""
    match exc:
        case nats.js.errors.APIError():
            return _api_error(exc, subject)
        case nats.errors.NoRespondersError() | nats.js.errors.NoStreamResponseError():
            return _no_responder(exc, subject)
        case nats.errors.AuthorizationError():
            return NotAuthorized("NATS refused the credentials", hint="check RAILBUS_NATS_KEY_FILE")
        case nats.errors.BadSubjectError():
            return BadMessage(f"{subject!r} is not a subject", hint="use tokens joined by dots")
        case TimeoutError():
            return RequestTimeout(f"no answer from {subject!r} in time", hint="whether it was carried out is unknown")
        case _:
            return BusUnavailable(
                f"NATS cannot carry {subject!r}: {exc or type(exc).__name__}", hint="is NATS running?"
            )


def _no_responder(exc: Exception, subject: str) -> NoResponder:
    if isinstance(exc, nats.js.errors.NoStreamResponseError):
        return NoResponder(f"no stream takes {subject!r} now", hint="a cluster of NATS may be electing a leader")
    return NoResponder(f"nobody serves {subject!r}", hint="start the service, for instance with `railbus up`")


def _api_error(exc: nats.js.errors.APIError, subject: str) -> RailbusError:
    code = exc.err_code or 0
    text = f"JetStream refused {subject!r}: {exc.description} ({code})"
    if code in _WRONG_LAST_SEQUENCE:
        return RevisionConflict(text)
    if code in _STORAGE_FULL:
        return StorageFull(text, hint="free space, or raise the server's max_file_store")
    if code in _QUEUE_FULL:
        return QueueFull(text, hint="wait until messages are consumed, or raise the limit")
    if code in _DUPLICATE:
        return DuplicateBatch(text)
    if exc.code == 404:
        return NotFound(text)
    return BusUnavailable(text)
