"""What one pass through the queue has come to so far: what is given away, and what is kept for whom until when."""

from __future__ import annotations

from dataclasses import dataclass, field

from railbus_device_manager.cluster import NEVER, Cluster, Slot
from railbus_shared.names import DeviceId, HostId, JobId


@dataclass(frozen=True)
class Placement:
    """A job starts now."""

    job_id: JobId
    host: HostId
    """The first one, where the devices are of several."""
    device_ids: tuple[DeviceId, ...]
    shares: int = 1
    """Shares that the job takes of each of its devices: all of them, unless it asked for a fraction."""
    hosts: tuple[HostId, ...] = ()
    """All hosts, where they are several."""


@dataclass(frozen=True)
class Preemption:
    """A running job is to make room, after a checkpoint."""

    job_id: JobId
    lease_epoch: int
    by: JobId
    """The job that gets its devices."""


@dataclass
class Decision:
    """Grows while the queue is gone through.

    A device that a waiting job keeps is open to others only until the time at which it is needed, and to nobody if
    that is not known.
    """

    cluster: Cluster
    placements: list[Placement] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    kept_for: dict[str, JobId] = field(default_factory=dict)
    """Free devices that a waiting job keeps, by id."""
    taken: dict[str, JobId] = field(default_factory=dict)
    """Devices of the placements, and the last job that got something of each."""
    expected: dict[str, float] = field(default_factory=dict)
    """When a job that keeps devices is expected to start."""
    ages: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    """Of the jobs that start or keep devices: what comes before what, by priority and age alone."""
    used: dict[str, float] = field(default_factory=dict)
    """Devices that each owner's jobs hold, with the placements."""

    def __post_init__(self) -> None:
        slots = self.cluster.slots
        self.free = [slot.free for slot in slots]
        """Shares of each device that nobody has."""
        self.open_until = [NEVER] * len(slots)
        """Until when each device may be used by jobs behind the one that keeps it."""
        self.clear_at = [slot.clear_at for slot in slots]
        """When each device is expected to be free."""
        self.is_certain = [slot.is_certain for slot in slots]
        """Whether it is by then at the latest."""
        self.keeper: dict[int, JobId] = {}
        self.leaving = {slot.number for slot in slots if slot.holders and self.cluster.are_leaving(slot.holders)}
        """Devices whose holders make room already."""
        self.versions = dict.fromkeys((slot.host for slot in slots), 0)
        """Of each host, raised by every change."""
        self.num_free = sum(1 for slot in slots if slot.free)
        """Devices of which something is free and not kept."""
        self.used = dict(self.cluster.in_use)

    def take(self, slot: Slot, shares: int, job: JobId, *, ends_at: float = NEVER) -> None:
        """Give shares of a device to a job that has surely ended at `ends_at`; NEVER where that is not known."""
        number = slot.number
        self.num_free -= self.free[number] == shares and self.open_until[number] == NEVER
        self.free[number] -= shares
        self.clear_at[number] = max(self.clear_at[number], ends_at)
        self.is_certain[number] &= ends_at != NEVER
        self.versions[slot.host] += 1
        self.taken[slot.id] = job
        self.kept_for.pop(slot.id, None)

    def keep(self, slot: Slot, job: JobId, until: float) -> None:
        """Keep a device for a waiting job, which needs it at `until`; NEVER where that is not known."""
        number = slot.number
        self.num_free -= self.free[number] > 0 and self.open_until[number] == NEVER
        self.keeper[number] = job
        self.open_until[number] = until if until != NEVER else -NEVER
        self.versions[slot.host] += 1
        if self.free[number]:
            self.kept_for[slot.id] = job

    def clear(self, preemptions: tuple[Preemption, ...]) -> None:
        """Let running jobs make room."""
        self.preemptions += preemptions
        names = {one.job_id for one in self.preemptions}
        self.leaving |= {slot.number for slot in self.cluster.slots if slot.holders and names.issuperset(slot.holders)}

    def give_back(self, slot: Slot) -> None:
        """Keep a device no longer."""
        number = slot.number
        del self.keeper[number]
        self.open_until[number] = NEVER
        self.num_free += self.free[number] > 0
        self.versions[slot.host] += 1
        self.kept_for.pop(slot.id, None)
