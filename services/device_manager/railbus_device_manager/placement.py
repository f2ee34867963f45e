"""Placement: which waiting jobs start now, on which devices, and why the others wait.

Jobs are taken by priority, oldest first within one, and get all their devices on one host or none: one trainer drives
them all. A host takes part if its runner is ready and offers the entrypoint.

Kinds of devices are a matter of what the cluster has, not of what is free: a job that prefers gpu to cpu goes to a cpu
only where no host has enough fitting gpus in working order. It waits while those gpus are busy; otherwise most jobs
would end on the slower kind because they came at a bad moment.

A job that must wait keeps devices for itself: the free ones of the host where it lacks the fewest. Jobs behind it may
start on what is left, so they never delay it. Every waiting job keeps some, not only the first: else a job for several
cpu slots could starve behind one that waits for gpus.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from railbus_shared.contracts.devices import DeviceInfo, RunnerReport
from railbus_shared.contracts.jobs import DeviceKind, DevicePreference, JobRecord
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.names import DeviceId, HostId, JobId


@dataclass(frozen=True)
class Cluster:
    """What jobs may be placed on."""

    devices: tuple[DeviceState, ...]
    runners: Mapping[str, RunnerReport]
    """By host; a host without one has no runner now."""
    pools: dict[Hashable, list[Pool]] = field(default_factory=dict, compare=False, repr=False)
    """Answers of `pools_for` so far: thousands of waiting jobs often want the same."""


@dataclass(frozen=True)
class Placement:
    """A job starts now."""

    job_id: JobId
    host: HostId
    device_ids: tuple[DeviceId, ...]


@dataclass(frozen=True)
class Preemption:
    """An attempt makes room for a job of higher priority."""

    job_id: JobId
    lease_epoch: int
    by: JobId
    """The job that waits for its devices."""


@dataclass
class Decision:
    """What one look at the queue came to; grows while the queue is gone through."""

    placements: list[Placement] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    kept_for: dict[str, JobId] = field(default_factory=dict)
    """Free devices that a waiting job keeps, by id."""
    taken: set[str] = field(default_factory=set)
    """Devices of the placements."""

    def is_open(self, state: DeviceState) -> bool:
        """Whether the next job may have the device."""
        return state.state == "free" and state.device.id not in self.taken and state.device.id not in self.kept_for


def in_order(queue: Iterable[JobRecord]) -> list[JobRecord]:
    """Highest priority first, oldest first within one."""
    return sorted(queue, key=lambda job: (-job.priority, job.sequence, job.id))


def place(queue: Iterable[JobRecord], cluster: Cluster) -> list[Placement]:
    """The jobs of the queue that start now."""
    return decide(queue, cluster).placements


def decide(queue: Iterable[JobRecord], cluster: Cluster) -> Decision:
    """The jobs that start now, and what is kept for those that wait; all jobs of `queue` may start."""
    decision = Decision()
    hopeless: set[Hashable] = set()
    for job in in_order(queue):
        if wish(job) in hopeless:
            continue  # what is open only becomes less
        pools = pools_for(job, cluster)
        if any(pool.open(decision) for pool in pools):
            _decide_one(job, pools, decision)
        else:
            hopeless.add(wish(job))
    return decision


def _decide_one(job: JobRecord, pools: Sequence[Pool], decision: Decision) -> None:
    chosen = min(
        (pool for pool in pools if pool.may_start and len(pool.open(decision)) >= pool.count),
        key=lambda pool: pool.fit(decision),
        default=None,
    )
    if chosen is not None:
        ids = tuple(DeviceId(state.device.id) for state in chosen.open(decision)[: chosen.count])
        decision.placements.append(Placement(JobId(job.id), chosen.host, ids))
        decision.taken.update(ids)
    else:
        nearest = nearest_pool(pools, decision)
        for state in nearest.open(decision)[: nearest.count]:
            decision.kept_for[state.device.id] = JobId(job.id)


# --- what a job could use --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The devices of one host that fit a job, enough of them for it once they are free."""

    host: HostId
    kind: DeviceKind
    count: int
    """How many the job wants."""
    states: tuple[DeviceState, ...]
    """Healthy, not draining, smallest memory first."""
    may_start: bool
    """Whether the host's runner is ready."""

    def open(self, decision: Decision) -> list[DeviceState]:
        return [state for state in self.states if decision.is_open(state)]

    def fit(self, decision: Decision) -> tuple[int, int, str]:
        """Less is better: memory that the job gets, then devices that stay free on the host; both leave room."""
        free = self.open(decision)
        return sum(state.device.memory_bytes for state in free[: self.count]), len(free), self.host


