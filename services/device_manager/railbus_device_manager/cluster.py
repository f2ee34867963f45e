"""The cluster as placement sees it: devices, who holds them until when, and which of them a wish could use.

Kinds of devices are a matter of what the cluster has, not of what is free: a job that prefers gpu to cpu goes to a cpu
only where no host has enough fitting gpus in working order. It waits while those gpus are busy; otherwise most jobs
would end on the slower kind because they came at a bad moment. A host takes part if its runner is ready and offers the
entrypoint.

Nothing here changes during a pass; what a pass has given away stands in its `Decision`. Times are seconds on one clock.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from railbus_device_manager.run_times import RunTimes
from railbus_device_manager.sharing import shares_needed
from railbus_device_manager.wishes import Waiting, Wish, fits, kinds_of, wish
from railbus_shared.contracts.devices import DeviceInfo, RunnerReport
from railbus_shared.contracts.jobs import DeviceKind, JobRecord
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.names import HostId

_OUT_OF_SERVICE: Final = frozenset({"unhealthy", "draining", "cordoned"})
NEVER: Final = math.inf


@dataclass(frozen=True)
class Policy:
    """What an operator decides about the queue."""

    quotas: Mapping[str, float] = field(default_factory=dict)
    """Most devices that an owner's jobs hold at once; `*` for every owner that is not named."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of owners relative to each other; 1 for one that is not named."""
    patience_s: float = 4 * 3600.0
    """How long a job for several devices waits at most for owners who use less."""
    preempts: bool = True
    """Whether a job may take devices from running ones of lower priority."""
    preempt_after_s: float = 0.0
    """How long it must have waited before it does."""
    reservations: int = 8
    """How many jobs that wait for one kind of devices keep some, as long as nobody knows when these will start."""

    rooms: int = 8
    """For how many waiting jobs others make room in one pass."""

    def quota(self, owner: str) -> float:
        return self.quotas.get(owner, self.quotas.get("*", NEVER))


@dataclass(frozen=True)
class Holder:
    """An active job: what it holds and what is known of its end."""

    record: JobRecord
    owner: str
    units: float
    ends_at: float = NEVER
    """When it is expected to end."""
    is_certain: bool = False
    """Whether it ends by then at the latest, by its time limit."""
    can_be_preempted: bool = False
    unsaved_s: float = 0.0
    """Device seconds since its last checkpoint: what a preemption may lose."""


@dataclass(frozen=True)
class Cluster:
    """What jobs may be placed on, and all else that a pass goes by."""

    devices: tuple[DeviceState, ...]
    runners: Mapping[str, RunnerReport]
    """By host; a host without one has no runner now."""
    now: float = 0.0
    policy: Policy = field(default_factory=Policy)
    holders: Mapping[str, Holder] = field(default_factory=dict)
    """Active jobs by id."""
    recent: Mapping[str, float] = field(default_factory=dict)
    """How many devices each owner held lately, on average."""
    cleared_for: Mapping[str, str] = field(default_factory=dict)
    """Devices that were taken from preempted jobs, and the job that is to get them."""
    queued_since: Mapping[str, float] = field(default_factory=dict)
    """By job."""
    run_times: RunTimes = field(default_factory=RunTimes)
    spreads: bool = False
    """Whether a job that does not insist on one host may be spread over several."""
    pools: dict[Wish, list[Pool]] = field(default_factory=dict, compare=False, repr=False)
    """Answers of `pools_of` so far."""

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        known: dict[Hashable, int] = {}
        return tuple(_slot(number, state, self, known) for number, state in enumerate(self.devices))

    @functools.cached_property
    def models(self) -> list[DeviceInfo]:
        """One device of each model: those that fit one wish fit the same others."""
        found = {slot.model: slot.state.device for slot in self.slots}
        return [found[number] for number in range(len(found))]

    @functools.cached_property
    def by_kind(self) -> dict[DeviceKind, dict[HostId, list[Slot]]]:
        """Devices in working order by kind and host, in the order in which they are taken."""
        found: dict[DeviceKind, dict[HostId, list[Slot]]] = {"gpu": {}, "cpu": {}}
        ordered = sorted(self.slots, key=lambda slot: (slot.host, slot.order))
        for slot in ordered:
            if not is_out_of_service(slot.state):
                found[slot.kind].setdefault(slot.host, []).append(slot)
        return found

    @functools.cached_property
    def in_use(self) -> dict[str, float]:
        """Devices that the jobs of each owner hold now."""
        used: dict[str, float] = defaultdict(float)
        for holder in self.holders.values():
            used[holder.owner] += holder.units
        return dict(used)

    @functools.cached_property
    def making_room(self) -> dict[str, list[str]]:
        """Jobs that have been told to make room, by the job for which they do."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, holder in self.holders.items():
            if holder.record.preempted_by is not None:
                found[holder.record.preempted_by].append(name)
        return dict(found)

    @functools.cached_property
    def yields_to(self) -> list[float]:
        """The highest priority among the holders of each device; NEVER where one of them may not be preempted."""
        return [self._priority_of(slot) for slot in self.slots]

    @functools.cached_property
    def lowest_priority(self) -> float:
        """Of the devices that could be preempted."""
        return min(self.yields_to, default=NEVER)

    def are_leaving(self, names: Iterable[str]) -> bool:
        """Whether all of these jobs have been told to make room."""
        known = [self.holders.get(name) for name in names]
        return all(holder is not None and holder.record.preempted_by is not None for holder in known)

    def _priority_of(self, slot: Slot) -> float:
        known = [self.holders.get(name) for name in slot.holders]
        if not known or slot.state.state not in {"leased", "free"}:
            return NEVER
        return max(
            holder.record.priority if holder is not None and holder.can_be_preempted else NEVER for holder in known
        )

    def latest_end(self, job: Waiting) -> float:
        """When a job that starts now has ended, by its limit or as all like it; NEVER where that is not known."""
        return self.now + min(job.limit_s, self.run_times.longest_s(job.run_kind))


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """A device, with what a pass asks of it often."""

    number: int
    state: DeviceState
    id: str
    host: HostId
    kind: DeviceKind
    memory_bytes: int
    shares: int
    free: int
    """Shares that nobody has."""
    holders: tuple[str, ...]
    clear_at: float
    """When all its holders are expected to have ended."""
    is_certain: bool
    """Whether they have by then at the latest."""
    model: int
    """Equal for devices that differ in nothing that a wish can name."""
    order: tuple[int, int, str]
    """Smallest memory first, then as the host counts them."""


def _slot(number: int, state: DeviceState, cluster: Cluster, models: dict[Hashable, int]) -> Slot:
    device, holders, now = state.device, cluster.holders, cluster.now
    model = (device.kind, device.memory_bytes, device.shares, frozenset(device.labels.items()))
    named = state.holders or ((state.holder,) if state.holder else ())
    clear_at, is_certain = now, True
    if state.state != "free" or named:
        known = [holders[name] for name in named if name in holders]
        is_known = state.state in {"leased", "free"} and len(known) == len(named) > 0
        clear_at = max((max(holder.ends_at, now) for holder in known), default=now) if is_known else NEVER
        is_certain = is_known and all(holder.is_certain for holder in known)
    return Slot(
        number=number,
        state=state,
        id=device.id,
        host=HostId(device.host),
        kind=device.kind,
        memory_bytes=device.memory_bytes,
        shares=device.shares,
        free=0 if state.state != "free" else state.free_shares if device.shares > 1 else 1,
        holders=named,
        clear_at=clear_at,
        is_certain=is_certain,
        model=models.setdefault(model, len(models)),
        order=(device.memory_bytes, device.index, device.id),
    )


# --- what a wish could use -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Pool:
    """The devices of one host that fit a wish, enough of them for it once they are free; or those of several hosts."""

    host: HostId
    """The first one in a pool of several."""
    kind: DeviceKind
    wish: Wish
    count: int
    """How many the job wants."""
    slots: tuple[Slot, ...]
    """In working order, smallest memory first."""
    may_start: bool
    """Whether the host's runner is ready."""
    is_spread: bool = False

    @property
    def states(self) -> tuple[DeviceState, ...]:
        return tuple(slot.state for slot in self.slots)

    def need(self, slot: Slot) -> int:
        """Shares of the device that the job takes."""
        return (
            slot.shares if self.wish.devices.fraction is None else shares_needed(slot.state.device, self.wish.devices)
        )


