"""What hosts report of themselves and who holds what, read from the buckets of devices and leases.

Keys in `railbus_devices`: `<host>` is a HostReport, `<host>.runner` a RunnerReport, `<host>.drain` says that the host
takes no new jobs, `<device>.cordon` is a Cordon. In `railbus_leases`: `<device>`, or `<device>.<share>` of a GPU that
is shared, is a Lease, `<device>.reclaim` a ReclaimMark. Reports and leases vanish when they are not renewed, and a
watch would not tell that; so both buckets are read whole.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from railbus_device_manager.manager import ClusterFacts
from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket, Entry, SnapshotEnd
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.devices import Cordon, HostReport, Lease, ReclaimMark, RunnerReport
from railbus_shared.contracts.model import Contract
from railbus_shared.errors import WireError
from railbus_shared.leases import is_lease_key, reclaim_key

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Contract)

_LAPSE_S: Final = 0.1  # the server may be so late in removing a key


class Reports:
    """Reads the buckets and tells the facts."""

    def __init__(self, bus: Bus, facts: ClusterFacts, *, lease_ttl_s: float = math.inf) -> None:
        """`lease_ttl_s` is the life of jobs' leases: one that was not renewed for so long is looked for at once."""
        self._facts = facts
        self._lease_ttl_s = lease_ttl_s
        self.devices = Bucket(bus, bus.subjects.devices)
        self.leases = Bucket(bus, bus.subjects.leases)
        self._heard: dict[str, int] = {}
        self._heard_hosts: dict[str, int] = {}
        self._lease_revisions: dict[str, int] = {}
        """Newest that the watch has told, by key; and when that was."""
        self._lease_heard_s: dict[str, float] = {}
        self._usable: dict[str, tuple[tuple[object, ...], ...]] = {}
        """What the watch told last of each host's devices, as far as it concerns placing."""
        self._has_read = False
        self._read_at_s = -math.inf
        self._applied_s = -math.inf
        """When the reading was asked for that the facts rest on."""
        self._marked_s: dict[str, float] = {}
        """When this process last put a mark on a device."""
        self._is_outdated = False

    async def refresh(self, *, older_than_s: float = 0.0) -> None:
        """Read everything as it is now; two requests, and none if the last reading is not older."""
        asked_s = clock.boottime_s()
        is_young = older_than_s > 0 and asked_s - self._read_at_s < older_than_s
        if is_young and not any(self._read_at_s < lapse <= asked_s for lapse in self.lapses()):
            return
        self._is_outdated = False
        leases, devices = await self.leases.snapshot(), await self.devices.snapshot()
        if asked_s < self._applied_s:
            return  # another reading was asked for later and came before: what it told must not be taken back
        self._applied_s = asked_s
        self.apply(leases, devices, now=clock.boottime_s(), asked_at=asked_s)
        self._read_at_s = -math.inf if self._is_outdated else asked_s

    async def mark(self, mark: ReclaimMark) -> None:
        """Keep a device from being granted; known at once, also while an older reading is on its way."""
        await self.leases.put(reclaim_key(mark.device), mark.to_map())
        self._marked_s[mark.device] = clock.boottime_s()
        self._facts.apply_mark(mark.device, mark, now=self._marked_s[mark.device])

    def lapses(self) -> list[float]:
        """When each lease of a job lapses, unless it is renewed before; for those whose last renewal was heard."""
        heard = self._lease_heard_s
        return [heard[key] + self._lease_ttl_s + _LAPSE_S for key in self._facts.leases if key in heard]

    async def watch_leases(self, changed: Callable[[], None]) -> None:
        """Hear of leases that are granted or ended, until cancelled; `changed` is called at an end."""
        async with contextlib.aclosing(self.leases.watch()) as entries:
            async for entry in entries:
                if not isinstance(entry, SnapshotEnd) and self.hear_lease(entry, now=clock.boottime_s()):
                    changed()

    async def watch_devices(self, changed: Callable[[], None]) -> None:
        """Hear of what takes devices out of service or brings them back, until cancelled."""
        async with contextlib.aclosing(self.devices.watch()) as entries:
            async for entry in entries:
                if not isinstance(entry, SnapshotEnd) and self.hear_device(entry):
                    changed()

    def hear_lease(self, entry: Entry, *, now: float) -> bool:
        """Take over what the watch tells of a lease; returns whether one has ended.

        The end of a lease whose attempt is not known to be over calls for a whole reading: what its runner reported
        before must not pass for newer.
        """
        if not is_lease_key(entry.key) or entry.revision <= self._lease_revisions.get(entry.key, 0):
            return False
        self._lease_revisions[entry.key], self._lease_heard_s[entry.key] = entry.revision, now
        if entry.value is not None:
            for key, lease in _parsed({entry.key: entry}, None, Lease).items():
                self._facts.apply_lease(key, lease, now=now)
            return False
        ended = self._facts.leases.get(entry.key)
        record = self._facts.jobs.get(ended.holder) if ended is not None else None
        if ended is not None and record is not None and record.is_active and record.lease_epoch == ended.lease_epoch:
            self._outdate()
        else:
            self._facts.apply_lease(entry.key, None, now=now)
        return True

    def hear_device(self, entry: Entry) -> bool:
        """Take notice of what the watch tells of hosts; returns whether everything is to be read again."""
        if not self._concerns_placing(entry):
            return False
        self._outdate()
        return True

    def _outdate(self) -> None:
        """Something has been heard that only a whole reading tells, begun from now on."""
        self._is_outdated, self._read_at_s = True, -math.inf

    def _concerns_placing(self, entry: Entry) -> bool:
        """Not a report that says at a heartbeat what the one before said, unless a mark waits for it."""
        host, _, kind = entry.key.partition(".")
        if kind == "runner":
            known = self._facts.runners.get(host)
            is_ready = entry.value is not None and entry.value.get("ready") is True
            return is_ready != (known is not None and known.ready) or bool(self._facts.marks)
        if kind:
            return kind in {"drain", "cordon"}
        before, self._usable[host] = self._usable.get(host), _usable(entry.value)
        return before != self._usable[host] or host not in self._facts.hosts or bool(self._facts.marks)

    def _is_heard_since(self, key: str, read: Entry | None, asked_s: float) -> bool:
        """Whether the watch has told something newer of a lease than the reading that was asked for then."""
        if read is not None:
            return read.revision < self._lease_revisions.get(key, 0)
        return self._lease_heard_s.get(key, -math.inf) >= asked_s

    def apply(
        self, leases: Mapping[str, Entry], devices: Mapping[str, Entry], *, now: float, asked_at: float = math.inf
    ) -> None:
        """Tell the facts what the buckets hold: leases first, so that no report passes for newer than their end."""
        facts = self._facts
        held = _parsed({key: entry for key, entry in leases.items() if is_lease_key(key)}, None, Lease)
        for key in facts.leases.keys() | held.keys():
            if not self._is_heard_since(key, leases.get(key), asked_at):
                facts.apply_lease(key, held.get(key), now=now)
        marks = _parsed(leases, "reclaim", ReclaimMark)
        for device in facts.marks.keys() | marks.keys():
            if device in marks or self._marked_s.get(device, -math.inf) < asked_at:
                facts.apply_mark(device, marks.get(device), now=now)
        facts.apply_cordons(_parsed(devices, "cordon", Cordon))
        self._apply_hosts(devices, now)
        self._apply_runners(_parsed(devices, "runner", RunnerReport), devices, now)
        self._has_read = True

    def _apply_hosts(self, devices: Mapping[str, Entry], now: float) -> None:
        draining = {key.partition(".")[0] for key in devices if key.endswith(".drain")}
        hosts = _parsed(devices, "", HostReport)
        for host in self._facts.hosts.keys() | hosts.keys():
            report = hosts.get(host)
            if report is None:
                self._facts.apply_host(host, None)
                continue
            revision, heard = devices[host].revision, self._heard_hosts.get(host, 0)
            if revision < heard:
                continue  # a reading that was overtaken by a later one
            is_news = self._has_read and revision > heard
            self._heard_hosts[host] = revision
            report = with_cordons(report, self._facts.cordons)
            report = report.changed(draining=True) if host in draining else report
            self._facts.apply_host(host, report, heard_at=now if is_news else None)

    def _apply_runners(self, runners: Mapping[str, RunnerReport], devices: Mapping[str, Entry], now: float) -> None:
        """A report counts as heard now if its key was written since the last look."""
        for host in self._facts.runners.keys() | runners.keys():
            entry = devices.get(f"{host}.runner")
            revision = entry.revision if entry is not None else 0
            if host in runners and revision <= self._heard.get(host, 0):
                continue
            self._heard[host] = revision
            self._facts.apply_runner(host, runners.get(host), now=now, live=self._has_read)