def nearest_pool(pools: Sequence[Pool], decision: Decision) -> Pool:
    """The pool where the job lacks the fewest devices, of those that may start now if there are any."""
    return min(pools, key=lambda pool: (not pool.may_start, pool.count - len(pool.open(decision)), pool.host))


def pools_for(job: JobRecord, cluster: Cluster) -> list[Pool]:
    """Pools of the first kind in the job's order that has any; busy devices count, broken and draining ones do not."""
    key = wish(job)
    if key not in cluster.pools:
        cluster.pools[key] = _find_pools(job, cluster)
    return cluster.pools[key]


def wish(job: JobRecord) -> Hashable:
    """What of a job decides where it may run; jobs of equal wishes may run on the same devices."""
    wanted = job.spec.devices
    labels = frozenset(wanted.labels.items())
    return job.spec.entrypoint, wanted.kind, wanted.count, wanted.min_memory_bytes, labels


def _find_pools(job: JobRecord, cluster: Cluster) -> list[Pool]:
    for kind in job.spec.devices.kind:
        pools = [
            Pool(host, kind, job.spec.devices.count, states, may_start)
            for host, states in _by_host(cluster, kind, job.spec.devices).items()
            if len(states) >= job.spec.devices.count
            and (may_start := _may_start(job, cluster.runners.get(host))) is not None
        ]
        if pools:
            return pools
    return []


def fits(device: DeviceInfo, wanted: DevicePreference) -> bool:
    """Whether a device has the memory and the labels that are wanted."""
    return device.memory_bytes >= wanted.min_memory_bytes and wanted.labels.items() <= device.labels.items()


def _by_host(cluster: Cluster, kind: DeviceKind, wanted: DevicePreference) -> dict[HostId, tuple[DeviceState, ...]]:
    """Fitting devices in working order, by host, in the order in which they are taken."""
    fitting = [
        state
        for state in cluster.devices
        if state.device.kind == kind
        and state.state not in {"unhealthy", "draining", "cordoned"}
        and fits(state.device, wanted)
    ]
    fitting.sort(key=lambda state: (state.device.memory_bytes, state.device.index, state.device.id))
    hosts = sorted({HostId(state.device.host) for state in fitting})
    return {host: tuple(state for state in fitting if state.device.host == host) for host in hosts}


def _may_start(job: JobRecord, runner: RunnerReport | None) -> bool | None:
    """Whether the runner can start the job now; None if it never will, because it does not offer the entrypoint."""
    if runner is None:
        return False
    return runner.ready if job.spec.entrypoint in runner.entrypoints else None


# --- jobs that wait for others ---------------------------------------------------------------------------------------


def ready(job: JobRecord, records: Mapping[str, JobRecord]) -> bool:
    """Whether all jobs that this one comes after have succeeded; `records` by id."""
    return not waits_for(job, {other: record.state for other, record in records.items()})


def waits_for(job: JobRecord, states: Mapping[str, str]) -> str:
    """What of `after` this job waits for, as a sentence; empty if nothing. `states` are those of jobs by id."""
    waiting = [(other, states.get(other, "not known")) for other in job.spec.after if states.get(other) != "succeeded"]
    if not waiting:
        return ""
    listed = ", ".join(f"{other} ({state})" for other, state in waiting)
    ended = [other for other, state in waiting if state in {"failed", "cancelled"}]
    remedy = f"; {ended[0]} will not succeed unless it is retried" if ended else ""
    return f"waits for {'jobs' if len(waiting) > 1 else 'job'} to succeed: {listed}{remedy}"