def pools_for(job: JobRecord, cluster: Cluster) -> list[Pool]:
    """Pools of the first kind in the job's order that has any; busy devices count, broken and draining ones do not."""
    return pools_of(wish(job.spec), cluster)


def pools_of(wanted: Wish, cluster: Cluster) -> list[Pool]:
    """`pools_for`, found once for all jobs of one wish."""
    found = cluster.pools.get(wanted)
    if found is None:
        found = next((pools for kind in kinds_of(wanted.devices) if (pools := _pools(wanted, kind, cluster))), [])
        cluster.pools[wanted] = found
    return found


def _pools(wanted: Wish, kind: DeviceKind, cluster: Cluster) -> list[Pool]:
    fitting = _fitting(wanted, kind, cluster)
    count = wanted.devices.count
    pools = [
        Pool(host, kind, wanted, count, tuple(slots), may_start=may_start)
        for host, slots in fitting.items()
        if len(slots) >= count and (may_start := _may_start(wanted, cluster.runners.get(host))) is not None
    ]
    if cluster.spreads and not wanted.devices.same_host:
        ready = [
            slot for host, slots in fitting.items() if _may_start(wanted, cluster.runners.get(host)) for slot in slots
        ]
        if len(ready) >= count and len({slot.host for slot in ready}) > 1:
            pools.append(Pool(ready[0].host, kind, wanted, count, tuple(ready), may_start=True, is_spread=True))
    return pools


def _fitting(wanted: Wish, kind: DeviceKind, cluster: Cluster) -> dict[HostId, list[Slot]]:
    preference = wanted.devices
    if not preference.min_memory_bytes and not preference.labels and preference.fraction is None:
        return cluster.by_kind[kind]
    models = {number for number, device in enumerate(cluster.models) if fits(device, preference)}
    found = {}
    for host, slots in cluster.by_kind[kind].items():
        fitting = [slot for slot in slots if slot.model in models]
        if fitting:
            found[host] = fitting
    return found


def _may_start(wanted: Wish, runner: RunnerReport | None) -> bool | None:
    """Whether the runner can start the job now; None if it never will, because it does not offer the entrypoint."""
    if runner is None:
        return False
    return runner.ready if wanted.entrypoint in runner.entrypoints else None


def is_out_of_service(state: DeviceState) -> bool:
    """Whether the device takes no jobs, whoever asks; also one that somebody still has who may keep it to the end."""
    return state.retired is not None or state.state in _OUT_OF_SERVICE
