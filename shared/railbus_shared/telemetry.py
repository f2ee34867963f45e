"""LearningTelemetry: joins any process (a service, a trainer, a user's script) to structured logging and to the bus.

    with LearningTelemetry("preprocess").with_logging() as telemetry:      # a script: finds the running `railbus up`
        telemetry.event("rows_written", rows=1000)
        logging.getLogger(__name__).warning("three rows were empty")

Every process start is a producer with an id of its own, and counts its events without gaps: (producer, number) is an
event's key, and lets the telemetry service drop what arrives twice and see what is missing. Recording never blocks and
never fails; events wait in a bounded buffer while the bus is away, and what has to be given up is counted and said.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self, cast

from pydantic import JsonValue

from railbus_shared import clock, logs, wire
from railbus_shared.contracts.events import BATCHED_TYPES, EventKey, Severity
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import RailbusError, TransientError
from railbus_shared.layout import Layout
from railbus_shared.names import checked_id, this_host
from railbus_shared.settings import CommonSettings, load, running_bus
from railbus_shared.waiting import is_set_within

if TYPE_CHECKING:
    from railbus_shared.metrics import Metrics

logger = logging.getLogger(__name__)

_TYPE: Final = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+\Z")
_MAX_TYPE: Final = 64
_MAX_NESTING: Final = 16
_MAX_BATCHED: Final = 50_000
_MAX_FACTS: Final = 200_000
_FLUSH_S: Final = 0.2
_FULL: Final = 256
_RETRY_S: Final = 0.5
_SCRIPT_CLOSE_S: Final = 10.0


class Sink(Protocol):
    """Where events go."""

    async def send(self, events: Sequence[JsonMap]) -> None:
        """Returns once all are safe; raises TransientError if they are to be offered again, as they are."""


class About(NamedTuple):
    """What an event is about, where it is about anything."""

    job: str | None = None
    attempt: int | None = None
    lease_epoch: int | None = None
    step: int | None = None
    trace: str | None = None


class LearningTelemetry:
    """Builder and recorder of one producer."""

    def __init__(self, source: str, *, host: str | None = None, producer: str | None = None) -> None:
        self.source = checked_id(source, kind="source")
        self.host = host or this_host()
        self.producer = producer or new_producer(source, host=self.host)
        self.dropped: collections.Counter[str] = collections.Counter()
        self._said: collections.Counter[str] = collections.Counter()
        self._numbers = itertools.count(1)
        self._buffer: collections.deque[JsonMap] = collections.deque()
        self._sending = 0
        self._sink: Sink | None = None
        self._metrics: Metrics | None = None
        self._wake: Callable[[bool], None] = _nothing
        """Called after something was recorded, with whether it is not to wait."""
        self._script: _Script | None = None
        self._settings: CommonSettings | None = None

    # --- building ----------------------------------------------------------------------------------------------------

    def with_logging(self, *, level: str = "info", event_level: str = "info") -> Self:
        """Log JSON lines to stderr, and make events (`log.line`) of records from `event_level` on."""
        logs.configure(self.source, level=level)
        handler = _EventHandler(self)
        handler.setLevel(event_level.upper())
        logging.getLogger().addHandler(handler)
        return self

    def with_sink(self, sink: Sink, *, metrics: Metrics | None = None) -> Self:
        """Send events to `sink`; `run` must then be running."""
        self._sink = sink
        self._metrics = metrics
        return self

    def with_bus(self, settings: CommonSettings) -> Self:
        """Join this bus on `with`, instead of the one that runs on the root."""
        self._settings = settings
        return self

    # --- recording ---------------------------------------------------------------------------------------------------

    def event(
        self,
        what: str,
        /,
        *,
        job: str | None = None,
        attempt: int | None = None,
        lease_epoch: int | None = None,
        step: int | None = None,
        severity: Severity = "info",
        trace: str | None = None,
        **data: object,
    ) -> None:
        """Record one fact; `what` is `<area>.<past tense>`, or the past tense alone in a script (`app.<past tense>`).

        Safe from any thread; never blocks, never raises for the state of the bus. Raises ValueError for a `what` that
        cannot stand in a subject.
        """
        about = About(job, attempt, lease_epoch, step, trace)
        self.record(what, data, about=about, severity=severity)

    def record(
        self,
        what: str,
        data: Mapping[str, object],
        *,
        about: About,
        severity: Severity = "info",
        key: EventKey | None = None,
    ) -> None:
        """Like `event`, for data that is in a map already; `key` is of what others may tell too, instead of our own."""
        kind = what if "." in what else f"app.{what}"
        if len(kind) > _MAX_TYPE or not _TYPE.match(kind):
            raise ValueError(f"event type has value {what!r}: use words of a-z, 0-9 and '_', joined by dots")
        producer, number = key or EventKey(self.producer, next(self._numbers))
        event: JsonMap = {
            "v": 1,
            "id": f"{producer}-{number}",
            "type": kind,
            "time": clock.now(),
            "producer": producer,
            "number": number,
            "severity": severity,
            "source": self.source,
            "host": self.host,
        }
        event.update({name: value for name, value in about._asdict().items() if value is not None})
        event["data"] = {name: plain(value) for name, value in data.items()}
        self.forward([event])

    def forward(self, events: Iterable[JsonMap]) -> None:
        """Take over complete events of another producer, for instance of a trainer, as they are."""
        has_facts = False
        for event in events:
            is_fact = event["type"] not in BATCHED_TYPES
            has_facts |= is_fact
            if len(self._buffer) >= (_MAX_FACTS if is_fact else _MAX_BATCHED):
                self._drop(event)
            else:
                self._buffer.append(event)
        self._wake(has_facts or len(self._buffer) >= _FULL)

    def _say_dropped(self) -> None:
        """Once there is room again, record how many events were given up since the last time."""
        lost = self.dropped - self._said
        if lost:
            self._said += lost
            self.event("events.dropped", severity="warning", dropped=lost)

    def _drop(self, event: JsonMap) -> None:
        severity = str(event["severity"])
        self.dropped[severity] += 1
        if self._metrics is not None:
            self._metrics.events_dropped.labels(severity).inc()

    # --- sending -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what is recorded until cancelled; offers again what the sink could not take.

        Facts go at once, and all that waits with them; what goes in batches waits a little for company.
        """
        loop, woken, urgent = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def wake(is_urgent: bool) -> None:
            woken.set()
            if is_urgent:
                urgent.set()

        self._wake = lambda is_urgent: _call_soon(loop, wake, is_urgent)
        while True:
            if not self._buffer:
                woken.clear()
                await woken.wait()
            if self._buffer and self._buffer[0]["type"] in BATCHED_TYPES:
                await is_set_within(urgent, _FLUSH_S)
            urgent.clear()
            if self._buffer:
                await self._send_some()

    async def _send_some(self) -> None:
        events = [self._buffer.popleft() for _ in range(min(len(self._buffer), 2048))]
        self._sending = len(events)
        try:
            while not await self._offered(events):  # noqa: ASYNC110 - the offer is repeated, no flag is looked at
                await asyncio.sleep(_RETRY_S)
        except BaseException:
            self._buffer.extendleft(reversed(events))
            raise
        finally:
            self._sending = 0
        self._say_dropped()
        if self._metrics is not None:
            for kind, count in collections.Counter(str(event["type"]) for event in events).items():
                self._metrics.events.labels(kind).inc(count)

    async def _offered(self, events: list[JsonMap]) -> bool:
        if self._sink is None:
            return True
        try:
            await self._sink.send(events)
        except TransientError:
            return False
        return True

    async def flush(self, *, timeout_s: float) -> bool:
        """Wait until everything recorded so far is safe; False if that took too long."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._buffer or self._sending:
                    self._wake(True)
                    await asyncio.sleep(0.005)
        except TimeoutError:
            logger.warning("events not sent in time", extra={"events": len(self._buffer) + self._sending})
            return False
        return True

    # --- in a script -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Join the bus from a script: a thread of its own sends, so that the script need not be asyncio.

        Raises BusUnavailable or NotAuthorized if there is no bus to join.
        """
        self._script = _Script(self, self._settings or _script_settings())
        self._script.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._script is not None:
            self._script.stop()
            self._script = None


