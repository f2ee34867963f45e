"""What placement remembers of jobs: since when they wait and run, what their owners used, who made room for whom.

It is told every change of a record and keeps its own time of it, on the clock of this process; so it begins anew with
every start. Only of jobs that ran already then does it go by what their records say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from railbus_device_manager.cluster import NEVER, Holder
from railbus_device_manager.run_times import RunTimes
from railbus_device_manager.wishes import Waiting, units
from railbus_shared import clock
from railbus_shared.contracts.jobs import JobRecord

_CLEARED_S: Final = 120.0
"""How long devices that were cleared for a job are kept for it alone, behind the grace of those that made room."""
_FORGOTTEN: Final = 1e-3
"""So many devices, on average, count for nothing."""
_REST_S: Final = 600.0
"""How long a job that made room is left alone."""


@dataclass(frozen=True)
class Running:
    """An attempt that holds devices."""

    lease_epoch: int
    held_since: float
    started_at: float = NEVER
    """NEVER where it is not known, and as long as it has not begun to run."""
    saved_at: float = NEVER
    """When it wrote its last checkpoint, or began."""


@dataclass(frozen=True)
class _Cleared:
    by: str
    until: float


@dataclass
class Ledger:
    """Grows by `observe`."""

    half_life_s: float = 3600.0
    """After so long what an owner used counts half."""
    wall_offset_s: float | None = None
    """Seconds since 1970 at the zero of this process's clock; without it nothing is taken from records."""
    waiting: dict[str, Waiting] = field(default_factory=dict)
    """Queued jobs, as placement looks at them."""
    queued_since: dict[str, float] = field(default_factory=dict)
    """By job; a job that is held does not wait yet."""
    running: dict[str, Running] = field(default_factory=dict)
    run_times: RunTimes = field(default_factory=RunTimes)
    _used: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By owner: average devices, decayed, and the time at which that was so."""
    _cleared: dict[str, _Cleared] = field(default_factory=dict)
    _preempted_at: dict[str, float] = field(default_factory=dict)

    def observe(self, job: str, before: JobRecord | None, record: JobRecord | None, *, now: float) -> None:
        """A record has changed; None stands for one that was not known or is gone. `before` is None for a final one."""
        if record is not None and record.state == "queued":
            if job not in self.waiting or self.waiting[job].record is not record:
                self.waiting[job] = Waiting.of(record)
        else:
            self.waiting.pop(job, None)
        if job in self.waiting and not self.waiting[job].is_held:
            self.queued_since.setdefault(job, now)
        else:
            self.queued_since.pop(job, None)
        self._account(job, before, record, now)
        if record is not None and record.is_active:
            self._follow(before, record, now)
        elif record is None or record.is_final:
            self._preempted_at.pop(job, None)
            if record is not None:
                self.run_times.add(record)

    def holders(self, records: Mapping[str, JobRecord], now: float) -> dict[str, Holder]:
        """Active jobs among the records, by id."""
        return {job: self._holder(record, now) for job in self.running if (record := records.get(job)) is not None}

    def recent(self, now: float) -> dict[str, float]:
        """How many devices each owner held lately, on average."""
        known = {owner: self._recent(owner, now) for owner in self._used}
        self._used = {owner: self._used[owner] for owner, used in known.items() if used > _FORGOTTEN}
        return {owner: known[owner] for owner in self._used}

    def cleared_for(self, now: float) -> dict[str, str]:
        """Devices that were taken from preempted jobs, and the queued job that is to get them."""
        self._cleared = {
            device: one for device, one in self._cleared.items() if one.until > now and one.by in self.waiting
        }
        return {device: one.by for device, one in self._cleared.items()}

    def _account(self, job: str, before: JobRecord | None, record: JobRecord | None, now: float) -> None:
        """Book what an attempt used that has ended."""
        held = self.running.get(job)
        if held is None or (record is not None and record.is_active and record.lease_epoch == held.lease_epoch):
            return
        del self.running[job]
        known = record or before
        if known is not None:
            owner, held_s = known.spec.owner or "", now - held.held_since
            self._used[owner] = (self._recent(owner, now) + units(known.spec.devices) * self._faded(held_s), now)

    def _faded(self, held_s: float) -> float:
        """What one device that was held until now counts for."""
        return 1.0 - math.pow(0.5, max(0.0, held_s) / self.half_life_s)

    def _recent(self, owner: str, now: float) -> float:
        used, at = self._used.get(owner, (0.0, now))
        return used * math.pow(0.5, max(0.0, now - at) / self.half_life_s)

    def _follow(self, before: JobRecord | None, record: JobRecord, now: float) -> None:
        known = self.running.get(record.id)
        if known is None:
            known = Running(record.lease_epoch, held_since=now)
        if record.state != "placed" and known.started_at == NEVER:
            started_at = now if before is not None else self._started_at(record)
            known = Running(record.lease_epoch, known.held_since, started_at, now)
        if before is not None and before.checkpoint != record.checkpoint:
            known = Running(known.lease_epoch, known.held_since, known.started_at, now)
        self.running[record.id] = known
        if record.preempted_by is not None:
            self._preempted_at.setdefault(record.id, now)
            until = now + record.spec.stop_grace_s + _CLEARED_S
            for device in record.devices:
                if self._cleared.get(device, _Cleared("", 0)).by != record.preempted_by:
                    self._cleared[device] = _Cleared(record.preempted_by, until)

    def _started_at(self, record: JobRecord) -> float:
        """When an attempt began that was running when this process came to know it."""
        if self.wall_offset_s is None or record.started_at is None or record.attempt > 1:
            return NEVER
        return clock.parse_rfc3339(record.started_at) / clock.NS_PER_S - self.wall_offset_s

    def _holder(self, record: JobRecord, now: float) -> Holder:
        spec, running = record.spec, self.running[record.id]
        has_begun = running.started_at != NEVER
        expected_s = self.run_times.expected_s(spec)
        rested = now - self._preempted_at.get(record.id, -math.inf) >= _REST_S
        return Holder(
            record=record,
            owner=spec.owner or "",
            units=units(spec.devices),
            ends_at=running.started_at + expected_s if has_begun else NEVER,
            is_certain=has_begun and expected_s == spec.time_limit_s,
            can_be_preempted=record.state == "running"
            and spec.preemptible
            and record.preempted_by is None
            and not record.cancel_requested
            and rested,
            unsaved_s=(now - running.saved_at) * units(spec.devices) if running.saved_at != NEVER else 0.0,
        )
