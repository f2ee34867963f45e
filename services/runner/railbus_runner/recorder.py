"""A trainer's producer of events, or a writer's: whole maps but for the number, which the runner gives, in batches.

A batch goes out when it holds 256 events, or when something is recorded a fifth of a second after it was begun; a loop
that records nothing calls `flush_if_due`. Recording is safe from any thread; the events of one producer leave in order.
A runner that does not read holds up nobody: events wait then, within bounds, as they do on their way to the bus.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from pydantic import JsonValue

from railbus_runner.frames import Events, Plan
from railbus_shared import clock, logs
from railbus_shared.buffering import Bounds, EventBuffer
from railbus_shared.contracts.events import Severity
from railbus_shared.contracts.model import JsonMap
from railbus_shared.plain_values import plain
from railbus_shared.telemetry import by_job

_MAX_EVENTS: Final = 256
_MAX_BYTES: Final = 256 << 10
"""Of memory, for one frame: it then takes a part of the socket's buffer."""
_FLUSH_S: Final = 0.2
_BOUNDS: Final = Bounds(metrics_bytes=8 << 20, lines_bytes=8 << 20, total_bytes=64 << 20)
MAX_TEXT_CHARS: Final = 32_768
"""Of one text in an event; longer ones are cut, so that a full batch fits into a frame."""

_NOTHING: Final[Mapping[str, object]] = {}


class Recorder:
    """Counts, buffers and sends the events of one trainer."""

    def __init__(
        self,
        send: Callable[[Events], None],
        *,
        producer: str,
        common: Mapping[str, JsonValue],
        offer: Callable[[Events], bool] | None = None,
        kinds: Collection[str] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """A recorder.

        Args:
            send: sends a frame, however long it takes.
            producer: whose events they are.
            common: what all of them say.
            offer: sends a frame unless that would take long, and says whether it did; `send` if it is not given.
            kinds: types of events that alone are recorded; all of them unless given.
            clock_s: the time, in seconds.
        """
        self._send = send
        self._offer = offer or self._sent
        self._kinds = kinds
        self._clock_s = clock_s
        self._producer = producer
        self._common = dict(common)
        self._buffer = EventBuffer(_BOUNDS)
        self._batch: list[JsonMap] = []
        """Taken from the buffer, and to be sent before what is in it."""
        self._due_s = 0.0
        self._lock = threading.RLock()  # a log line may be recorded while a batch is sent
        self._is_detached = False

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        send: Callable[[Events], None],
        *,
        offer: Callable[[Events], bool] | None = None,
        source: str = "trainer",
    ) -> Recorder:
        common: dict[str, JsonValue] = {
            "source": source,
            "host": plan.host,
            "job": plan.job,
            "attempt": plan.attempt,
            "lease_epoch": plan.lease_epoch,
        }
        if plan.trace is not None:
            common["trace"] = plan.trace
        kinds = None if plan.rank == 0 else {"log.line"}  # what the others would tell is what rank 0 tells
        return cls(send, producer=plan.producer, common=common, offer=offer, kinds=kinds)

    def record(
        self, kind: str, *, step: int | None = None, severity: Severity = "info", data: Mapping[str, object] = _NOTHING
    ) -> None:
        """Record one event of type `kind`; scalars of torch and NumPy in `data` become numbers. Raises RunnerGone."""
        if self._kinds is not None and kind not in self._kinds:
            return
        fields: JsonMap = {name: cut(plain(value)) for name, value in data.items()}
        event: JsonMap = {
            "v": 1,
            "id": "",
            "type": kind,
            "time": clock.now(),
            "producer": self._producer,
            "number": 0,
            "severity": severity,
            **self._common,
            "data": fields,
        }
        if step is not None:
            event["step"] = step
        with self._lock:
            if not self._is_detached:
                self._append(event)

    def flush(self) -> None:
        """Send everything recorded so far, however long it takes."""
        with self._lock:
            while self._next_batch():
                batch, self._batch = self._batch, []
                self._send(Events.model_construct(events=tuple(batch)))
                self._tell_dropped()

    def flush_if_due(self) -> None:
        """Send what has waited for a fifth of a second, as far as the runner takes it."""
        if self._is_waiting and self._clock_s() >= self._due_s:
            self.offer()

    def offer(self) -> None:
        """Send what was recorded as far as the runner takes it; the rest a fifth of a second later, or when told to."""
        with self._lock:
            self._due_s = self._clock_s() + _FLUSH_S
            while self._next_batch() and self._offer(Events.model_construct(events=tuple(self._batch))):
                self._batch = []
                self._tell_dropped()

    def detach(self) -> None:
        """Record nothing more: for a process that user code has forked, which must not speak in this one's name."""
        self._is_detached = True
        self._lock = threading.RLock()
        self._buffer, self._batch = EventBuffer(_BOUNDS), []

    @property
    def _is_waiting(self) -> bool:
        return bool(self._batch) or len(self._buffer) > 0

    def _next_batch(self) -> bool:
        self._batch = self._batch or self._buffer.take(_MAX_EVENTS, _MAX_BYTES)
        return bool(self._batch)

    def _append(self, event: JsonMap) -> None:
        now_s = self._clock_s()
        if not self._is_waiting:
            self._due_s = now_s + _FLUSH_S
        self._buffer.add(event)
        if now_s >= self._due_s or (not self._batch and len(self._buffer) >= _MAX_EVENTS):
            self.offer()

    def _sent(self, frame: Events) -> bool:
        self._send(frame)
        return True

    def _tell_dropped(self) -> None:
        for losses in by_job(self._buffer.take_losses()).values() if self._buffer.losses else ():
            self.record("events.dropped", severity="warning", data=losses)


class RecordingHandler(logging.Handler):
    """Makes `log.line` events of log records."""

    def __init__(
        self,
        recorder: Recorder,
        *,
        step: Callable[[], int | None] = lambda: None,
        fields: Mapping[str, object] = _NOTHING,
    ) -> None:
        """`fields` are told with every line."""
        super().__init__(logging.INFO)
        self._fields = fields
        self._recorder = recorder
        self._step = step

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = logs.told(record, {**logs.extra_fields(record), **self._fields})
            self._recorder.record("log.line", step=self._step(), severity=_severity(record.levelno), data=data)
        except Exception:  # noqa: BLE001 - as every handler: a bad log call must not end the training that makes it
            self.handleError(record)


def cut(value: JsonValue) -> JsonValue:
    """Texts no longer than an event may carry."""
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT_CHARS else f"{value[: MAX_TEXT_CHARS - 1]}…"
    if isinstance(value, list):
        return [cut(item) for item in value]
    if isinstance(value, dict):
        return {name: cut(item) for name, item in value.items()}
    return value


def _severity(level: int) -> Severity:
    if level >= logging.ERROR:
        return "error"
    return "warning" if level >= logging.WARNING else "info"
