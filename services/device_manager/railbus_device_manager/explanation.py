"""Why a job is where it is, from the same functions that place jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from railbus_device_manager.cluster import NEVER, Cluster, pools_of
from railbus_device_manager.decisions import Decision
from railbus_device_manager.forecast import Forecast, forecast
from railbus_device_manager.manager import DeviceManager
from railbus_device_manager.placement import decide_waiting, in_order
from railbus_device_manager.reasons import Reason, headline, making_room, never_fits, on_host
from railbus_device_manager.wishes import Waiting
from railbus_shared import clock
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.waiting import DeviceHolder, Why

_AHEAD: Final = 20
_HOLDERS: Final = 100


def why(
    record: JobRecord, manager: DeviceManager, *, now: float, wall_offset_s: float, is_submitted: bool = True
) -> Why:
    """Everything about one job.

    Args:
        now: on the clock of the facts.
        wall_offset_s: seconds since 1970 at the zero of that clock.
        is_submitted: whether the job is in the queue; else it is looked at as if it came now.
    """
    if record.state != "queued":
        return Why(job=record.id, state=record.state, headline="not_waiting", text=_place_of(record))
    job, cluster, queue = Waiting.of(record), manager.cluster(now), manager.startable(now)
    obstacle = manager.obstacle(record, now)
    if not is_submitted and obstacle is None:
        queue.append(job)
    decision, turns = decide_waiting(queue, cluster), list(in_order(queue, cluster))
    place = next((number for number, turn in enumerate(turns, start=1) if turn.id == job.id), None)
    found = obstacle or _granted(record, manager) or _starting(job, decision) or headline(job, cluster, decision)
    leaving = making_room(job, cluster, decision)
    expected = _after(leaving) if leaving else _expected(job, turns, found, cluster)
    return Why(
        job=record.id if is_submitted else None,
        state="queued",
        headline=found.word,
        text=found.text,
        can_ever_start=never_fits(job, cluster) is None,
        place=place,
        ahead=tuple(turn.id for turn in turns[max(0, place - 1 - _AHEAD) : place - 1]) if place else (),
        hosts=tuple(on_host(host, job, cluster, decision) for host in _hosts(cluster)),
        holders=tuple(_holders(job, cluster, wall_offset_s)),
        expected_start=_wall(expected.at, wall_offset_s) if expected.at is not None else None,
        expected_basis=expected.basis,
    )


def _granted(record: JobRecord, manager: DeviceManager) -> Reason | None:
    """Of a job that has its leases, while its record does not say so yet."""
    for lease in manager.facts.leases.values():
        if (lease.holder, lease.lease_epoch) == (record.id, record.lease_epoch + 1):
            return Reason("starting", f"is being placed on {lease.host}")
    return None


def _starting(job: Waiting, decision: Decision) -> Reason | None:
    for placement in decision.placements:
        if placement.job_id == job.id:
            return Reason("starting", f"starts on {placement.host} with {', '.join(placement.device_ids)}")
    return None


def _after(leaving: Sequence[str]) -> Forecast:
    return Forecast(
        None, f"as soon as {' and '.join(leaving)} {'has' if len(leaving) == 1 else 'have'} saved and ended"
    )


def _expected(job: Waiting, turns: Sequence[Waiting], found: Reason, cluster: Cluster) -> Forecast:
    match found.word:
        case "starting":
            return Forecast(cluster.now, "the devices are free")
        case "resources" | "priority" | "fair_share" | "reclaiming":
            return forecast(job, turns, cluster)
        case "held":
            return Forecast(None, "when it is released")
        case _:
            return Forecast(None, "what it waits for has no known end")


def _hosts(cluster: Cluster) -> list[str]:
    return sorted({slot.host for slot in cluster.slots} | set(cluster.runners))


def _holders(job: Waiting, cluster: Cluster, wall_offset_s: float) -> list[DeviceHolder]:
    """Who has the devices that the job could use."""
    found = []
    for slot in [slot for pool in pools_of(job.wish, cluster) for slot in pool.slots]:
        for name in slot.holders:
            holder = cluster.holders.get(name)
            ends_at = holder.ends_at if holder is not None else NEVER
            found.append(
                DeviceHolder(
                    device=slot.id,
                    holder=name,
                    owner=holder.record.spec.owner if holder is not None else None,
                    state=holder.record.state if holder is not None else None,
                    expected_end=_wall(ends_at, wall_offset_s) if ends_at != NEVER else None,
                )
            )
    return found[:_HOLDERS]


def _place_of(record: JobRecord) -> str:
    if record.is_active:
        return f"is {record.state} on {record.host} with {', '.join(record.devices)}"
    ended = "was cancelled" if record.state == "cancelled" else f"has {record.state}"
    return f"{ended}: {record.reason}" if record.reason and record.state != "succeeded" else ended


def _wall(at: float, offset_s: float) -> str:
    return clock.rfc3339(round((at + offset_s) * clock.NS_PER_S))
