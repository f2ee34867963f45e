"""LearningTelemetry: joins any process (a service, a trainer, a user's script) to structured logging and to the bus.

    with LearningTelemetry("preprocess").with_logging() as telemetry:      # a script: finds the running `railbus up`
        telemetry.event("rows_written", rows=1000)
        logging.getLogger(__name__).warning("three rows were empty")

Every process start is a producer with an id of its own, also one that was forked. An event gets its number when it
leaves the buffer for the bus, counted by its producer: (producer, number) is its key, by which telemetry drops what
arrives twice, and a gap in the numbers is a loss, never something that was given up here. Recording never blocks and
never fails; events wait in a bounded buffer while the bus is away, and what has to be given up is counted and told.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self

from railbus_shared import clock, logs, tracing
from railbus_shared.buffering import Bounds, EventBuffer, Loss
from railbus_shared.contracts.events import BATCHED_TYPES, EventKey, Severity
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import TransientError
from railbus_shared.layout import Layout
from railbus_shared.names import checked_id, this_host
from railbus_shared.plain_values import plain_map
from railbus_shared.settings import CommonSettings, load, running_bus
from railbus_shared.waking import Waker

if TYPE_CHECKING:
    from railbus_shared.joining import Script
    from railbus_shared.metrics import Metrics

logger = logging.getLogger(__name__)

_TYPE: Final = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+\Z")
_MAX_TYPE: Final = 64
_FLUSH_S: Final = 0.2
_FULL: Final = 100  # then they go at once: at 1000 events a second after a tenth of one
_RETRY_S: Final = 0.5
_MAX_SENT: Final = 8000
_MAX_SENT_BYTES: Final = 8 << 20
_TYPE_OF: Final[Callable[[JsonMap], str]] = itemgetter("type")
_PRODUCER_OF: Final[Callable[[JsonMap], str]] = itemgetter("producer")


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


_ABOUT: Final = About._fields


class LearningTelemetry:
    """Builder and recorder of one producer."""

    def __init__(
        self, source: str, *, host: str | None = None, producer: str | None = None, bounds: Bounds | None = None
    ) -> None:
        self.source = checked_id(source, kind="source")
        self.host = host or this_host()
        self.producer = producer or new_producer(source, host=self.host)
        self.dropped: collections.Counter[Loss] = collections.Counter()
        """What was given up, ever."""
        self._untold: collections.Counter[Loss] = collections.Counter()
        self._counting = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._buffer = EventBuffer(bounds)
        self._sending: list[JsonMap] = []
        self._sink: Sink | None = None
        self._metrics: Metrics | None = None
        self.heard: Callable[[JsonMap], None] | None = None
        """Called with every fact that is recorded or taken over, but not with what goes in batches."""
        self._wake: Callable[[bool], None] = _nothing
        """Called after something was recorded, with whether it is not to wait."""
        self._script: Script | None = None
        self._settings: CommonSettings | None = None
        _LIVING.add(self)

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
        kind = _event_type(what)
        producer, number = key or (self.producer, 0)
        event: JsonMap = {
            "v": 1,
            "id": f"{producer}-{number}" if number else "",
            "type": kind,
            "time": clock.now(),
            "producer": producer,
            "number": number,
            "severity": severity,
            "source": self.source,
            "host": self.host,
        }
        for name, value in zip(_ABOUT, about):  # noqa: B905 - as long as each other, and this is cheaper
            if value is not None:
                event[name] = value
        if about.trace is None and (trace := tracing.current.get()) is not None:
            event["trace"] = trace
        event["data"] = plain_map(data)
        if kind in BATCHED_TYPES:
            self._buffer.add(event)
            self._recorded(is_urgent=False)
        else:
            self.forward((event,))

    def forward(self, events: Iterable[JsonMap]) -> None:
        """Take over events of another producer, for instance of a trainer; those without a number get one here."""
        has_facts = False
        for kind, of_kind in groupby(events, key=_TYPE_OF):
            some = list(of_kind)
            if kind not in BATCHED_TYPES:
                has_facts = True
                self._tell_heard(some)
            self._buffer.add_all(some)
        self._recorded(is_urgent=has_facts)

    def _tell_heard(self, facts: list[JsonMap]) -> None:
        if self.heard is not None:
            for fact in facts:
                self.heard(fact)

    def _recorded(self, *, is_urgent: bool) -> None:
        if self._buffer.losses:
            self._account()
        self._wake(is_urgent or len(self._buffer) >= _FULL)

    def _account(self) -> None:
        with self._counting:
            losses = self._buffer.take_losses()
            self.dropped += losses
            self._untold += losses
        if self._metrics is not None:
            for loss, count in losses.items():
                self._metrics.dropped(loss.type, loss.severity, count)

    def _tell_dropped(self) -> None:
        """Once there is room again, tell of each job how many events were given up since the last time."""
        with self._counting:
            untold, self._untold = self._untold, collections.Counter()
        for job, losses in by_job(untold).items():
            self.record("events.dropped", losses, about=About(job or None), severity="warning")

    # --- sending -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send what is recorded until cancelled; offers again what the sink could not take.

        Facts go at once, and all that waits with them; what goes in batches waits a little for company.
        """
        self._wake = waker = Waker(asyncio.get_running_loop())
        while True:
            await waker.until(self._has_some)
            await waker.until_urgent(self._has_urgent, within_s=_FLUSH_S)
            await self._send_some()

    def _has_some(self) -> bool:
        return bool(self._sending) or len(self._buffer) > 0

    def _has_urgent(self) -> bool:
        return bool(self._sending) or self._buffer.has_facts or len(self._buffer) >= _FULL

    async def _send_some(self) -> None:
        """Send what waits longest; what is cancelled here is offered first, and as it was, by the next `run`."""
        self._sending = self._sending or self._numbered(self._buffer.take(_MAX_SENT, _MAX_SENT_BYTES))
        while self._sending and not await self._offered(self._sending):  # noqa: ASYNC110 - the offer is repeated
            await asyncio.sleep(_RETRY_S)
        events, self._sending = self._sending, []
        if self._untold:
            self._tell_dropped()
        if self._metrics is not None:
            self._metrics.published(map(_TYPE_OF, events))

    def _numbered(self, events: list[JsonMap]) -> list[JsonMap]:
        for producer, run in groupby(events, key=_PRODUCER_OF):
            number = self._numbers.get(producer, 0)
            for event in run:
                if not event["number"]:
                    number += 1
                    event["number"] = number
                    event["id"] = f"{producer}-{number}"
            if number:
                self._numbers[producer] = number
        return events

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
                while len(self._buffer) or self._sending:
                    self._wake(True)
                    await asyncio.sleep(0.005)
        except TimeoutError:
            logger.warning("events not sent in time", extra={"events": len(self._buffer) + len(self._sending)})
            return False
        return True

    # --- in a script -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Join the bus from a script: a thread of its own sends, so that the script need not be asyncio.

        Raises BusUnavailable or NotAuthorized if there is no bus to join.
        """
        from railbus_shared.joining import Script  # noqa: PLC0415 - only a script needs it

        self._script = Script(self, self._settings or _script_settings())
        self._script.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._script is not None:
            self._script.stop()
            self._script = None

    def _become_child(self) -> None:
        """In a process that was forked: another producer, which sends nothing of what its parent has recorded."""
        self.producer = new_producer(self.source, host=self.host)
        self.dropped.clear()
        self._untold.clear()
        self._counting = threading.Lock()
        self._numbers.clear()
        self._buffer = self._buffer.emptied()
        self._sending = []
        self._wake = _nothing
        if self._script is not None:
            self._script = self._script.of_child()
            self._wake = self._script.begin


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
            about = About(str(job) if job is not None else None)
            severity = _severity(record.levelno)
            self._telemetry.record("log.line", logs.told(record, fields), about=about, severity=severity)
        except Exception:  # noqa: BLE001 - as every handler: a bad log call must not end the program that makes it
            self.handleError(record)


@lru_cache(maxsize=256)
def _event_type(what: str) -> str:
    """Raises ValueError."""
    kind = what if "." in what else f"app.{what}"
    if len(kind) > _MAX_TYPE or not _TYPE.match(kind):
        raise ValueError(f"event type has value {what!r}: use words of a-z, 0-9 and '_', joined by dots")
    return kind


def by_job(losses: Mapping[Loss, int]) -> dict[str, dict[str, dict[str, int]]]:
    """What `events.dropped` tells of each job: how many by severity, and by type."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for loss, count in losses.items():
        told = found.setdefault(loss.job, {"dropped": {}, "types": {}})
        for name, word in (("dropped", loss.severity), ("types", loss.type)):
            told[name][word] = told[name].get(word, 0) + count
    return found


def new_producer(source: str, *, host: str) -> str:
    """An id that no other process start has: source, host and eight random digits, cut to the length of an id."""
    return f"{source[:20]}-{host[:34]}-{os.urandom(4).hex()}"


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


def _nothing(_: bool) -> None:
    pass


def _after_fork() -> None:
    for telemetry in tuple(_LIVING):
        telemetry._become_child()  # noqa: SLF001 - it is this module's


_LIVING: Final[weakref.WeakSet[LearningTelemetry]] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)
