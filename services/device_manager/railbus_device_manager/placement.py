"""Placement: which waiting jobs start now, on which devices, who makes room for them, and what is kept for the others.

A pure function of the queue, the cluster and the time. Jobs have their turns in the order of `turns.py` and get all
their devices or none.

A job that must wait keeps devices for itself: those of the host where it will have them first, by the time limits of
the jobs that hold them or by how long jobs like them took; where nothing is known, of the host where it lacks the
fewest. A job behind it may have a device that is kept only if it is sure to have ended before the device is needed. So
backfilling never delays the head of the queue, and a job for several devices cannot starve behind smaller ones. Once
the start of one waiting job is known, no further one keeps devices of that kind: its own turn will come. As long as
none is known, several do, for the first one may wait for something that never comes.

Where a job would still have to wait, running ones of lower priority make room for it, if their devices are enough.
Those devices are then the job's, whoever's turn is before its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from railbus_device_manager.cluster import NEVER, Cluster, Pool, Slot, pools_for, pools_of
from railbus_device_manager.decisions import Decision, Placement, Preemption
from railbus_device_manager.preemption import Room, may_preempt, victims
from railbus_device_manager.searches import Found, Search
from railbus_device_manager.turns import in_turn
from railbus_device_manager.wishes import Waiting, Wish, fits
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.names import DeviceId, HostId, JobId

__all__ = [
    "Cluster",
    "Decision",
    "Placement",
    "Pool",
    "Preemption",
    "decide",
    "decide_waiting",
    "fits",
    "in_order",
    "pools_for",
    "waits_for",
]


def in_order(queue: Iterable[Waiting], cluster: Cluster) -> Iterable[Waiting]:
    """The jobs of the queue in the order of their turns."""
    shares = {owner: cluster.in_use.get(owner, 0.0) + cluster.recent.get(owner, 0.0) for owner in _owners(cluster)}
    long_ago = cluster.now - cluster.policy.patience_s
    return in_turn(
        queue,
        shares=shares,
        weights=cluster.policy.weights,
        has_waited_long=lambda job: cluster.queued_since.get(job.id, cluster.now) <= long_ago,
    )


def decide(queue: Iterable[JobRecord], cluster: Cluster) -> Decision:
    """The jobs that start now, and what is kept for those that wait; all jobs of `queue` may start."""
    return decide_waiting([Waiting.of(record) for record in queue], cluster)


def decide_waiting(queue: list[Waiting], cluster: Cluster) -> Decision:
    """`decide` for jobs whose wishes are known already."""
    look = _Pass(cluster, queue)
    for job in in_order(queue, cluster):
        if look.is_over_for(job):
            break
        if job.wish not in look.hopeless:
            look.consider(job)
    return look.decision


def _owners(cluster: Cluster) -> set[str]:
    return cluster.in_use.keys() | cluster.recent.keys()


class _Pass:
    """One pass through the queue."""

    def __init__(self, cluster: Cluster, queue: Iterable[Waiting]) -> None:
        self.decision = Decision(cluster)
        self._cluster = cluster
        self._policy = cluster.policy
        self.hopeless: set[Wish] = set()
        """Wishes for which nothing is left to get or to keep; what is left only becomes less."""
        self._searches: dict[Wish, Search] = {}
        self._no_room: dict[Wish, float] = {}
        self._rooms = cluster.policy.rooms
        known = [kind for kind, hosts in cluster.by_kind.items() if hosts]
        self._reservations = dict.fromkeys(known, cluster.policy.reservations)
        self._cleared = _cleared(cluster, queue) if cluster.cleared_for else {}
        for job, slots in self._cleared.items():
            for slot in slots:
                self.decision.keep(slot, JobId(job), NEVER)

    def is_over_for(self, job: Waiting) -> bool:
        """Whether neither this job nor one behind it could get or keep anything."""
        decision = self.decision
        if decision.num_free or decision.kept_for or self._cleared or any(self._reservations.values()):
            return False
        return not (self._rooms and self._policy.preempts and self._cluster.lowest_priority < job.priority)

    def consider(self, job: Waiting) -> None:
        """Let a job have its turn."""
        if self._policy.quotas and self.decision.used.get(job.owner, 0.0) + job.units > self._policy.quota(job.owner):
            return  # it keeps nothing: its owner's jobs must end first
        if self._cleared and job.id in self._cleared:
            self._enter(job, self._cleared.pop(job.id))
            return
        search = self._searches.get(job.wish)
        if search is None:
            search = self._searches[job.wish] = Search(pools_of(job.wish, self._cluster))
        found = search.now(self.decision) or self._behind(job, search)
        if found is not None:
            self._start(job, found)
        else:
            self._wait(job, search)

    def _enter(self, job: Waiting, cleared: list[Slot]) -> None:
        """The turn of a job for which others have made room, or are about to."""
        for slot in cleared:
            self.decision.give_back(slot)
        found = Search(pools_of(job.wish, self._cluster)).now(self.decision)
        if found is None:
            self._keep(job, cleared, NEVER)
            return
        self._start(job, found)
        self._forget()  # what it leaves of the cleared devices is open again

    def _behind(self, job: Waiting, search: Search) -> Found | None:
        """Devices that others keep and that the job will have left when they are needed."""
        if not self.decision.kept_for or search.is_shut:
            return None
        ends_at = self._cluster.latest_end(job)
        return search.until(ends_at, self.decision) if ends_at != NEVER else None

    def _start(self, job: Waiting, found: Found) -> None:
        decision, cluster = self.decision, self._cluster
        slots = found.chosen()
        shares = found.pool.need(slots[0])
        latest = cluster.latest_end(job)
        for slot in slots:
            decision.take(slot, found.pool.need(slot), JobId(job.id), ends_at=latest)
        decision.used[job.owner] = decision.used.get(job.owner, 0.0) + job.units
        decision.ages[job.id] = job.rank
        decision.placements.append(_placement(job, slots, shares))

    def _wait(self, job: Waiting, search: Search) -> None:
        """Keep devices for the job, of running jobs of lower priority if need be."""
        room = self._room(job)
        if room is not None:
            self.decision.clear(room.preemptions)
            self._keep(job, room.slots, NEVER)
            self._forget()  # what victims leave beyond the need may be room for others
        elif self._reservations.get(search.kind):
            nearest = search.nearest(self.decision)
            if nearest is not None:
                is_known = nearest.at != NEVER
                self._reservations[search.kind] = 0 if is_known else self._reservations[search.kind] - 1
                self._keep(job, nearest.slots, nearest.at)
        elif (search.is_shut or not self.decision.kept_for) and not self._cleared and not self._may_find_room(job):
            self.hopeless.add(job.wish)

    def _forget(self) -> None:
        """There is more than there was: look at everything anew."""
        self._searches.clear()
        self._no_room.clear()
        self.hopeless.clear()

    def _keep(self, job: Waiting, slots: Iterable[Slot], until: float) -> None:
        self.decision.ages[job.id] = job.rank
        self.decision.expected[job.id] = until
        for slot in slots:
            self.decision.keep(slot, JobId(job.id), until)

    def _may_find_room(self, job: Waiting) -> bool:
        """Whether others might make room for a job of this wish and priority that has waited for long enough."""
        is_told = self._no_room.get(job.wish, -NEVER) >= job.priority
        return (
            bool(self._rooms) and self._policy.preempts and not is_told and self._cluster.lowest_priority < job.priority
        )

    def _room(self, job: Waiting) -> Room | None:
        """What others would leave to the job; a wish that got nothing gets nothing again, except at higher priority."""
        if not self._may_find_room(job):
            return None
        room = victims(job, pools_of(job.wish, self._cluster), self.decision)
        if room is not None:
            self._rooms -= 1
        elif may_preempt(job, self._cluster):
            self._no_room[job.wish] = job.priority
        return room


def _cleared(cluster: Cluster, queue: Iterable[Waiting]) -> dict[str, list[Slot]]:
    """The devices on which each job is to start for which others make room: cleared ones, and free ones beside them."""
    found: dict[str, list[Slot]] = {}
    given: set[int] = set()
    by_job: dict[str, set[str]] = {}
    for device, by in cluster.cleared_for.items():
        by_job.setdefault(by, set()).add(device)
    for job in (job for job in queue if job.id in by_job):
        ids = by_job[job.id]
        for pool in pools_of(job.wish, cluster):
            slots = [slot for slot in pool.slots if slot.number not in given]
            if any(slot.id in ids for slot in slots):
                slots.sort(key=lambda slot: (slot.id not in ids, not slot.free))
                found[job.id] = slots[: pool.count]
                given.update(slot.number for slot in found[job.id])
                break
    return found


def _placement(job: Waiting, slots: tuple[Slot, ...], shares: int) -> Placement:
    hosts = tuple(HostId(host) for host in dict.fromkeys(slot.host for slot in slots))
    ids = tuple(DeviceId(slot.id) for slot in slots)
    return Placement(JobId(job.id), hosts[0], ids, shares=shares, hosts=hosts if len(hosts) > 1 else ())


# --- jobs that wait for others ---------------------------------------------------------------------------------------


def waits_for(job: JobRecord, states: Mapping[str, str]) -> str:
    """What of `after` this job waits for, as a sentence; empty if nothing. `states` are those of jobs by id."""
    waiting = [(other, states.get(other, "not known")) for other in job.spec.after if states.get(other) != "succeeded"]
    if not waiting:
        return ""
    listed = ", ".join(f"{other} ({state})" for other, state in waiting)
    ended = [other for other, state in waiting if state in {"failed", "cancelled"}]
    remedy = f"; {ended[0]} will not succeed unless it is retried" if ended else ""
    return f"waits for {'jobs' if len(waiting) > 1 else 'job'} to succeed: {listed}{remedy}"
