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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Final, Literal, NamedTuple, cast

from pydantic import JsonValue

from railbus_shared.contracts.events import BATCHED_TYPES
from railbus_shared.contracts.model import JsonMap

logger = logging.getLogger(__name__)

METRICS: Final = "train.metrics"
_EVENT_BYTES: Final = 700  # of an event without data in memory, as tracemalloc counts it
_VALUE_BYTES: Final = 80
_SMALL: Final = frozenset({float, int, bool, type(None)})
_MAX_SERIES: Final = 4096
_WORTH_A_RUN: Final = 4
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


_Class = Literal["metrics", "lines", "warnings", "facts"]
_CLASSES: Final[tuple[_Class, ...]] = ("metrics", "lines", "warnings", "facts")


@dataclass(slots=True)
class _Run:
    """Neighbours of one class that take the same memory each."""

    kind: _Class
    each_bytes: int
    events: list[JsonMap]


@dataclass
class _Series:
    """A series whose points come in with a stride."""

    stride: int = 1
    passed: int = 0
    """Points since the last one that was kept."""
    newest: _Run | None = None
    """The last point, where the stride would leave it out: it waits for the next one."""


class EventBuffer:
    """A queue of events; safe from any thread.

    Attributes:
        losses: what was given up; whoever reports it takes it with `take_losses`.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._lock = threading.RLock()  # whoever records while something is given up, in the same thread, must not hang
        self._waiting: collections.deque[_Run] = collections.deque()
        self._num_waiting = 0
        self._series: dict[object, _Series] = {}
        self._bytes = dict.fromkeys(_CLASSES, 0)
        self._is_full = False
        self.losses: collections.Counter[Loss] = collections.Counter()

    def emptied(self) -> EventBuffer:
        """Another one with the same bounds."""
        return EventBuffer(self._bounds)

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def size_bytes(self) -> int:
        """Estimated memory of all that waits."""
        return sum(self._bytes.values())

    @property
    def has_facts(self) -> bool:
        """Whether something waits that is no metric and no line."""
        return self._bytes["facts"] > 0

    def add(self, event: JsonMap) -> None:
        """Let an event wait; others may be given up for it, or it for others."""
        kind, size = _class_of(event), size_of(event)
        with self._lock:
            if kind in ("facts", "warnings"):
                self._add_fact(kind, size, event)
            elif self._is_full:
                self._lose(event)
            elif kind == "metrics":
                self._add_metrics(size, event)
            else:
                self._put(kind, size, [event])
                if self._bytes["lines"] > self._bounds.lines_bytes:
                    self._shed_lines()

    def add_all(self, events: list[JsonMap]) -> None:
        """Let events of one type wait, as `add` does one by one; metrics of the same names cost a fifth of that."""
        if len(events) < _WORTH_A_RUN or events[0]["type"] != METRICS:
            for event in events:
                self.add(event)
            return
        for size, some in _by_size(events):
            with self._lock:
                has_room = self._bytes["metrics"] + size * len(some) <= self._bounds.metrics_bytes
                if has_room and not self._series and not self._is_full:
                    self._put("metrics", size, some)
                else:
                    for event in some:
                        self.add(event)

    def take(self, max_events: int, max_bytes: int) -> list[JsonMap]:
        """The oldest events, at least one if there is any."""
        taken: list[JsonMap] = []
        size = 0
        with self._lock:
            waiting = self._waiting
            while waiting and len(taken) < max_events:
                run = waiting.popleft()
                fitting = min(max_events - len(taken), max((max_bytes - size) // run.each_bytes, not taken))
                some, rest = run.events[:fitting], run.events[fitting:]
                if rest:
                    waiting.appendleft(_Run(run.kind, run.each_bytes, rest))
                size += run.each_bytes * len(some)
                self._count(run, -len(some))
                taken += some
                if not some:
                    break
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

    def _add_metrics(self, size: int, event: JsonMap) -> None:
        if self._series:
            series = self._series.setdefault(self._series_of(event), _Series())
            series.passed += 1
            self._replace_newest(series, None)
            if series.passed < series.stride:
                self._replace_newest(series, _Run("metrics", size, [event]))
                return
            series.passed = 0
        self._put("metrics", size, [event])
        if self._bytes["metrics"] > self._bounds.metrics_bytes:
            self._thin()

    def _thin(self) -> None:
        """Keep every second point of each series, the first one first, and as many of what comes."""
        entries, self._waiting = self._waiting, collections.deque()
        kept: collections.deque[_Run] = collections.deque()
        points: dict[object, list[JsonMap]] = {}
        for run in entries:
            stay = self._every_second(run, points) if run.kind == "metrics" else run.events
            self._count(run, len(stay) - len(run.events))
            if stay:
                kept.append(_Run(run.kind, run.each_bytes, stay))
        kept.extend(self._waiting)
        self._waiting = kept
        for key, of_series in points.items():
            self._double_stride(self._series.setdefault(key, _Series()), of_series)
        if self._bytes["metrics"] > self._bounds.metrics_bytes:  # more series than there is room for
            self._shed("metrics", ("debug", "info", "warning", "error"), self._bounds.metrics_bytes * _LEAST_FRAC)

    def _every_second(self, run: _Run, points: dict[object, list[JsonMap]]) -> list[JsonMap]:
        """Of each series the first event of a run, and so on; `points` are all that were looked at so far."""
        stay: list[JsonMap] = []
        for event in run.events:
            of_series = points.setdefault(self._series_of(event), [])
            of_series.append(event)
            if len(of_series) % 2:
                stay.append(event)
        return stay

    def _double_stride(self, series: _Series, points: list[JsonMap]) -> None:
        """Every second one of the points has gone; the last of these may still be the newest."""
        if len(points) % 2 == 0:
            series.passed += series.stride
            if series.newest is None:
                newest = points.pop()
                self._replace_newest(series, _Run("metrics", size_of(newest), [newest]))
        series.stride *= 2
        for event in points[1::2]:
            self._lose(event)

    def _replace_newest(self, series: _Series, run: _Run | None) -> None:
        if series.newest is not None:
            self._bytes["metrics"] -= series.newest.each_bytes
            self._lose(series.newest.events[0])
        if run is not None:
            self._bytes["metrics"] += run.each_bytes
        series.newest = run

    def _series_of(self, event: JsonMap) -> object:
        data = event.get("data")
        key = (event.get("job"), event.get("producer"), tuple(data) if isinstance(data, dict) else ())
        return key if key in self._series or len(self._series) < _MAX_SERIES else ()

    def _end_thinning(self) -> None:
        """All has gone but the newest points, and what comes is whole again."""
        newest = [series.newest for series in self._series.values() if series.newest is not None]
        self._series.clear()
        self._waiting.extend(newest)
        self._num_waiting += len(newest)

    # --- lines and facts ---------------------------------------------------------------------------------------------

    def _shed_lines(self) -> None:
        for severity in ("debug", "info"):
            if self._bytes["lines"] > (target := self._bounds.lines_bytes * _LEAST_FRAC):
                self._shed("lines", (severity,), target)

    def _add_fact(self, kind: _Class, size: int, event: JsonMap) -> None:
        if self.size_bytes + size > self._bounds.total_bytes and not self._is_full:
            self._is_full = True
            self._end_thinning()
            for other in ("metrics", "lines"):
                self._shed(other, ("debug", "info", "warning", "error"), 0)
            logger.error("events wait in vain: facts alone are kept, and at the bound none", extra=self._room())
        if self.size_bytes + size > self._bounds.total_bytes:
            self._lose(event)
        else:
            self._put(kind, size, [event])

    def _room(self) -> dict[str, object]:
        return {"events": len(self), "bytes": self.size_bytes, "bound_bytes": self._bounds.total_bytes}

    # --- counting ----------------------------------------------------------------------------------------------------

    def _put(self, kind: _Class, size: int, events: list[JsonMap]) -> None:
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.each_bytes == size and last.kind == kind:
            last.events.extend(events)
        else:
            self._waiting.append(_Run(kind, size, events))
        self._num_waiting += len(events)
        self._bytes[kind] += size * len(events)

    def _count(self, run: _Run, more: int) -> None:
        """So many more events of a run wait, or fewer."""
        self._num_waiting += more
        self._bytes[run.kind] += run.each_bytes * more

    def _shed(self, kind: _Class, severities: tuple[str, ...], target_bytes: float) -> None:
        """Give up the oldest of a class until no more than so many bytes of it are left."""
        entries, self._waiting = self._waiting, collections.deque()
        kept: collections.deque[_Run] = collections.deque()
        for run in entries:
            if run.kind != kind or self._bytes[kind] <= target_bytes:
                kept.append(run)
                continue
            stay: list[JsonMap] = []
            for event in run.events:
                if event["severity"] not in severities or self._bytes[kind] <= target_bytes:
                    stay.append(event)
                else:
                    self._count(run, -1)
                    self._lose(event)
            if stay:
                kept.append(_Run(kind, run.each_bytes, stay))
        kept.extend(self._waiting)
        self._waiting = kept

    def _lose(self, event: JsonMap) -> None:
        self.losses[Loss(str(event.get("job") or ""), str(event["type"]), str(event["severity"]))] += 1


def size_of(event: JsonMap) -> int:
    """About what an event takes in memory."""
    return _EVENT_BYTES + _size_of(event.get("data"))


def _size_of(value: JsonValue) -> int:
    if isinstance(value, dict):
        size = _VALUE_BYTES * (1 + len(value)) + sum(map(len, value))
        if not _SMALL.issuperset(map(type, value.values())):
            size += sum(_size_of(item) for item in value.values() if type(item) not in _SMALL)
        return size
    if isinstance(value, str):
        return _VALUE_BYTES + len(value) * (1 if value.isascii() else 4)
    return _VALUE_BYTES + (sum(map(_size_of, value)) if isinstance(value, list) else 0)


def _by_size(events: list[JsonMap]) -> Iterator[tuple[int, list[JsonMap]]]:
    """Neighbours that take the same memory, with what each takes."""
    if _are_alike([event.get("data") for event in events]):
        yield size_of(events[0]), events
    else:
        for size, some in groupby(events, key=size_of):
            yield size, list(some)


def _are_alike(values: Sequence[object]) -> bool:
    """Whether these are maps with the same names and small values only."""
    if set(map(type, values)) != {dict}:
        return False
    maps = cast("Sequence[JsonMap]", values)
    names = list(map(tuple, maps))
    return names.count(names[0]) == len(names) and _SMALL.issuperset(
        map(type, chain.from_iterable(map(dict.values, maps)))
    )


def _class_of(event: JsonMap) -> _Class:
    if event["type"] == METRICS:
        return "metrics"
    if event["type"] not in BATCHED_TYPES:
        return "facts"
    return "lines" if event["severity"] in ("debug", "info") else "warnings"
