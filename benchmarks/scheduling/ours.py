"""Placement itself in the simulation, from the facts to the decision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from benchmarks.scheduling.workload import HOSTS, PER_HOST, Job
from railbus_device_manager.cluster import Policy
from railbus_device_manager.manager import DeviceManager
from railbus_shared import clock
from railbus_shared.contracts.devices import DeviceInfo, HostReport, Lease, RunnerReport
from railbus_shared.contracts.jobs import JobRecord, JobSpec

_TIME: Final = clock.rfc3339(0)
_GIB: Final = 1 << 30


class Ours:
    """A device_manager that is told what the buckets would say."""

    def __init__(self, policy: Policy | None = None) -> None:
        self._manager = DeviceManager(policy=policy or Policy())
        self._jobs: dict[str, Job] = {}
        for host in (f"h{number}" for number in range(HOSTS)):
            devices = tuple(_device(host, index) for index in range(PER_HOST))
            self._manager.facts.apply_host(host, HostReport(host=host, devices=devices, reported_at=_TIME))
            ready = RunnerReport(host=host, runner="r", ready=True, entrypoints=("classifier",), reported_at=_TIME)
            self._manager.facts.apply_runner(host, ready, now=0)

    def arrived(self, job: Job, now: float) -> None:
        record = _record(job)
        self._jobs[record.id] = job
        self._manager.facts.apply_record(record.id, record, now=now)

    def ended(self, job: Job, now: float) -> None:
        facts = self._manager.facts
        record = facts.jobs[f"j-{job.number}"]
        for device in record.devices:
            facts.apply_lease(device, None, now=now)
        facts.apply_record(record.id, record.changed(state="failed"), now=now)

    def starts(self, now: float) -> Iterator[Job]:
        facts = self._manager.facts
        for placement in self._manager.plan(now).placements:
            record = facts.jobs[placement.job_id].changed(
                state="running", lease_epoch=1, attempt=1, host=placement.host, devices=placement.device_ids
            )
            for device in record.devices:
                lease = Lease(
                    device=device, host=placement.host, holder=record.id, lease_epoch=1, nonce="n", granted_at=_TIME
                )
                facts.apply_lease(device, lease, now=now)
            facts.apply_record(record.id, record, now=now)
            yield self._jobs[record.id]


def _device(host: str, index: int) -> DeviceInfo:
    return DeviceInfo(
        id=f"{host}-gpu{index}", host=host, kind="gpu", name="device", index=index, memory_bytes=16 * _GIB
    )


def _record(job: Job) -> JobRecord:
    spec = JobSpec.parse(
        {
            "model": "m",
            "dataset": "d",
            "entrypoint": "classifier",
            "owner": job.owner,
            "time_limit_s": job.limit_s,
            "devices": {"kind": "gpu", "count": job.devices},
        }
    )
    return JobRecord(
        id=f"j-{job.number}",
        spec=spec,
        spec_sha256="0" * 64,
        sequence=job.number,
        incarnation="i",
        submitted_at=_TIME,
        changed_at=_TIME,
    )
