"""The device_manager's view of the cluster and what follows from it; no I/O, and `now` is an argument.

`ClusterFacts` is what the buckets say, told by whoever watches them. `DeviceManager` answers from it: who has which
device, which jobs start, why the others wait, which attempts are lost, which devices can be granted again.

An expired lease frees nothing by itself. A device is `reclaiming` while an active record names it without a live lease,
or while a reclaim mark lies on it. Only a report of its host's runner, made after the lease had lapsed and without the
attempt, shows that the processes are gone, and for a GPU only a report of its host's device_manager, made after it as
well, that the memory is back. All times are seconds on one clock of this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from railbus_device_manager.cluster import Cluster, Policy
from railbus_device_manager.ledger import Ledger
from railbus_device_manager.placement import Decision, decide_waiting, waits_for
from railbus_device_manager.reasons import ITS_SUBMITTER, Reason, headline
from railbus_device_manager.states import device_state
from railbus_device_manager.watch import Use, is_clear
from railbus_device_manager.wishes import Waiting
from railbus_shared.contracts.devices import (
    AttemptRef,
    Cordon,
    DeviceInfo,
    HostReport,
    Lease,
    ReclaimMark,
    RunnerReport,
)
from railbus_shared.contracts.jobs import JobRecord, JobState
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.names import DeviceId, HostId, JobId

T = TypeVar("T")


@dataclass(frozen=True)
class LostAttempt:
    """An active record whose leases have all lapsed, with what is known of its processes."""

    record: JobRecord
    cause: Literal["lease_lost", "runner_lost", "host_lost"]
    """`lease_lost`: its runner still has it; `host_lost`: neither runner nor device_manager of its host report."""
    processes_gone: bool
    """Whether its devices are free once the record is queued again; else each needs a reclaim mark, made before."""

    @property
    def marks(self) -> tuple[DeviceId, ...]:
        """Devices that need a reclaim mark."""
        return () if self.processes_gone else tuple(map(DeviceId, self.record.devices))


@dataclass
class ClusterFacts:
    """The newest value of every key that placement looks at; None where a key is gone."""

    hosts: dict[str, HostReport] = field(default_factory=dict)
    away: dict[str, HostReport] = field(default_factory=dict)
    """Last reports of hosts that do not report any more; they may come back."""
    runners: dict[str, RunnerReport] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    """By key, which is the device or one of its shares; a key exists as long as the lease lives."""
    cordons: dict[str, Cordon] = field(default_factory=dict)
    """By device; the devices in `hosts` have them already."""
    marks: dict[str, ReclaimMark] = field(default_factory=dict)
    """By device."""
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    """Records that are not final."""
    ended: dict[str, JobState] = field(default_factory=dict)
    """Final states, which `after` asks for."""
    retried_by: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The newest retry of a job and its age, by the job: it stands for it where others come `after`."""
    host_heard_at: dict[str, float] = field(default_factory=dict)
    """When a host's device_manager was last heard as it spoke, not out of the store."""
    runner_heard_at: dict[str, float] = field(default_factory=dict)
    """When a host's runner was last heard as it spoke, not out of the store."""
    leaseless_since: dict[str, float] = field(default_factory=dict)
    """Since when an active record has had no live lease, by job."""
    marked_at: dict[str, float] = field(default_factory=dict)
    """When a mark was first seen, by device."""
    held_until: dict[str, float] = field(default_factory=dict)
    """Until when a job is not placed after an end: its back-off, from when it was first seen queued again."""
    ledger: Ledger = field(default_factory=Ledger)
    _by_device: dict[str, dict[str, Lease]] = field(default_factory=dict, repr=False)
    """The same leases, by device and key."""

    def apply_host(self, host: str, report: HostReport | None, *, heard_at: float | None = None) -> None:
        """`heard_at` is None for a value that was in the store before, or that was told already."""
        before = self.hosts.get(host)
        _put(self.hosts, host, report)
        _put(self.away, host, before or self.away.get(host) if report is None else None)
        if report is None or heard_at is not None:
            _put(self.host_heard_at, host, heard_at if report is not None else None)

    def known_devices(self) -> list[DeviceInfo]:
        """Devices of every host that has reported since this process began, also of those that are away now."""
        return [device for report in (*self.hosts.values(), *self.away.values()) for device in report.devices]

    def apply_cordons(self, cordons: Mapping[str, Cordon]) -> None:
        self.cordons = dict(cordons)

    def apply_runner(self, host: str, report: RunnerReport | None, *, now: float, live: bool = True) -> None:
        """`live` is false for a value that was in the store before: it may be older than what it is compared with."""
        _put(self.runners, host, report)
        _put(self.runner_heard_at, host, now if report is not None and live else None)

    def apply_lease(self, key: str, lease: Lease | None, *, now: float) -> None:
        before = self.leases.get(key)
        _put(self.leases, key, lease)
        _put(self._by_device.setdefault(key.partition(".")[0], {}), key, lease)
        for changed in filter(None, (before, lease)):
            self._watch_leases(changed.holder, now)

    def apply_mark(self, device: str, mark: ReclaimMark | None, *, now: float) -> None:
        if mark is None or self.marks.get(device) != mark:
            _put(self.marked_at, device, None if mark is None else now)
        _put(self.marks, device, mark)

    def apply_record(self, job: str, record: JobRecord | None, *, now: float) -> None:
        before = self.jobs.get(job)
        is_over = record is None or record.is_final
        self.ledger.observe(job, before, record, now=now)
        _put(self.jobs, job, None if is_over else record)
        _put(self.ended, job, record.state if record is not None and is_over else None)
        if record is not None and record.retry_of is not None:
            newest = self.retried_by.get(record.retry_of, (0, ""))
            self.retried_by[record.retry_of] = max(newest, (record.sequence, job))
        self._wait_out(before, record, job, now)
        if before is None or record is None or before.lease_epoch != record.lease_epoch:
            self.leaseless_since.pop(job, None)  # another attempt, with its own time
        self._watch_leases(job, now)

    def live_leases(self, record: JobRecord) -> Iterator[Lease]:
        """Leases of a record's present attempt."""
        for device in record.devices:
            for lease in self.leases_on(device):
                if (lease.holder, lease.lease_epoch) == (record.id, record.lease_epoch):
                    yield lease

    def leases_on(self, device: str) -> tuple[Lease, ...]:
        """Live leases of a device: one, or one for each share that somebody has."""
        return tuple(self._by_device.get(device, {}).values())

    def named(self) -> dict[str, list[JobRecord]]:
        """The active records that name each device."""
        found: dict[str, list[JobRecord]] = {}
        active = [self.jobs[job] for job in self.ledger.running if job in self.jobs]
        for record in active:
            for device in record.devices:
                found.setdefault(device, []).append(record)
        return found

    def _wait_out(self, before: JobRecord | None, record: JobRecord | None, job: str, now: float) -> None:
        """Count a back-off on our own clock, from when the job is first seen in the queue with it."""
        if record is None or record.state != "queued" or record.backoff_s <= 0:
            self.held_until.pop(job, None)
        elif before is None or before.state != "queued" or before.lease_epoch != record.lease_epoch:
            self.held_until[job] = now + record.backoff_s

    def _watch_leases(self, job: str, now: float) -> None:
        record = self.jobs.get(job)
        if record is None or not record.is_active or any(self.live_leases(record)):
            self.leaseless_since.pop(job, None)
        else:
            self.leaseless_since.setdefault(job, now)


