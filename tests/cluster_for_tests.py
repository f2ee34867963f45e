"""Builders of the contracts that placement looks at, with defaults for what a test does not care about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from railbus_device_manager.placement import Cluster, Decision, Placement, decide
from railbus_device_manager.reasons import headline, never_fits
from railbus_device_manager.wishes import Waiting
from railbus_shared import clock
from railbus_shared.contracts.devices import AttemptRef, DeviceInfo, HostReport, Lease, ReclaimMark, RunnerReport
from railbus_shared.contracts.jobs import JobRecord, JobSpec

GIB = 1 << 30
TIME = clock.rfc3339(0)


def device(
    device_id: str,
    *,
    gib: float = 16,
    labels: dict[str, str] | None = None,
    healthy: bool = True,
    kind: str | None = None,
) -> DeviceInfo:
    """`device("a-gpu0")` is a GPU of host `a`."""
    host, _, rest = device_id.rpartition("-")
    return DeviceInfo.parse(
        {
            "id": device_id,
            "host": host,
            "kind": kind or rest[:3],
            "name": "device",
            "index": int(rest[3:]),
            "memory_bytes": int(gib * GIB),
            "labels": labels or {},
            "healthy": healthy,
            "health_reason": "" if healthy else "GPU is lost",
        }
    )


def job(
    job_id: str,
    wanted: Mapping[str, object] | None = None,
    *,
    priority: int = 0,
    after: tuple[str, ...] = (),
    owner: str | None = None,
    time_limit_s: float | None = None,
    **devices: object,
) -> JobRecord:
    """A queued job called `j-<sequence>`; `wanted` and `devices` are the fields of its preference."""
    spec = JobSpec.parse(
        {
            "model": "m",
            "dataset": "d",
            "entrypoint": "classifier",
            "priority": priority,
            "after": list(after),
            "owner": owner,
            "time_limit_s": time_limit_s,
            "devices": {**(wanted or {}), **devices},
        }
    )
    return JobRecord(
        id=job_id,
        spec=spec,
        spec_sha256=spec.digest,
        sequence=int(job_id.rpartition("-")[2]),
        incarnation="i",
        priority=priority,
        submitted_at=TIME,
        changed_at=TIME,
    )


def active(
    job_id: str, *devices: str, state: str = "running", lease_epoch: int = 1, host: str | None = None
) -> JobRecord:
    """A record that holds devices."""
    return job(job_id).changed(
        state=state, lease_epoch=lease_epoch, devices=devices, host=host or devices[0].rpartition("-")[0]
    )


def runner(
    host: str, *attempts: tuple[str, int], ready: bool = True, entrypoints: tuple[str, ...] = ("classifier",)
) -> RunnerReport:
    return RunnerReport(
        host=host,
        runner=f"{host}-r1",
        ready=ready,
        attempts=tuple(AttemptRef(job=name, lease_epoch=lease_epoch) for name, lease_epoch in attempts),
        entrypoints=entrypoints,
        reported_at=TIME,
    )


def host_report(host: str, *devices: DeviceInfo, draining: bool = False) -> HostReport:
    return HostReport(host=host, devices=devices, draining=draining, reported_at=TIME)


def lease(device_id: str, holder: str, *, lease_epoch: int = 1) -> Lease:
    host = device_id.rpartition("-")[0]
    return Lease(device=device_id, host=host, holder=holder, lease_epoch=lease_epoch, nonce="n", granted_at=TIME)


def mark(device_id: str, job_id: str, *, lease_epoch: int = 1) -> ReclaimMark:
    host = device_id.rpartition("-")[0]
    return ReclaimMark(device=device_id, host=host, job=job_id, lease_epoch=lease_epoch, marked_at=TIME)


def place(queue: Iterable[JobRecord], cluster: Cluster) -> list[Placement]:
    """The jobs of the queue that start now."""
    return decide(queue, cluster).placements


def reason(job: JobRecord, cluster: Cluster, *, decision: Decision | None = None) -> str:
    """The sentence that tells why a job waits."""
    return headline(Waiting.of(job), cluster, decision or Decision(cluster)).text


def can_ever(job: JobRecord, cluster: Cluster) -> str | None:
    """The sentence that tells why a job can never start."""
    found = never_fits(Waiting.of(job), cluster)
    return found.text if found is not None else None
