"""What hosts report of themselves and who holds what, read from the buckets of devices and leases.

Keys in `railbus_devices`: `<host>` is a HostReport, `<host>.runner` a RunnerReport, `<host>.drain` says that the host
takes no new jobs, `<device>.cordon` is a Cordon. In `railbus_leases`: `<device>`, or `<device>.<share>` of a GPU that
is shared, is a Lease, `<device>.reclaim` a ReclaimMark. Reports and leases vanish when they are not renewed, and a
watch would not tell that; so both buckets are read whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TypeVar

from railbus_device_manager.manager import ClusterFacts
from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket, Entry
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.devices import Cordon, HostReport, Lease, ReclaimMark, RunnerReport
from railbus_shared.contracts.model import Contract
from railbus_shared.errors import WireError
from railbus_shared.leases import is_lease_key

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Contract)


class Reports:
    """Reads the buckets and tells the facts."""

    def __init__(self, bus: Bus, facts: ClusterFacts) -> None:
        self._facts = facts
        self.devices = Bucket(bus, bus.subjects.devices)
        self.leases = Bucket(bus, bus.subjects.leases)
        self._heard: dict[str, int] = {}
        self._heard_hosts: dict[str, int] = {}
        self._has_read = False
        self._read_at_s = -math.inf

    async def refresh(self, *, older_than_s: float = 0.0) -> None:
        """Read everything as it is now; two requests, and none if the last reading is not older."""
        if older_than_s > 0 and clock.boottime_s() - self._read_at_s < older_than_s:
            return
        began_s = clock.boottime_s()
        self.apply(await self.leases.snapshot(), await self.devices.snapshot(), now=clock.boottime_s())
        self._read_at_s = began_s

    def apply(self, leases: Mapping[str, Entry], devices: Mapping[str, Entry], *, now: float) -> None:
        """Tell the facts what the buckets hold: leases first, so that no report passes for newer than their end."""
        facts = self._facts
        held = _parsed({key: entry for key, entry in leases.items() if is_lease_key(key)}, None, Lease)
        for key in facts.leases.keys() | held.keys():
            facts.apply_lease(key, held.get(key), now=now)
        marks = _parsed(leases, "reclaim", ReclaimMark)
        for device in facts.marks.keys() | marks.keys():
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
            revision = devices[host].revision
            is_news = self._has_read and revision != self._heard_hosts.get(host)
            self._heard_hosts[host] = revision
            report = with_cordons(report, self._facts.cordons)
            report = report.changed(draining=True) if host in draining else report
            self._facts.apply_host(host, report, heard_at=now if is_news else None)

    def _apply_runners(self, runners: Mapping[str, RunnerReport], devices: Mapping[str, Entry], now: float) -> None:
        """A report counts as heard now if its key was written since the last look."""
        for host in self._facts.runners.keys() | runners.keys():
            entry = devices.get(f"{host}.runner")
            revision = entry.revision if entry is not None else 0
            if host in runners and revision == self._heard.get(host):
                continue
            self._heard[host] = revision
            self._facts.apply_runner(host, runners.get(host), now=now, live=self._has_read)


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
