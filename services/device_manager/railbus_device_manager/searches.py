"""Where jobs of one wish can still start in a pass.

What is open only becomes less while the queue is gone through. So a host that has too few devices for a wish is not
looked at again, and a wish for which no host is left costs nothing: thousands of jobs may wait for the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final

from railbus_device_manager.cluster import NEVER, Cluster, Pool, Slot
from railbus_device_manager.decisions import Decision
from railbus_device_manager.neighbours import on_fewest_hosts, together
from railbus_device_manager.sharing import shares_needed
from railbus_shared.contracts.jobs import DeviceKind

_BY_TIME: Final = itemgetter(0, 1)
Fit = tuple[bool, float, float, str]


@dataclass(frozen=True, slots=True)
class Found:
    """Devices on which a job may start now."""

    pool: Pool
    slots: Sequence[Slot]
    """Any of them will do."""
    fit: Fit
    """Less is better: one host before several, least memory, then fewest devices that stay free; both leave room."""

    def chosen(self) -> tuple[Slot, ...]:
        """As many of the devices as are wanted, those that belong together."""
        choose = on_fewest_hosts if self.pool.is_spread else together
        return choose(self.slots, self.pool.count)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Devices for which a job waits."""

    pool: Pool
    slots: tuple[Slot, ...]
    at: float
    """When all of them are expected to be free; NEVER where that is not known."""
    lacking: int
    """Of those, how many are in use now."""

    @property
    def rank(self) -> tuple[bool, float, int, str]:
        return not self.pool.may_start, self.at, self.lacking, self.pool.host


class _Entry:
    """A pool, and what was found in it when its host was at `version`."""

    __slots__ = ("found", "pool", "reservation", "reserved_version", "version")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.version = self.reserved_version = -1
        self.found: Found | None = None
        self.reservation: Reservation | None = None