class _Script:
    """The thread behind `with LearningTelemetry(...)`."""

    def __init__(self, telemetry: LearningTelemetry, settings: CommonSettings) -> None:
        self._telemetry = telemetry
        self._settings = settings
        self._joined: Future[None] = Future()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._main, name="railbus-telemetry", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._joined.result()

    def stop(self) -> None:
        self._leave.set()
        self._thread.join(_SCRIPT_CLOSE_S + 5)

    def _main(self) -> None:
        try:
            asyncio.run(self._send())
        except RailbusError as exc:
            if self._joined.done():
                logger.warning("events lost", extra={"problem": str(exc)})
            else:
                self._joined.set_exception(exc)
        except BaseException as exc:  # a bug; whoever waits in `start` must not wait for ever
            if self._joined.done():
                raise
            self._joined.set_exception(exc)

    async def _send(self) -> None:
        from railbus_shared.bus.connection import Bus  # noqa: PLC0415 - a trainer must not import nats
        from railbus_shared.bus.sink import BusSink  # noqa: PLC0415

        async with Bus.open(self._settings, name=self._telemetry.source) as bus, asyncio.TaskGroup() as tasks:
            self._telemetry.with_sink(BusSink(bus))
            sender = tasks.create_task(self._telemetry.run())
            self._joined.set_result(None)
            await asyncio.to_thread(self._leave.wait)
            await self._telemetry.flush(timeout_s=_SCRIPT_CLOSE_S)
            sender.cancel()