@dataclass(frozen=True)
class DeviceManager:
    """Answers about the cluster, from the facts."""

    facts: ClusterFacts = field(default_factory=ClusterFacts)
    policy: Policy = field(default_factory=Policy)

    def device_states(self) -> list[DeviceState]:
        """Every known device and who has it, by host, in the order of its report."""
        named = self.facts.named()
        return [
            device_state(
                device,
                draining=report.draining,
                leases=self.facts.leases_on(device.id),
                mark=self.facts.marks.get(device.id),
                named=named.get(device.id, ()),
            )
            for _, report in sorted(self.facts.hosts.items())
            for device in report.devices
        ]

    def plan(self, now: float) -> Decision:
        """Jobs that start now, and attempts that make room."""
        return decide_waiting(self.startable(now), self.cluster(now))

    def reasons(self, now: float, *, among: Iterable[str] | None = None) -> dict[JobId, str]:
        """Why each queued job waits that the plan does not start; of these jobs only, or of all."""
        decision, waiting = self.plan(now), self.facts.ledger.waiting
        placed = {placement.job_id for placement in decision.placements}
        jobs = waiting.values() if among is None else [waiting[job] for job in among if job in waiting]
        return {
            JobId(job.id): (self.obstacle(job.record, now) or headline(job, decision.cluster, decision)).text
            for job in jobs
            if job.id not in placed
        }

    def cluster(self, now: float) -> Cluster:
        """What placement goes by."""
        facts, ledger = self.facts, self.facts.ledger
        return Cluster(
            devices=tuple(self.device_states()),
            runners=facts.runners,
            now=now,
            policy=self.policy,
            holders=ledger.holders(facts.jobs, now),
            recent=ledger.recent(now),
            cleared_for=ledger.cleared_for(now),
            queued_since=ledger.queued_since,
            run_times=ledger.run_times,
        )

    def startable(self, now: float) -> list[Waiting]:
        """Queued jobs that nothing of their own holds back."""
        held_until = self.facts.held_until
        return [
            job
            for job in self.facts.ledger.waiting.values()
            if not job.is_held
            and (job.id not in held_until or held_until[job.id] <= now)
            and not (job.record.spec.after and waits_for(job.record, self._states_before(job.record)))
        ]

    def obstacle(self, job: JobRecord, now: float) -> Reason | None:
        """Why the job may not start whatever is free; None if it may."""
        if job.cancel_requested:
            return Reason("cancelling", "is being cancelled")
        if job.held_by is not None:
            who = "its submitter" if job.held_by == ITS_SUBMITTER else job.held_by
            return Reason("held", f"is held by {who}, until `railbus release`")
        if before := waits_for(job, self._states_before(job)):
            return Reason("dependency", before)
        held_s = self.facts.held_until.get(job.id, now) - now
        return Reason("backoff", f"is tried again in {math.ceil(held_s)} s") if held_s > 0 else None

    def lost(
        self, now: float, *, contact_since: float, ttl_s: float, grace_s: float, placed_grace_s: float
    ) -> list[LostAttempt]:
        """Attempts whose leases have all lapsed; their jobs are to be queued again.

        Args:
            contact_since: when this process last connected: until one whole time-to-live later lapsed leases prove
                nothing, because their runners may have been cut off from the store as well.
            ttl_s: life of a lease that is not renewed.
            grace_s: how long an attempt must have been without a lease; the record of its end may still be on its way.
            placed_grace_s: the same for a placed job, whose leases may not have been made yet.
        """
        if now - contact_since < ttl_s:
            return []
        lost: list[LostAttempt] = []
        for job, since in sorted(self.facts.leaseless_since.items()):
            record = self.facts.jobs[job]
            if now - since >= (placed_grace_s if record.state == "placed" else grace_s):
                lost.append(self._lost(record, since))
        return lost

    def released_marks(self) -> list[ReclaimMark]:
        """Marks that can go: since then the host has said that processes and memory of the attempt are gone."""
        released: list[ReclaimMark] = []
        for device, mark in sorted(self.facts.marks.items()):
            ref = AttemptRef(job=mark.job, lease_epoch=mark.lease_epoch)
            since = self.facts.marked_at[device]
            if self._are_gone(mark.host, ref, since) and self._is_back(mark.host, device, ref, since):
                released.append(mark)
        return released

    def use_of(self, host: str) -> Use:
        """Who uses the devices of a host, for its own look at them."""
        own = {lease.device for lease in self.facts.leases.values() if lease.host == host}
        marks = {
            device: (mark, self.facts.marked_at[device])
            for device, mark in self.facts.marks.items()
            if mark.host == host
        }
        return Use(
            leases={device: self.facts.leases_on(device) for device in own},
            marks=marks,
            named=frozenset(self.facts.named()),
            cordons=self.facts.cordons,
        )

    def _states_before(self, job: JobRecord) -> dict[str, str]:
        """States of the jobs that this one comes after, where they are known; a retry speaks for what it retries."""
        states = {other: self._state_of(other) for other in job.spec.after}
        return {other: state for other, state in states.items() if state is not None}

    def _state_of(self, job: str) -> str | None:
        jobs, ended, retried_by = self.facts.jobs, self.facts.ended, self.facts.retried_by
        while job in retried_by and ended.get(job) != "succeeded":
            job = retried_by[job][1]
        return jobs[job].state if job in jobs else ended.get(job)

    def _lost(self, record: JobRecord, since: float) -> LostAttempt:
        host = HostId(record.host or "")
        ref = AttemptRef(job=record.id, lease_epoch=record.lease_epoch)
        runner = self.facts.runners.get(host)
        gone = self._are_gone(host, ref, since) and all(
            self._is_back(host, device, ref, since) for device in record.devices
        )
        if runner is not None and ref in runner.attempts:
            return LostAttempt(record, "lease_lost", processes_gone=gone)
        is_host_known = runner is not None or host in self.facts.hosts
        return LostAttempt(record, "runner_lost" if is_host_known else "host_lost", processes_gone=gone)

    def _are_gone(self, host: str, ref: AttemptRef, since: float) -> bool:
        """Whether the host's runner has said after `since` that it has no processes of the attempt."""
        runner = self.facts.runners.get(host)
        return runner is not None and ref not in runner.attempts and self.facts.runner_heard_at.get(host, since) > since

    def _is_back(self, host: str, device: str, ref: AttemptRef, since: float) -> bool:
        """Whether a device, if it is a GPU, was seen after `since` with its memory back.

        What others use of a GPU that is shared cannot be told apart from the attempt's, so there its end must do.
        """
        report = self.facts.hosts.get(host)
        info = next((one for one in report.devices if one.id == device), None) if report is not None else None
        if info is None or info.kind != "gpu":
            return True
        others = [lease for lease in self.facts.leases_on(device) if lease.holder != ref.job]
        return bool(others) or (self.facts.host_heard_at.get(host, since) > since and is_clear(info))


def _put(values: dict[str, T], key: str, value: T | None) -> None:
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value
