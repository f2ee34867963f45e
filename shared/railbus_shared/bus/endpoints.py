"""Endpoints: requests answered by a NATS micro service, so that `nats micro ls|info|stats` shows them.

A handler takes a contract and returns one. Everything around it happens here: decoding, checking, answering in the
request's own encoding, errors as headers and body, and a report of whatever is no valid request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import nats.errors
import nats.micro
from nats.aio.msg import Msg
from nats.micro.request import Request
from nats.micro.service import Service as MicroService
from nats.micro.service import ServiceConfig

from railbus_shared import tracing, wire
from railbus_shared.bus.client import MALFORMED
from railbus_shared.bus.connection import ERROR_CODE_HEADER, ERROR_HEADER, Bus
from railbus_shared.contracts.model import Contract
from railbus_shared.errors import BadMessage, Internal, RailbusError, UnsafeReply, WireError, shorten
from railbus_shared.logs import log_context
from railbus_shared.metrics import Metrics, version
from railbus_shared.subjects import is_inbox

logger = logging.getLogger(__name__)

_IN_FLIGHT: Final = 64
_END_S: Final = 5.0
_SCHEMAS: Final = "https://railbus.dev/schema/v1"

Q = TypeVar("Q", bound=Contract)

Rejected = Callable[[str, bytes, RailbusError], None]
"""Told of every message that is no valid one: subject, payload, error."""


@dataclass(frozen=True)
class Endpoint(Generic[Q]):
    """One subject and who answers it."""

    name: str
    subject: str
    request: type[Q]
    handle: Callable[[Q], Awaitable[Contract]]
    may_wait: bool = False
    """Whether an answer may wait for what others do; it must not keep theirs from being served."""


AnyEndpoint = Endpoint[Any]  # a list of endpoints has no common request type; each is checked where it is made


@contextlib.asynccontextmanager
async def serving(
    bus: Bus, name: str, description: str, endpoints: list[AnyEndpoint], *, metrics: Metrics, rejected: Rejected
) -> AsyncIterator[None]:
    """Answer requests until left; then take no new ones and finish those in flight."""
    async with asyncio.TaskGroup() as tasks:
        micro: MicroService = await nats.micro.add_service(
            bus.client,
            ServiceConfig(name=f"railbus-{name.replace('_', '-')}", version=version(), description=description),
        )
        prompt, waiting = asyncio.Semaphore(_IN_FLIGHT), asyncio.Semaphore(_IN_FLIGHT)
        for endpoint in endpoints:
            server = _Server(bus, endpoint, metrics, rejected, waiting if endpoint.may_wait else prompt, tasks)
            await micro.add_endpoint(
                name=endpoint.name,
                subject=endpoint.subject,
                handler=server.take,
                metadata={
                    "request-schema": f"{_SCHEMAS}/{endpoint.request.__name__}",
                    "content-types": "application/msgpack, application/json",
                },
            )
            server.count_errors_in(micro)
        try:
            yield
        finally:
            await _end(micro)


async def _end(micro: MicroService) -> None:
    """Take no more requests, but those that have arrived; `micro.stop` alone would drop them unanswered."""
    with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):  # the connection may be gone, and with it all
        async with asyncio.timeout(_END_S):
            endpoints = micro._endpoints  # noqa: SLF001 - it offers no other way
            await asyncio.gather(*(one._subscription.drain() for one in endpoints if one._subscription))  # noqa: SLF001
            endpoints.clear()
            await micro.stop()


class _Server:
    """Serves one endpoint; requests run side by side, at most 64 in a process, and 64 of those that may wait."""

    def __init__(
        self,
        bus: Bus,
        endpoint: AnyEndpoint,
        metrics: Metrics,
        rejected: Rejected,
        slots: asyncio.Semaphore,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._bus = bus
        self._endpoint = endpoint
        self._metrics = metrics
        self._rejected = rejected
        self._slots = slots
        self._tasks = tasks
        self._stats: object = None

    def count_errors_in(self, micro: MicroService) -> None:
        """Our handlers never raise into nats-py, so errors are counted into its statistics by hand."""
        self._stats = micro._endpoints[-1]  # noqa: SLF001 - it offers no other way

    async def take(self, request: Request) -> None:
        """Called by nats-py, one request at a time: hands over to a task, waiting while all slots are taken."""
        await self._slots.acquire()
        self._tasks.create_task(self._serve(request._msg))  # noqa: SLF001 - the reply subject is not public

    async def _serve(self, message: Msg) -> None:
        started = time.perf_counter()
        code = "OK"
        try:
            tracing.current.set(_trace_of(message))
            with log_context(msg=message.reply or None):
                error = await self._answer(message)
                if error is not None:
                    code = error.code
                    self._note(message, error)
        finally:
            self._slots.release()
            self._metrics.requests.labels(self._endpoint.name, code).inc()
            self._metrics.request_seconds.labels(self._endpoint.name).observe(time.perf_counter() - started)

    async def _answer(self, message: Msg) -> RailbusError | None:
        """Answer one request; returns the error that was answered, if any."""
        data = bytes(message.data)
        if message.reply and not is_inbox(message.reply):
            return UnsafeReply(
                f"the reply subject {shorten(message.reply)} is not an inbox", hint="use an _INBOX subject"
            )
        encoding = wire.Encoding.JSON
        try:
            if data:
                encoding = wire.encoding_of(data)
            request = self._endpoint.request.parse(_decoded(message))
            answer = await self._endpoint.handle(request)
            await self._reply(message, wire.encode(answer.to_map(), encoding=encoding))
        except RailbusError as exc:
            await self._reply_error(message, exc, encoding)
            return exc
        except Exception:  # a bug in a handler must reach its caller as an answer and must not end the service
            logger.exception("bug in a handler", extra={"endpoint": self._endpoint.name})
            error = Internal("the service failed to handle the request", hint="see its log; this is a bug in railbus")
            await self._reply_error(message, error, encoding)
            return error
        return None

    async def _reply(self, message: Msg, data: bytes, headers: dict[str, str] | None = None) -> None:
        if message.reply:
            await self._bus.send(message.reply, data, headers=headers)

    async def _reply_error(self, message: Msg, error: RailbusError, encoding: wire.Encoding) -> None:
        text = error.message.encode("ascii", "replace").decode().replace("\r", " ").replace("\n", " ")[:200]
        headers = {ERROR_HEADER: text, ERROR_CODE_HEADER: str(error.status)}
        try:
            await self._reply(message, _error_body(error, encoding), headers)
        except RailbusError as exc:
            logger.warning("answer not delivered", extra={"endpoint": self._endpoint.name, "problem": str(exc)})

    def _note(self, message: Msg, error: RailbusError) -> None:
        self._metrics.rejected.labels(error.code).inc()
        if self._stats is not None:
            self._stats._num_errors += 1  # type: ignore[attr-defined]  # noqa: SLF001
            self._stats._last_error = error.code  # type: ignore[attr-defined]  # noqa: SLF001
        if isinstance(error, WireError):  # no request at all; what is one has its answer, and that is enough
            self._rejected(message.subject, bytes(message.data), error)


def _trace_of(message: Msg) -> str | None:
    """Of whoever asks, if it says so."""
    context = tracing.parsed((message.headers or {}).get(tracing.HEADER))
    return str(context) if context is not None else None


def _decoded(message: Msg) -> dict[str, object]:
    """The map in a request; no payload is the same as an empty map."""
    if MALFORMED in (message.headers or {}):
        raise BadMessage("the headers cannot be read", hint="send none, or valid ones")
    return wire.decode(bytes(message.data)) if message.data else {}


def _error_body(error: RailbusError, encoding: wire.Encoding) -> bytes:
    """An error as bytes; without its details if they cannot be said, for it must reach its caller."""
    try:
        return wire.encode(error.to_wire(), encoding=encoding)
    except WireError:
        bare = {"code": error.code, "message": shorten(error.message, limit=1000), "hint": shorten(error.hint)}
        return wire.encode(bare, encoding=encoding)