class Search:
    """Answers for one wish; the decision must be the same one every time."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._open = [_Entry(pool) for pool in pools if pool.may_start]
        self._all = [_Entry(pool) for pool in pools if pool.may_start] or [_Entry(pool) for pool in pools]
        self.kind: DeviceKind = pools[0].kind if pools else "gpu"
        self._latest_end = NEVER if pools else -NEVER
        self._has_unkept = True

    def now(self, decision: Decision) -> Found | None:
        """The best devices that nobody keeps."""
        if not self._open:
            return None
        best, versions, dead = None, decision.versions, False
        for entry in self._open:
            version = versions[entry.pool.host]
            if entry.version != version or entry.pool.is_spread:
                entry.version = version
                entry.found = found_in(entry.pool, decision)
            found = entry.found
            if found is None:
                dead = True
            elif best is None or found.fit < best.fit:
                best = found
        if dead:
            self._open = [entry for entry in self._open if entry.found is not None]
        return best

    @property
    def is_shut(self) -> bool:
        """Whether no job of the wish can start any more, however soon it ends."""
        return self._latest_end == -NEVER

    def until(self, end: float, decision: Decision) -> Found | None:
        """The best devices that a job may have which has ended by `end`; those that others keep are among them."""
        if end > self._latest_end:
            return None  # told before
        latest = [(_latest_end(entry.pool, decision), entry.pool) for entry in self._all if entry.pool.may_start]
        self._latest_end = max((at for at, _ in latest), default=-NEVER)
        found = [found_in(pool, decision, end=end) for at, pool in latest if at >= end]
        return min((one for one in found if one is not None), key=lambda one: one.fit, default=None)

    def nearest(self, decision: Decision) -> Reservation | None:
        """The devices that a job will have first, of those that nobody keeps yet."""
        if not self._has_unkept:
            return None
        best, versions = None, decision.versions
        for entry in self._all:
            version = versions[entry.pool.host]
            if entry.reserved_version != version or entry.pool.is_spread:
                entry.reserved_version = version
                entry.reservation = reservation_in(entry.pool, decision)
            found = entry.reservation
            if found is not None and (best is None or found.rank < best.rank):
                best = found
        self._has_unkept = best is not None
        return best


def found_in(pool: Pool, decision: Decision, *, end: float = NEVER) -> Found | None:
    """The best devices of a pool for a job that has ended by `end`."""
    free, open_until = decision.free, decision.open_until
    if pool.wish.devices.fraction is not None:
        return _shared(pool, decision, end)
    slots = [slot for slot in pool.slots if free[slot.number] == slot.shares and end <= open_until[slot.number]]
    if len(slots) < pool.count:
        return None
    memory = slots[0].memory_bytes if pool.count == 1 else sum([slot.memory_bytes for slot in slots[: pool.count]])
    return Found(pool, slots, (pool.is_spread, memory, len(slots), pool.host))


def _shared(pool: Pool, decision: Decision, end: float) -> Found | None:
    """The GPU with the fewest free shares that has enough."""
    free, open_until = decision.free, decision.open_until
    slots = [slot for slot in pool.slots if free[slot.number] >= pool.need(slot) and end <= open_until[slot.number]]
    if not slots:
        return None
    best = min(slots, key=lambda slot: (free[slot.number] / slot.shares, slot.order))
    return Found(pool, (best,), (False, free[best.number] / best.shares, best.memory_bytes, pool.host))


def _latest_end(pool: Pool, decision: Decision) -> float:
    """Latest end of a job that could still have enough devices of the pool; -NEVER if none can."""
    free, open_until = decision.free, decision.open_until
    if pool.wish.devices.fraction is None:
        ends = [open_until[slot.number] for slot in pool.slots if free[slot.number] == slot.shares]
    else:
        ends = [open_until[slot.number] for slot in pool.slots if free[slot.number] >= pool.need(slot)]
    if len(ends) < pool.count:
        return -NEVER
    return max(ends) if pool.count == 1 else sorted(ends, reverse=True)[pool.count - 1]


def reservation_in(pool: Pool, decision: Decision) -> Reservation | None:
    """The devices of a pool that a job will have first; None if too few are left that nobody keeps.

    Devices that are free are left to others where as many that are in use are certain to be free in time.
    """
    now, keeper, is_certain = decision.cluster.now, decision.keeper, decision.is_certain
    left = [(*_free_at(slot, pool, decision), slot) for slot in pool.slots if slot.number not in keeper]
    if len(left) < pool.count:
        return None
    left.sort(key=_BY_TIME)
    at = left[pool.count - 1][0]
    if at not in (NEVER, now):
        left = [one for one in left if one[0] <= at]
        left.sort(key=lambda one: (not (is_certain[one[2].number] and one[0] > now), one[0] > now, one[2].order))
    chosen = left[: pool.count]
    lacking = sum([is_lacking for _, is_lacking, _ in chosen])
    return Reservation(pool, tuple([slot for _, _, slot in chosen]), at if pool.may_start else NEVER, lacking)


def _free_at(slot: Slot, pool: Pool, decision: Decision) -> tuple[float, bool]:
    """When the device has enough shares for the job, and whether it has too few now."""
    left = decision.free[slot.number]
    if pool.wish.devices.fraction is None:
        return (decision.cluster.now, False) if left == slot.shares else (decision.clear_at[slot.number], True)
    need = pool.need(slot)
    if left >= need:
        return decision.cluster.now, False
    for ends_at, shares in _ends(slot, decision.cluster):
        left += shares
        if left >= need:
            return max(decision.cluster.now, ends_at), True
    return NEVER, True


def _ends(slot: Slot, cluster: Cluster) -> list[tuple[float, int]]:
    """When the holders of a shared device end, and how many shares each of them has; those that are known."""
    known = [cluster.holders[name] for name in slot.holders if name in cluster.holders]
    return sorted((holder.ends_at, shares_needed(slot.state.device, holder.record.spec.devices)) for holder in known)