class _EventHandler(logging.Handler):
    """Makes events of log records, but not of the code that sends them."""

    def __init__(self, telemetry: LearningTelemetry) -> None:
        super().__init__()
        self._telemetry = telemetry

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("railbus_shared.", "nats", "asyncio")):
            return
        try:
            fields = logs.extra_fields(record)
            job = fields.pop("job_id", None)
            self._telemetry.event(
                "log.line",
                job=str(job) if job is not None else None,
                severity=_severity(record.levelno),
                logger=record.name,
                message=record.getMessage(),
                fields=fields,
            )
        except Exception:  # noqa: BLE001 - as every handler: a bad log call must not end the program that makes it
            self.handleError(record)


def new_producer(source: str, *, host: str) -> str:
    """An id that no other process start has: source, host and eight random digits, cut to the length of an id."""
    return f"{source[:20]}-{host[:34]}-{os.urandom(4).hex()}"


def plain(value: object, *, depth: int = 0) -> JsonValue:
    """A value as an event can carry it: numbers, strings, maps, lists; scalars of NumPy and torch; else its text.

    What no message can say becomes text as well: numbers beyond 64 bits, halves of a surrogate pair, deep nesting.
    """
    match value:
        case None | bool():
            return value
        case int():
            return int(value) if -(2**63) <= value < 2**64 else str(int(value))
        case float():
            return cast("JsonValue", wire.finite(float(value)))
        case Mapping() if depth < _MAX_NESTING:
            return {str(plain(str(key))): plain(item, depth=depth + 1) for key, item in value.items()}
        case list() | tuple() | set() | frozenset() if depth < _MAX_NESTING:
            return [plain(item, depth=depth + 1) for item in value]
        case _:
            return _scalar_or_text(value, depth=depth)


def _scalar_or_text(value: object, *, depth: int) -> JsonValue:
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0 and depth < _MAX_NESTING:
        return plain(item(), depth=depth + 1)
    text = str.__str__(value) if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()


def _severity(level: int) -> Severity:
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warning"
    return "info" if level >= logging.INFO else "debug"


def _script_settings() -> CommonSettings:
    settings = load(CommonSettings)
    if settings.nats_key_file is not None or "nats_url" in settings.model_fields_set:
        return settings
    return running_bus(Layout(Path(settings.root))) or settings


def _call_soon(loop: asyncio.AbstractEventLoop, wake: Callable[[bool], None], is_urgent: bool) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed; what is buffered was counted by `flush`
        loop.call_soon_threadsafe(wake, is_urgent)


def _nothing(_: bool) -> None:
    pass
