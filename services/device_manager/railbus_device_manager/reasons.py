"""Why a job waits: a word and a sentence, from the same functions that place jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from railbus_device_manager.cluster import Cluster, Pool, Slot, is_out_of_service, pools_of
from railbus_device_manager.decisions import Decision
from railbus_device_manager.lacks import described, lack_of, lacks
from railbus_device_manager.sharing import shares_needed
from railbus_device_manager.wishes import Waiting, fits, kinds_of
from railbus_shared.contracts.jobs import DeviceKind
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.contracts.waiting import HostReason, WaitWord

_LISTED = 3
ITS_SUBMITTER = "its-submitter"
"""Who holds a job that was submitted held, where it names no owner."""


class Reason(NamedTuple):
    """A headline."""

    word: WaitWord
    text: str
    """One sentence without a full stop."""


def headline(job: Waiting, cluster: Cluster, decision: Decision) -> Reason:
    """Why the job waits although nothing of its own holds it back; `decision` is the one in which it was not placed."""
    quota = cluster.policy.quota(job.owner)
    used = decision.used.get(job.owner, 0.0)
    if used + job.units > quota:
        owner = job.owner or "jobs without an owner"
        devices = "device" if quota == 1 else "devices"
        return Reason("quota", f"{owner} may use {quota:g} {devices} at once and {_have(job)} {used:g}")
    pools = pools_of(job.wish, cluster)
    if not pools:
        never = never_fits(job, cluster)
        return never or Reason("out_of_service", _out_of_order(job, cluster))
    if leaving := making_room(job, cluster, decision):
        return Reason("reclaiming", f"waits for {' and '.join(leaving)} to make room for it")
    nearest = nearest_pool(pools, decision, job)
    wanted = described(nearest.kind, job.wish.devices)
    has = f"{_tally(job, nearest.slots, decision)}{_runner_trouble(nearest, cluster)}"
    return Reason(_word(job, nearest, decision), f"waits for {wanted}: {nearest.host} has {has}")


def making_room(job: Waiting, cluster: Cluster, decision: Decision) -> list[str]:
    """Running jobs whose devices this one gets."""
    return [*cluster.making_room.get(job.id, ()), *(one.job_id for one in decision.preemptions if one.by == job.id)]


def never_fits(job: Waiting, cluster: Cluster) -> Reason | None:
    """Why the job can never start on the cluster as it is, or None if it can once devices are free and in order."""
    entrypoint, devices = job.wish.entrypoint, [state.device for state in cluster.devices]
    refusing = {host for host, runner in cluster.runners.items() if entrypoint not in runner.entrypoints}
    if devices and refusing == set(cluster.runners) and all(device.host in refusing for device in devices):
        return Reason("no_entrypoint", f"no runner offers the entrypoint {entrypoint!r}")
    found = lacks(entrypoint, job.wish.devices, devices, cluster.runners)
    return Reason("no_such_device", "; ".join(lack.text for lack in found)) if found else None


def nearest_pool(pools: Sequence[Pool], decision: Decision, job: Waiting) -> Pool:
    """The pool where the job lacks the fewest devices, of those that may start now if there are any."""

    def lacking(pool: Pool) -> tuple[bool, bool, int, str]:
        keeps = any(decision.keeper.get(slot.number) == job.id for slot in pool.slots)
        return not keeps, not pool.may_start, pool.count - _num_open(pool, decision, job), pool.host

    return min(pools, key=lacking)


def on_host(host: str, job: Waiting, cluster: Cluster, decision: Decision) -> HostReason:
    """Why the job does not start on one host."""
    pools = pools_of(job.wish, cluster)
    kind = pools[0].kind if pools else (*kinds_of(job.wish.devices), "gpu")[0]
    slots = [slot for slot in cluster.slots if slot.host == host and slot.kind == kind]
    fitting = [slot for slot in slots if fits(slot.state.device, job.wish.devices)]
    pool = next((pool for pool in pools if pool.host == host and not pool.is_spread), None)
    free = _num_open(pool, decision, job) if pool is not None else 0
    found = _of_pool(job, pool, cluster, decision) if pool else _without_pool(host, kind, slots, fitting, job, cluster)
    return HostReason(host=host, word=found.word, text=found.text, fitting=len(fitting), free=free)


def _of_pool(job: Waiting, pool: Pool, cluster: Cluster, decision: Decision) -> Reason:
    if any(placement.job_id == job.id and placement.host == pool.host for placement in decision.placements):
        return Reason("starting", "starts here at the next look")
    text = f"has {_tally(job, pool.slots, decision)}{_runner_trouble(pool, cluster)}"
    return Reason(_word(job, pool, decision), text)


def _without_pool(
    host: str, kind: DeviceKind, slots: Sequence[Slot], fitting: Sequence[Slot], job: Waiting, cluster: Cluster
) -> Reason:
    runner, wanted = cluster.runners.get(host), job.wish.devices
    if runner is not None and job.wish.entrypoint not in runner.entrypoints:
        return Reason("no_entrypoint", f"its runner does not offer {job.wish.entrypoint!r}")
    lack = lack_of(kind, wanted, [slot.state.device for slot in slots])
    if lack is not None:
        has = f"has {len(fitting)} of {wanted.count} {kind} devices" if fitting else f"lacks {lack.what}"
        return Reason("no_such_device", has)
    return Reason("out_of_service", _listed([slot.state for slot in fitting if is_out_of_service(slot.state)]))


# --- words -----------------------------------------------------------------------------------------------------------


def _num_open(pool: Pool, decision: Decision, job: Waiting) -> int:
    """Devices of the pool that the job could have now."""
    return sum(
        1
        for slot in pool.slots
        if decision.free[slot.number] >= pool.need(slot) and decision.keeper.get(slot.number, job.id) == job.id
    )


def _word(job: Waiting, pool: Pool, decision: Decision) -> WaitWord:
    """What keeps the job from the devices of a pool."""
    if not pool.may_start:
        return "runner_not_ready"
    free = [slot for slot in pool.slots if slot.free >= pool.need(slot)]
    if len(free) >= pool.count:
        return _precedence(job, free, decision)
    cleared = [slot for slot in pool.slots if slot.state.state == "reclaiming"]
    return "reclaiming" if len(free) + len(cleared) >= pool.count else "resources"


def _precedence(job: Waiting, free: Sequence[Slot], decision: Decision) -> WaitWord:
    """Whether the devices go to jobs of higher priority or greater age, or to an owner who uses less."""
    others = {decision.taken.get(slot.id) or decision.keeper.get(slot.number) for slot in free}
    ranks = [decision.ages[other] for other in others if other is not None and other in decision.ages]
    is_passed_by = any(rank[0] == -job.priority and rank > job.rank for rank in ranks)
    return "fair_share" if is_passed_by else "priority"


def _tally(job: Waiting, slots: Sequence[Slot], decision: Decision) -> str:
    """The devices by what keeps them from the job."""
    counted = Counter(_about(job, slot, decision) for slot in slots)
    order = sorted(counted.items(), key=lambda item: (item[0] != "free", item[0]))
    listed = ", ".join(f"{number} {word}" for word, number in order[:_LISTED])
    more = sum(number for _, number in order[_LISTED:])
    return f"{listed} and {more} more" if more else listed


def _about(job: Waiting, slot: Slot, decision: Decision) -> str:
    state = slot.state
    if state.state == "leased":
        return f"leased by {_names(slot)}"
    if state.state == "reclaiming":
        return _reclaimed(state)
    if slot.id in decision.taken:
        return f"given to {decision.taken[slot.id]}"
    keeper = decision.keeper.get(slot.number, job.id)
    if keeper != job.id:
        return f"kept for {keeper}"
    if slot.free < shares_needed(slot.state.device, job.wish.devices):
        return f"shared by {_names(slot)}"
    return "free"


def _reclaimed(state: DeviceState) -> str:
    if state.holder is None and state.device.compute_pids:
        return "used by processes that are not of railbus"
    return f"being reclaimed from {state.holder}" if state.holder else "being reclaimed"


def _names(slot: Slot) -> str:
    return " and ".join(slot.holders) or "somebody"


def _runner_trouble(pool: Pool, cluster: Cluster) -> str:
    if pool.may_start:
        return ""
    return f", but its runner is not {'ready' if pool.host in cluster.runners else 'there'}"


def _out_of_order(job: Waiting, cluster: Cluster) -> str:
    """The devices exist, but too few are in order: say of the first kind that exists which are not."""
    wanted = job.wish.devices
    broken = [
        state
        for state in cluster.devices
        if state.device.kind in wanted.kind and fits(state.device, wanted) and is_out_of_service(state)
    ]
    return f"waits for {described(wanted.kind[0], wanted)} in order: {_listed(broken)}"


def _listed(broken: Sequence[DeviceState]) -> str:
    listed = ", ".join(
        f"{state.device.id} is {state.retired or state.state}"
        + (f" ({state.device.health_reason})" if state.device.health_reason else "")
        for state in broken[:_LISTED]
    )
    return listed + (f" and {len(broken) - _LISTED} more" if len(broken) > _LISTED else "")


def _have(job: Waiting) -> str:
    return "uses" if job.owner else "use"
