"""What the device_manager counts and shows, for Prometheus.

What is true of the whole cluster (jobs, waits, streams) only the placer shows, so that a sum over all device_managers
is right; of its devices each host shows its own. Leases that expire are not heard, so a host whose metrics are read
reads the buckets once more at its next heartbeat; one whose metrics nobody reads does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, get_args

from prometheus_client import Counter, Histogram

from railbus_device_manager.host_devices import HostDevices
from railbus_device_manager.manager import ClusterFacts
from railbus_device_manager.placer import Placer
from railbus_shared import clock
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.fill import Fill, fill
from railbus_shared.contracts.jobs import JobRecord, JobState
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import TransientError
from railbus_shared.metrics import WAITS, Metrics, Readings
from railbus_shared.topology import event_consumer, job_consumer

logger = logging.getLogger(__name__)

_LOST: Final = ("lease_lost", "runner_lost", "host_lost")
"""End causes that the placer tells, in the stead of a runner."""
_ASK_S: Final = 5.0
_OLD_S: Final = 120.0

Numbers = Iterator[tuple[tuple[str, ...], float]]


@dataclass(frozen=True)
class Measures:
    """What is counted."""

    queue_wait_seconds: Histogram
    ended: Counter

    @classmethod
    def of(cls, metrics: Metrics) -> Measures:
        made = cls(
            queue_wait_seconds=metrics.histogram(
                "job_queue_wait_seconds",
                "From submission, or from the return into the queue, to placement; counted where it was placed.",
                "priority",
                buckets=WAITS,
            ),
            ended=metrics.counter("attempts_ended", "Attempts ended in the stead of their runners, by cause.", "cause"),
        )
        for name in ("low", "normal", "high"):
            made.queue_wait_seconds.labels(name)
        for cause in _LOST:
            made.ended.labels(cause)
        return made

    def placed(self, record: JobRecord, queued_since_s: float | None) -> None:
        """A job has got its devices; `record` is that of before, and the time that since when it was queued.

        A first wait is counted from its submission: the placer of that time may have been another one.
        """
        if record.lease_epoch == 0:
            waited_s = (clock.now_ns() - clock.parse_rfc3339(record.submitted_at)) / clock.NS_PER_S
        else:
            waited_s = clock.boottime_s() - queued_since_s if queued_since_s is not None else 0.0
        self.queue_wait_seconds.labels(_class_of(record.priority)).observe(max(0.0, waited_s))

    def heard(self, event: JsonMap) -> None:
        """A fact that this device_manager tells."""
        told = event.get("data")
        cause = told.get("cause") if isinstance(told, dict) else None
        if str(event["type"]).startswith("job.") and cause in _LOST:
            self.ended.labels(cause).inc()


@dataclass
class Shown:
    """What is read at each scrape."""

    bus: Bus
    facts: ClusterFacts
    placer: Placer
    devices: HostDevices
    _fills: tuple[Fill, ...] = ()
    _filled_s: float = 0.0
    _is_read: asyncio.Event = field(default_factory=asyncio.Event)

    def join(self, metrics: Metrics) -> None:
        """Be read with these metrics."""
        metrics.reading("placer", "1 on the device_manager that places jobs, 0 on others.", read=self._is_placer)
        metrics.reading("jobs", "Jobs by state, final ones as well; from the placer only.", "state", read=self._jobs)
        metrics.reading(
            "queue_oldest_seconds",
            "How long the oldest queued job waits that is neither held nor after another; from the placer only.",
            read=self._oldest,
        )
        metrics.reading("stream_messages", "Messages in a stream; from the placer only.", "stream", read=self._messages)
        metrics.reading("stream_bytes", "Bytes of a stream; from the placer only.", "stream", read=self._bytes)
        metrics.reading(
            "stream_limit_bytes", "Bytes that a stream may have; from the placer only.", "stream", read=self._limits
        )
        metrics.reading(
            "stream_pending_messages",
            "Messages that the consumer of a stream has not acknowledged; from the placer only.",
            "stream",
            "consumer",
            read=self._pending,
        )
        self._join_devices(metrics)

    def _join_devices(self, metrics: Metrics) -> None:
        metrics.reading("devices", "Devices of this host by kind and state.", "kind", "state", read=self._states)
        metrics.reading(
            "device_info", "Always 1; the labels tell the device.", "device", "kind", "name", read=self._names
        )
        metrics.reading(
            "device_memory_bytes", "Memory of a GPU, or a CPU slot's share.", "device", "kind", read=self._memory
        )
        metrics.reading(
            "device_memory_used_bytes",
            "Of it in use; of a CPU slot its share of what the host uses.",
            "device",
            "kind",
            read=self._memory_used,
        )
        metrics.reading(
            "device_utilisation_ratio",
            "Part of the time that a GPU computed, or that the cores of a slot were busy, at the last heartbeat.",
            "device",
            "kind",
            read=self._utilisation,
        )
        metrics.reading("device_temperature_celsius", "Of a GPU.", "device", "kind", read=self._temperature)

    async def run(self) -> None:
        """See how full the streams are, as long as somebody reads it, until cancelled."""
        consumers = job_consumer(self.bus.subjects), event_consumer(self.bus.subjects)
        while True:
            if self.placer.is_placer:
                try:
                    self._fills = tuple([await fill(self.bus, consumer) for consumer in consumers])
                    self._filled_s = clock.boottime_s()
                except TransientError as exc:
                    logger.info("streams not looked at", extra={"problem": str(exc)})
            await asyncio.sleep(_ASK_S)
            await self._is_read.wait()
            self._is_read.clear()

    # --- of the cluster ----------------------------------------------------------------------------------------------

    def _is_placer(self) -> Readings:
        self._is_read.set()
        self.devices.is_watched = True
        yield (), int(self.placer.is_placer)

    def _jobs(self) -> Numbers:
        if self.placer.is_placer:
            yield from (((state,), self.placer.known.counts[state]) for state in get_args(JobState))

    def _oldest(self) -> Numbers:
        if self.placer.is_placer:
            ledger, now_s = self.facts.ledger, clock.boottime_s()
            free = (since for job, since in ledger.queued_since.items() if not ledger.waiting[job].record.spec.after)
            yield (), now_s - next(free, now_s)  # they stand in the order in which they were queued

    def _known_fills(self) -> tuple[Fill, ...]:
        is_known = self.placer.is_placer and clock.boottime_s() - self._filled_s < _OLD_S
        return self._fills if is_known else ()

    def _messages(self) -> Numbers:
        yield from (((one.stream,), one.messages) for one in self._known_fills())

    def _bytes(self) -> Numbers:
        yield from (((one.stream,), one.bytes) for one in self._known_fills())

    def _limits(self) -> Numbers:
        yield from (((one.stream,), one.limit_bytes) for one in self._known_fills())

    def _pending(self) -> Numbers:
        yield from (((one.stream, one.consumer), one.pending + one.unacknowledged) for one in self._known_fills())

    # --- of the host's devices ---------------------------------------------------------------------------------------

    def _states(self) -> Numbers:
        counted: dict[tuple[str, ...], int] = {}
        for one in self.devices.states():
            at = (one.device.kind, one.state)
            counted[at] = counted.get(at, 0) + 1
        yield from counted.items()

    def _names(self) -> Numbers:
        yield from (((one.id, one.kind, one.name), 1) for one in self.devices.shown)

    def _memory(self) -> Numbers:
        yield from (((one.id, one.kind), one.memory_bytes) for one in self.devices.shown)

    def _memory_used(self) -> Numbers:
        yield from (((one.id, one.kind), one.memory_used_bytes) for one in self.devices.shown)

    def _utilisation(self) -> Numbers:
        for one in self.devices.shown:
            if one.utilisation_frac is not None:
                yield (one.id, one.kind), one.utilisation_frac

    def _temperature(self) -> Numbers:
        for one in self.devices.shown:
            if one.temperature_c is not None:
                yield (one.id, one.kind), one.temperature_c


def _class_of(priority: int) -> str:
    """Three classes, so that a histogram stays small."""
    return "normal" if priority == 0 else "high" if priority > 0 else "low"
