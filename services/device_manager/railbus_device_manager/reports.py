"""What hosts report of themselves and who holds what, read from the buckets of devices and leases.

Keys in `railbus_devices`: `<host>` is a HostReport, `<host>.runner` a RunnerReport, `<host>.drain` says that the host
takes no new jobs. In `railbus_leases`: `<device>` is a Lease, `<device>.reclaim` a ReclaimMark. Reports and leases
vanish when they are not renewed, and a watch would not tell that; so both buckets are read whole.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

from railbus_device_manager.manager import ClusterFacts
from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket, Entry
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.devices import HostReport, Lease, ReclaimMark, RunnerReport
from railbus_shared.contracts.model import Contract
from railbus_shared.errors import WireError

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Contract)


class Reports:
    """Reads the buckets and tells the facts."""

    def __init__(self, bus: Bus, facts: ClusterFacts) -> None:
        self._facts = facts
        self.devices = Bucket(bus, bus.subjects.devices)
        self.leases = Bucket(bus, bus.subjects.leases)
        self._heard: dict[str, int] = {}
        self._has_read = False

    async def refresh(self) -> None:
        """Read everything as it is now; two requests."""
        self.apply(await self.leases.snapshot(), await self.devices.snapshot(), now=clock.boottime_s())

    def apply(self, leases: Mapping[str, Entry], devices: Mapping[str, Entry], *, now: float) -> None:
        """Tell the facts what the buckets hold: leases first, so that no report passes for newer than their end."""
        facts = self._facts
        held = _parsed(leases, "", Lease)
        for device in facts.leases.keys() | held.keys():
            facts.apply_lease(device, held.get(device), now=now)
        marks = _parsed(leases, "reclaim", ReclaimMark)
        for device in facts.marks.keys() | marks.keys():
            facts.apply_mark(device, marks.get(device), now=now)
        draining = {key.partition(".")[0] for key in devices if key.endswith(".drain")}
        hosts = _parsed(devices, "", HostReport)
        for host in facts.hosts.keys() | hosts.keys():
            report = hosts.get(host)
            facts.apply_host(host, report.changed(draining=True) if report and host in draining else report)
        self._apply_runners(_parsed(devices, "runner", RunnerReport), devices, now)
        self._has_read = True

    def _apply_runners(self, runners: Mapping[str, RunnerReport], devices: Mapping[str, Entry], now: float) -> None:
        """A report counts as heard now if its key was written since the last look."""
        for host in self._facts.runners.keys() | runners.keys():
            entry = devices.get(f"{host}.runner")
            revision = entry.revision if entry is not None else 0
            if host in runners and revision == self._heard.get(host):
                continue
            self._heard[host] = revision
            self._facts.apply_runner(host, runners.get(host), now=now, live=self._has_read)


def _parsed(entries: Mapping[str, Entry], kind: str, contract: type[C]) -> dict[str, C]:
    """Values of the keys `<name>` or `<name>.<kind>`, by name; what cannot be read is reported and left out."""
    found: dict[str, C] = {}
    for key, entry in entries.items():
        name, _, suffix = key.partition(".")
        if suffix != kind:
            continue
        try:
            found[name] = contract.parse(entry.value or {})
        except WireError as exc:
            logger.warning("a key cannot be read", extra={"key": key, "problem": str(exc)})
    return found
