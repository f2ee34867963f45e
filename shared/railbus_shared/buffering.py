"""Events that wait for the bus: bounded in bytes, and what has to be given up is given up in the order of its worth.

There are three classes, each with a bound of its own, so that none crowds out another:

- metrics thin out: of each series (one job, one set of names) every second point is kept, then every fourth, and so on,
  of those that wait and of those that come, so that the curve stays whole; its newest point is always kept;
- lines (`log.line`, `job.output`) that are no warnings lose the oldest first, those of `debug` before those of `info`;
- facts, and warnings and errors of any kind, stay. At the bound of everything they first take the room of all the
  rest; only then the newest is refused, and that is logged.

What is given up is counted by job, type and severity.
"""

from __future__ import annotations

import collections
import logging
import threading
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from pydantic import JsonValue

from railbus_shared.contracts.events import BATCHED_TYPES
from railbus_shared.contracts.model import JsonMap

logger = logging.getLogger(__name__)

METRICS: Final = "train.metrics"
_EVENT_BYTES: Final = 700  # of an event without data in memory, as tracemalloc counts it
_VALUE_BYTES: Final = 80
_SMALL: Final = frozenset({float, int, bool, type(None)})
_MAX_SERIES: Final = 4096
_LEAST_FRAC: Final = 0.5  # of a bound is left after something was given up, so that it costs little for each event


class Loss(NamedTuple):
    """What was given up."""

    job: str
    """Empty for what is of no job."""
    type: str
    severity: str


@dataclass(frozen=True)
class Bounds:
    """Estimated bytes of memory."""

    metrics_bytes: int = 32 << 20
    lines_bytes: int = 32 << 20
    total_bytes: int = 256 << 20


_Class = Literal["metrics", "lines", "facts"]
_CLASSES: Final[tuple[_Class, ...]] = ("metrics", "lines", "facts")


class _Waiting(NamedTuple):
    event: JsonMap
    size: int
    kind: _Class


@dataclass
class _Series:
    """A series whose points come in with a stride."""

    stride: int = 1
    passed: int = 0
    """Points since the last one that was kept."""
    newest: _Waiting | None = None
    """The last point, where the stride would leave it out: it waits for the next one."""


