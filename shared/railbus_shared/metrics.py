"""Prometheus metrics that every service has; a service adds its own to the same registry.

Names and units are Prometheus's: base units (seconds, bytes, ratios), `_total` for what only grows. What is true now is
read when it is asked for, and costs nothing before. `docs/metrics.md` is made from the calls that declare metrics, so
name, help and labels stand in them as words.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
WAITS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
"""Buckets, in seconds, of what takes from a moment to a day."""
_MAX_TYPES: Final = 100
"""Of events; a trainer may name as many as it likes, and each is a series."""
_LAG_PERIOD_S: Final = 0.5
_DISK_EVERY: Final = 10
"""Looks at the loop for each look at the disk."""

Readings = Iterable[tuple[tuple[str, ...], float]]
"""Values of labels, in their order, and the reading."""


@dataclass(frozen=True)
class Metrics:
    """Metrics of one process, in a registry of their own so that tests can run several."""

    service: str
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    request_seconds: Histogram = field(init=False)
    rejected: Counter = field(init=False)
    events: Counter = field(init=False)
    events_dropped: Counter = field(init=False)
    reconnects: Counter = field(init=False)
    connected: Gauge = field(init=False)
    loop_lag: Histogram = field(init=False)
    disk_free: Gauge = field(init=False)
    disk_size: Gauge = field(init=False)
    _types: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # the time at which each series began: half as many series again, which nobody asks for
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotation
        ProcessCollector(registry=self.registry)
        add = object.__setattr__
        add(self, "requests", self.counter("rpc_requests", "Requests served.", "endpoint", "code"))
        add(self, "request_seconds", self.histogram("rpc_duration_seconds", "Time to serve a request.", "endpoint"))
        add(self, "rejected", self.counter("rejected_messages", "Messages refused, by error code.", "code"))
        add(self, "events", self.counter("events_published", "Events acknowledged by the bus.", "type"))
        add(self, "events_dropped", self.counter("events_dropped", "Events given up.", "type", "severity"))
        add(self, "reconnects", self.counter("nats_reconnects", "Times the connection to NATS came back."))
        add(self, "connected", self.gauge("nats_connected", "Whether NATS is connected."))
        add(self, "loop_lag", self.histogram("event_loop_lag_seconds", "How late the event loop came to a timer."))
        add(self, "disk_free", self.gauge("disk_free_bytes", "Of the disk that has the root, free for railbus."))
        add(self, "disk_size", self.gauge("disk_size_bytes", "Of the disk that has the root."))
        build = self.gauge("build_info", "Always 1; the labels tell the build.", "service", "version")
        build.labels(self.service, version()).set(1)

    def published(self, types: Iterable[str]) -> None:
        """The bus has acknowledged events of these types."""
        for kind, count in collections.Counter(types).items():
            self.events.labels(self._shown(kind)).inc(count)

    def dropped(self, kind: str, severity: str, count: int) -> None:
        """Events of a type were given up."""
        self.events_dropped.labels(self._shown(kind), severity).inc(count)

    def _shown(self, kind: str) -> str:
        """A type of events as a label: those that users made up are one."""
        is_known = kind in self._types or (len(self._types) < _MAX_TYPES and not kind.startswith("app."))
        self._types.update({kind} if is_known else ())
        return kind if is_known else "app"

    def counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"railbus_{name}", help_text, labels, registry=self.registry)

    def gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"railbus_{name}", help_text, labels, registry=self.registry)

    def histogram(self, name: str, help_text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"railbus_{name}", help_text, labels, registry=self.registry, buckets=buckets)

    def reading(self, name: str, help_text: str, *labels: str, read: Callable[[], Readings]) -> None:
        """A gauge that is read at each scrape: it has the series that `read` gives, and none where it gives none."""
        self.registry.register(_Reading(f"railbus_{name}", help_text, labels, read))

    async def watch_process(self, root: Path) -> None:
        """See how late the event loop is and how much room the root's disk has, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            looking: asyncio.Task[None] | None = None
            for number in itertools.count():
                if number % _DISK_EVERY == 0 and (looking is None or looking.done()):  # a disk may hang for hours
                    looking = tasks.create_task(self._look_at_disk(root))
                due_s = time.monotonic() + _LAG_PERIOD_S
                await asyncio.sleep(_LAG_PERIOD_S)
                self.loop_lag.observe(max(0.0, time.monotonic() - due_s))

    async def _look_at_disk(self, root: Path) -> None:
        try:
            found = await asyncio.to_thread(os.statvfs, root)
        except OSError as exc:
            self.disk_free.set(math.nan)
            logger.debug("disk not looked at", extra={"root": str(root), "problem": str(exc)})
            return
        self.disk_free.set(found.f_bavail * found.f_frsize)
        self.disk_size.set(found.f_blocks * found.f_frsize)


@dataclass(frozen=True)
class _Reading(Collector):
    """One gauge whose series are read when they are asked for."""

    name: str
    help_text: str
    labels: tuple[str, ...]
    read: Callable[[], Readings]

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Else the registry would read it once as it is registered, when nothing is there yet."""
        yield GaugeMetricFamily(self.name, self.help_text, labels=self.labels)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(self.name, self.help_text, labels=self.labels)
        for values, value in self.read():
            family.add_metric(values, value)
        yield family


def version() -> str:
    """Of the installed package."""
    from importlib.metadata import version as installed  # noqa: PLC0415 - costs 20 ms, and few callers need it

    return installed("railbus")
