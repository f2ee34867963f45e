"""A trainer's producer of events, or a writer's: complete maps, numbered without gaps, sent to the runner in batches.

A batch goes out when it holds 256 events, or when something is recorded a fifth of a second after it was begun; a loop
that records nothing calls `flush_if_due`. Recording is safe from any thread; the events of one producer leave in order.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Final

from pydantic import JsonValue

from railbus_runner.frames import Events, Plan
from railbus_shared import clock, logs
from railbus_shared.contracts.events import Severity
from railbus_shared.contracts.model import JsonMap
from railbus_shared.telemetry import plain

_MAX_EVENTS: Final = 256
_FLUSH_S: Final = 0.2
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
        kinds: Collection[str] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`kinds` are the types of events that alone are recorded; all of them unless given."""
        self._send = send
        self._kinds = kinds
        self._clock_s = clock_s
        self._producer = producer
        self._common = dict(common)
        self._number = 0
        self._buffer: list[JsonMap] = []
        self._due_s = 0.0
        self._lock = threading.RLock()  # a log line may be recorded while a batch is sent
        self._is_detached = False

    @classmethod
    def of_plan(cls, plan: Plan, send: Callable[[Events], None], *, source: str = "trainer") -> Recorder:
        common: dict[str, JsonValue] = {
            "source": source,
            "host": plan.host,
            "job": plan.job,
            "attempt": plan.attempt,
            "lease_epoch": plan.lease_epoch,
        }
        kinds = None if plan.rank == 0 else {"log.line"}  # what the others would tell is what rank 0 tells
        return cls(send, producer=plan.producer, common=common, kinds=kinds)

    def record(
        self, kind: str, *, step: int | None = None, severity: Severity = "info", data: Mapping[str, object] = _NOTHING
    ) -> None:
        """Count one event of type `kind`; scalars of torch and NumPy in `data` become numbers. Raises RunnerGone."""
        if self._kinds is not None and kind not in self._kinds:
            return
        fields: JsonMap = {name: cut(plain(value)) for name, value in data.items()}
        with self._lock:
            if self._is_detached:
                return
            self._number += 1
            event: JsonMap = {
                "v": 1,
                "id": f"{self._producer}-{self._number}",
                "type": kind,
                "time": clock.now(),
                "producer": self._producer,
                "number": self._number,
                "severity": severity,
                **self._common,
                "data": fields,
            }
            if step is not None:
                event["step"] = step
            self._append(event)

    def flush(self) -> None:
        """Send everything recorded so far."""
        with self._lock:
            if self._buffer:
                events, self._buffer = self._buffer, []
                self._send(Events.model_construct(events=tuple(events)))

    def flush_if_due(self) -> None:
        """Send what has waited for a fifth of a second."""
        if self._buffer and self._clock_s() >= self._due_s:
            self.flush()

    def detach(self) -> None:
        """Record nothing more: for a process that user code has forked, whose numbers would be taken twice."""
        self._is_detached = True
        self._lock = threading.RLock()
        self._buffer = []

    def _append(self, event: JsonMap) -> None:
        if not self._buffer:
            self._due_s = self._clock_s() + _FLUSH_S
        self._buffer.append(event)
        if len(self._buffer) >= _MAX_EVENTS or self._clock_s() >= self._due_s:
            self.flush()


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
        data: dict[str, object] = {
            "logger": record.name,
            "message": record.getMessage(),
            "fields": {**logs.extra_fields(record), **self._fields},
        }
        if record.exc_info:
            data["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        self._recorder.record("log.line", step=self._step(), severity=_severity(record.levelno), data=data)


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
