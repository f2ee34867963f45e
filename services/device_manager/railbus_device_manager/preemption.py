"""Who makes room: running jobs of strictly lower priority, as few as can be, whose devices let a waiting job start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from railbus_device_manager.cluster import NEVER, Cluster, Pool, Slot
from railbus_device_manager.decisions import Decision, Preemption
from railbus_device_manager.wishes import Waiting
from railbus_shared.names import JobId


@dataclass(frozen=True)
class Room:
    """What a waiting job gets once its victims have gone."""

    preemptions: tuple[Preemption, ...]
    slots: tuple[Slot, ...]
    cost: tuple[float, float, int, str]
    """Less is better: highest priority of a victim, device seconds that may be lost, number of victims."""


def victims(job: Waiting, pools: Sequence[Pool], decision: Decision) -> Room | None:
    """The room that costs least; None if the job may not preempt, or would not start for it."""
    cluster = decision.cluster
    if not may_preempt(job, cluster):
        return None
    rooms = [room for pool in pools if (room := _room_in(pool, job, decision)) is not None]
    return min(rooms, key=lambda room: room.cost, default=None)


def may_preempt(job: Waiting, cluster: Cluster) -> bool:
    """Whether the job has waited long enough, and some running job is of lower priority."""
    return (
        cluster.policy.preempts
        and cluster.lowest_priority < job.priority
        and job.wish.devices.fraction is None
        and cluster.now - cluster.queued_since.get(job.id, cluster.now) >= cluster.policy.preempt_after_s
    )


def _room_in(pool: Pool, job: Waiting, decision: Decision) -> Room | None:
    if not pool.may_start or pool.is_spread:
        return None
    keeper, free, yields_to, leaving = decision.keeper, decision.free, decision.cluster.yields_to, decision.leaving
    priority = job.priority
    unkept = [
        slot
        for slot in pool.slots
        if slot.number not in keeper
        and (free[slot.number] == slot.shares or yields_to[slot.number] < priority or slot.number in leaving)
    ]
    if len(unkept) < pool.count:
        return None
    ready = [slot for slot in unkept if free[slot.number] == slot.shares or slot.number in leaving]
    chosen = _fewest(_by_victims(unkept, ready), pool.count - len(ready), decision.cluster)
    return (
        None
        if chosen is None
        else _room(pool, job, [slot for slot in unkept if slot not in ready], ready, chosen, decision)
    )


def _room(pool: Pool, job: Waiting, held: list[Slot], ready: list[Slot], names: list[str], decision: Decision) -> Room:
    holders = {name: decision.cluster.holders[name] for name in names}
    cleared = [slot for slot in held if set(slot.holders) <= holders.keys()]
    return Room(
        preemptions=tuple(
            Preemption(JobId(name), holder.record.lease_epoch, JobId(job.id)) for name, holder in holders.items()
        ),
        slots=tuple([*cleared, *ready][: pool.count]),
        cost=(
            max((holder.record.priority for holder in holders.values()), default=-NEVER),
            sum(holder.unsaved_s for holder in holders.values()),
            len(holders),
            pool.host,
        ),
    )


def _by_victims(slots: Sequence[Slot], ready: Sequence[Slot]) -> dict[tuple[str, ...], int]:
    """How many of the devices that are not ready are gained by the end of which jobs together."""
    gained: dict[tuple[str, ...], int] = defaultdict(int)
    for slot in slots:
        if slot not in ready:
            gained[tuple(sorted(slot.holders))] += 1
    return gained


def _fewest(gained: Mapping[tuple[str, ...], int], lacking: int, cluster: Cluster) -> list[str] | None:
    """Jobs whose end frees `lacking` devices, lowest priority and least progress first; None if all do not."""

    def cost(names: tuple[str, ...]) -> tuple[int, float, tuple[str, ...]]:
        known = [cluster.holders[name] for name in names]
        return max(one.record.priority for one in known), sum(one.unsaved_s for one in known), names

    chosen: list[tuple[str, ...]] = []
    spare = -lacking
    for names in sorted(gained, key=cost):
        if spare < 0:
            chosen.append(names)
            spare += gained[names]
    if spare < 0:
        return None
    for names in reversed(chosen[:]):  # the dearest first: it may have become needless
        if gained[names] <= spare:
            spare -= gained[names]
            chosen.remove(names)
    return list(dict.fromkeys(name for names in chosen for name in names))