def _usable(report: Mapping[str, object] | None) -> tuple[tuple[object, ...], ...]:
    """What of a host's report decides whether its devices may be granted."""
    devices = report.get("devices") if report is not None else None
    listed = [one for one in devices if isinstance(one, Mapping)] if isinstance(devices, list | tuple) else []
    return tuple((one.get("id"), one.get("healthy"), bool(one.get("compute_pids"))) for one in listed)


def with_cordons(report: HostReport, cordons: Mapping[str, Cordon]) -> HostReport:
    """The report with its devices cordoned that are, whoever wrote it."""
    if not any(device.id in cordons for device in report.devices):
        return report
    return report.changed(
        devices=tuple(
            device.changed(cordoned=True, health_reason=cordons[device.id].reason) if device.id in cordons else device
            for device in report.devices
        )
    )


def _parsed(entries: Mapping[str, Entry], kind: str | None, contract: type[C]) -> dict[str, C]:
    """Values of the keys `<name>` or `<name>.<kind>`, by name; what cannot be read is reported and left out.

    Without a kind every key is taken, and by its whole name.
    """
    found: dict[str, C] = {}
    for key, entry in entries.items():
        name, _, suffix = key.partition(".")
        if kind is not None and suffix != kind:
            continue
        try:
            found[key if kind is None else name] = contract.parse(entry.value or {})
        except WireError as exc:
            logger.warning("a key cannot be read", extra={"key": key, "problem": str(exc)})
    return found
