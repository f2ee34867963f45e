"""When a waiting job is expected to start, and what that rests on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from railbus_device_manager.cluster import NEVER, Cluster, Pool, Slot, pools_of
from railbus_device_manager.wishes import Waiting

_MOST_AHEAD: Final = 200


class Forecast(NamedTuple):
    """An expected start, on the clock of the cluster; None where nothing can be said."""

    at: float | None
    basis: str


def forecast(job: Waiting, turns: Iterable[Waiting], cluster: Cluster) -> Forecast:
    """The expected start of one of the jobs of `turns`, which are in the order of their turns.

    Jobs before it take the devices that they could have first, each for as long as it is expected to run.
    """
    clear_at = [cluster.now if slot.free == slot.shares else slot.clear_at for slot in cluster.slots]
    for number, ahead in enumerate(turns):
        if ahead.id != job.id and number >= _MOST_AHEAD:
            return Forecast(None, f"more than {_MOST_AHEAD} jobs are before it")
        at, slots = _earliest(ahead, cluster, clear_at)
        if ahead.id == job.id:
            return _told(at, slots, number, cluster)
        ends_at = at + cluster.run_times.expected_s(ahead.record.spec)
        for slot in slots:
            clear_at[slot.number] = ends_at
    return Forecast(None, "it has no turn yet")


def _earliest(job: Waiting, cluster: Cluster, clear_at: list[float]) -> tuple[float, list[Slot]]:
    """When and on which devices a job could start; NEVER where that is not known."""
    best: tuple[float, list[Slot]] = (NEVER, [])
    for pool in pools_of(job.wish, cluster):
        slots = sorted(pool.slots, key=lambda slot: (clear_at[slot.number], slot.order))[: pool.count]
        at = _at(pool, slots, clear_at)
        if not best[1] or at < best[0]:
            best = (at, slots)
    return best


def _at(pool: Pool, slots: list[Slot], clear_at: list[float]) -> float:
    return max(clear_at[slot.number] for slot in slots) if pool.may_start else NEVER


def _told(at: float, slots: list[Slot], ahead: int, cluster: Cluster) -> Forecast:
    names = dict.fromkeys(name for slot in slots for name in slot.holders)
    if at == NEVER:
        unknown = [name for name in names if name not in cluster.holders or cluster.holders[name].ends_at == NEVER]
        who = unknown[0] if unknown else "a job before it"
        return Forecast(None, f"nobody knows when {who} ends" if slots else "no device for it is in service")
    bases = {cluster.run_times.basis(cluster.holders[name].record.spec) for name in names if name in cluster.holders}
    listed = " and ".join(sorted(basis for basis in bases if basis))
    before = f", behind {ahead} jobs" if ahead > 1 else ", behind 1 job" if ahead else ""
    if not names:
        return Forecast(at, f"devices are free{before}")
    return Forecast(at, f"the end of {', '.join(names)}, by {listed or 'its time limit'}{before}")