class EventBuffer:
    """A queue of events; safe from any thread.

    Attributes:
        losses: what was given up; whoever reports it takes it with `take_losses`.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._lock = threading.RLock()  # whoever records while something is given up, in the same thread, must not hang
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._series: dict[object, _Series] = {}
        self._bytes = dict.fromkeys(_CLASSES, 0)
        self._num_urgent = 0
        self._is_full = False
        self.losses: collections.Counter[Loss] = collections.Counter()

    def emptied(self) -> EventBuffer:
        """Another one with the same bounds."""
        return EventBuffer(self._bounds)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def size_bytes(self) -> int:
        """Estimated memory of all that waits."""
        return sum(self._bytes.values())

    @property
    def has_facts(self) -> bool:
        """Whether something waits that is no metric and no line."""
        return self._num_urgent > 0

    def add(self, event: JsonMap) -> None:
        """Let an event wait; others may be given up for it, or it for others."""
        waiting = _Waiting(event, size_of(event), _class_of(event))
        with self._lock:
            if waiting.kind == "facts":
                self._add_fact(waiting)
            elif self._is_full:
                self._lose(event)
            elif waiting.kind == "metrics":
                self._add_metrics(waiting)
            else:
                self._put(waiting)
                if self._bytes["lines"] > self._bounds.lines_bytes:
                    self._shed_lines()

    def take(self, max_events: int, max_bytes: int) -> list[JsonMap]:
        """The oldest events, at least one if there is any."""
        taken: list[JsonMap] = []
        size = 0
        with self._lock:
            waiting = self._waiting
            while waiting and len(taken) < max_events and (not taken or size + waiting[0].size <= max_bytes):
                first = waiting.popleft()
                size += first.size
                self._count(first, -1)
                taken.append(first.event)
            if not waiting:
                self._end_thinning()
            self._is_full = self._is_full and self.size_bytes > self._bounds.total_bytes * _LEAST_FRAC
        return taken

    def take_losses(self) -> collections.Counter[Loss]:
        """What was given up since this was last asked."""
        with self._lock:
            losses, self.losses = self.losses, collections.Counter()
        return losses

    # --- metrics -----------------------------------------------------------------------------------------------------

    def _add_metrics(self, waiting: _Waiting) -> None:
        if self._series:
            series = self._series.setdefault(self._series_of(waiting.event), _Series())
            series.passed += 1
            self._replace_newest(series, None)
            if series.passed < series.stride:
                self._replace_newest(series, waiting)
                return
            series.passed = 0
        self._put(waiting)
        if self._bytes["metrics"] > self._bounds.metrics_bytes:
            self._thin()

    def _thin(self) -> None:
        """Keep every second point of each series, the first one first, and as many of what comes."""
        entries, self._waiting = self._waiting, collections.deque()
        kept: collections.deque[_Waiting] = collections.deque()
        points: dict[object, list[_Waiting]] = {}
        for waiting in entries:
            if waiting.kind == "metrics":
                of_series = points.setdefault(self._series_of(waiting.event), [])
                of_series.append(waiting)
                if len(of_series) % 2 == 0:
                    self._count(waiting, -1)
                    continue
            kept.append(waiting)
        kept.extend(self._waiting)
        self._waiting = kept
        for key, of_series in points.items():
            self._double_stride(self._series.setdefault(key, _Series()), of_series)
        if self._bytes["metrics"] > self._bounds.metrics_bytes:  # more series than there is room for
            self._shed("metrics", ("debug", "info", "warning", "error"), self._bounds.metrics_bytes * _LEAST_FRAC)

    def _double_stride(self, series: _Series, points: list[_Waiting]) -> None:
        """Every second one of the points has gone; the last of these may still be the newest."""
        if len(points) % 2 == 0:
            series.passed += series.stride
            if series.newest is None:
                self._replace_newest(series, points.pop())
        series.stride *= 2
        for waiting in points[1::2]:
            self._lose(waiting.event)

    def _replace_newest(self, series: _Series, waiting: _Waiting | None) -> None:
        if series.newest is not None:
            self._count(series.newest, -1)
            self._lose(series.newest.event)
        if waiting is not None:
            self._count(waiting, +1)
        series.newest = waiting

    def _series_of(self, event: JsonMap) -> object:
        data = event.get("data")
        key = (event.get("job"), event.get("producer"), tuple(data) if isinstance(data, dict) else ())
        return key if key in self._series or len(self._series) < _MAX_SERIES else ()

    def _end_thinning(self) -> None:
        """All has gone but the newest points, and what comes is whole again."""
        newest = [series.newest for series in self._series.values() if series.newest is not None]
        self._series.clear()
        for waiting in newest:
            self._waiting.append(waiting)

    # --- lines and facts ---------------------------------------------------------------------------------------------

    def _shed_lines(self) -> None:
        for severity in ("debug", "info"):
            if self._bytes["lines"] > (target := self._bounds.lines_bytes * _LEAST_FRAC):
                self._shed("lines", (severity,), target)

    def _add_fact(self, waiting: _Waiting) -> None:
        if self.size_bytes + waiting.size > self._bounds.total_bytes and not self._is_full:
            self._is_full = True
            self._end_thinning()
            for kind in ("metrics", "lines"):
                self._shed(kind, ("debug", "info", "warning", "error"), 0)
            logger.error("events wait in vain: facts alone are kept, and at the bound none", extra=self._room())
        if self.size_bytes + waiting.size > self._bounds.total_bytes:
            self._lose(waiting.event)
        else:
            self._put(waiting)

    def _room(self) -> dict[str, object]:
        return {"events": len(self._waiting), "bytes": self.size_bytes, "bound_bytes": self._bounds.total_bytes}

    # --- counting ----------------------------------------------------------------------------------------------------

    def _put(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._count(waiting, +1)

    def _count(self, waiting: _Waiting, sign: int) -> None:
        self._bytes[waiting.kind] += sign * waiting.size
        if waiting.event["type"] not in BATCHED_TYPES:
            self._num_urgent += sign

    def _shed(self, kind: _Class, severities: tuple[str, ...], target_bytes: float) -> None:
        """Give up the oldest of a class until no more than so many bytes of it are left."""
        entries, self._waiting = self._waiting, collections.deque()
        kept: collections.deque[_Waiting] = collections.deque()
        for waiting in entries:
            is_spared = waiting.kind != kind or waiting.event["severity"] not in severities
            if is_spared or self._bytes[kind] <= target_bytes:
                kept.append(waiting)
            else:
                self._count(waiting, -1)
                self._lose(waiting.event)
        kept.extend(self._waiting)
        self._waiting = kept

    def _lose(self, event: JsonMap) -> None:
        self.losses[Loss(str(event.get("job") or ""), str(event["type"]), str(event["severity"]))] += 1


def size_of(event: JsonMap) -> int:
    """About what an event takes in memory."""
    return _EVENT_BYTES + _size_of(event.get("data"))


def _size_of(value: JsonValue) -> int:
    if isinstance(value, dict):
        size = _VALUE_BYTES
        for name, item in value.items():
            size += _VALUE_BYTES + len(name) + (0 if type(item) in _SMALL else _size_of(item))
        return size
    if isinstance(value, str):
        return _VALUE_BYTES + len(value) * (1 if value.isascii() else 4)
    return _VALUE_BYTES + (sum(map(_size_of, value)) if isinstance(value, list) else 0)


def _class_of(event: JsonMap) -> _Class:
    if event["type"] == METRICS:
        return "metrics"
    return "lines" if event["type"] in BATCHED_TYPES and event["severity"] in ("debug", "info") else "facts"
