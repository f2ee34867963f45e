"""Why a job waits, in one sentence that comes from the same functions that place jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from railbus_device_manager.placement import Cluster, Decision, Pool, fits, nearest_pool, pools_for
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import DeviceKind, DevicePreference, JobRecord
from railbus_shared.contracts.requests import DeviceState

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30


def reason(job: JobRecord, cluster: Cluster, *, decision: Decision | None = None) -> str:
    """Why the job waits, as a sentence without a full stop.

    `decision` is the one in which the job was not placed; with it, devices that are kept for others are named.
    """
    decision = decision or Decision()
    pools = pools_for(job, cluster)
    if not pools:
        return can_ever(job, cluster) or _out_of_order(job, cluster)
    nearest = nearest_pool(pools, decision)
    runner = _runner_trouble(nearest, cluster)
    return f"waits for {_wanted(job, nearest.kind)}: {_tally(job, nearest, decision)}{runner}"


def can_ever(job: JobRecord, cluster: Cluster) -> str | None:
    """Why the job can never start on the cluster as it is, or None if it can once devices are free and in order.

    A host whose runner is not there now may get one that offers the entrypoint.
    """
    wanted, entrypoint = job.spec.devices, job.spec.entrypoint
    refusing = {host for host, runner in cluster.runners.items() if entrypoint not in runner.entrypoints}
    devices = [state.device for state in cluster.devices if state.device.host not in refusing]
    if cluster.devices and not devices and refusing == set(cluster.runners):
        return f"no runner offers the entrypoint {entrypoint!r}"
    lacks = [_lack(kind, wanted, [device for device in devices if device.kind == kind]) for kind in wanted.kind]
    return None if None in lacks else "; ".join(lack for lack in lacks if lack)


def _lack(kind: DeviceKind, wanted: DevicePreference, devices: Sequence[DeviceInfo]) -> str | None:
    """What no host has of one kind, or None if one has enough."""
    if not devices:
        return f"no host has a {kind}"
    labelled = [device for device in devices if wanted.labels.items() <= device.labels.items()]
    if not labelled:
        return f"no host has a {kind} with {_labels(wanted)}"
    fitting = Counter(device.host for device in labelled if fits(device, wanted))
    if not fitting:
        largest = max(device.memory_bytes for device in labelled)
        return f"no host has a {kind} with {size(wanted.min_memory_bytes)}; the largest has {size(largest)}"
    host, most = min(fitting.items(), key=lambda item: (-item[1], item[0]))
    if most >= wanted.count:
        return None
    return f"no host has {_devices(kind, wanted)}; {host} has the most: {most}"


def _out_of_order(job: JobRecord, cluster: Cluster) -> str:
    """The devices exist, but too few are in order: say of the first kind that exists which are not."""
    wanted = job.spec.devices
    broken = [
        state
        for state in cluster.devices
        if state.device.kind in wanted.kind
        and fits(state.device, wanted)
        and state.state in {"unhealthy", "draining", "cordoned"}
    ]
    listed = ", ".join(
        f"{state.device.id} is {state.state}"
        + (f" ({state.device.health_reason})" if state.device.health_reason else "")
        for state in broken[:3]
    )
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f"waits for {_wanted(job, wanted.kind[0])} in order: {listed}{more}"


def _tally(job: JobRecord, pool: Pool, decision: Decision) -> str:
    """The devices of the pool by what keeps them from the job."""
    counted = Counter(_word(job, state, decision) for state in pool.states)
    order = sorted(counted.items(), key=lambda item: (item[0] != "free", item[0]))
    return f"{pool.host} has " + ", ".join(f"{number} {word}" for word, number in order)


def _word(job: JobRecord, state: DeviceState, decision: Decision) -> str:
    device = state.device.id
    if state.state == "leased":
        return f"leased by {state.holder}"
    if state.state == "reclaiming":
        return f"being reclaimed from {state.holder}" if state.holder else "being reclaimed"
    for placement in decision.placements:
        if device in placement.device_ids:
            return f"given to {placement.job_id}"
    keeper = decision.kept_for.get(device, job.id)
    return "free" if keeper == job.id else f"kept for {keeper}"


def _runner_trouble(pool: Pool, cluster: Cluster) -> str:
    if pool.may_start:
        return ""
    return f", but its runner is not {'ready' if pool.host in cluster.runners else 'there'}"


def _wanted(job: JobRecord, kind: DeviceKind) -> str:
    return _devices(kind, job.spec.devices)


def _devices(kind: DeviceKind, wanted: DevicePreference) -> str:
    """For instance `2 gpu devices of at least 40 GiB with zone=a`."""
    words = [f"{wanted.count} {kind} {'device' if wanted.count == 1 else 'devices'}"]
    if wanted.min_memory_bytes:
        words.append(f"of at least {size(wanted.min_memory_bytes)}")
    if wanted.labels:
        words.append(f"with {_labels(wanted)}")
    return " ".join(words)


def _labels(wanted: DevicePreference) -> str:
    return " and ".join(f"{name}={value}" for name, value in sorted(wanted.labels.items()))


def size(num_bytes: int) -> str:
    """Memory for people: `40 GiB`, `1.5 GiB`, `512 MiB`."""
    unit, name = (_GIB, "GiB") if num_bytes >= _GIB else (_MIB, "MiB")
    return f"{round(num_bytes / unit, 2):g} {name}"
