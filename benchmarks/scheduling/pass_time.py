"""Seconds of one placement pass: 10,000 queued jobs of mixed shapes and several owners over 1,000 devices.

Everything that a pass does is in it, from the facts to the decision; reading the buckets is not. The cluster is looked
at in the states that cost differently: nothing free, everything free, and half of it held by jobs with time limits. The
seconds are of the processor, so that what else runs on the machine does not count.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from railbus_device_manager.cluster import Policy
from railbus_device_manager.manager import DeviceManager
from railbus_shared import clock
from railbus_shared.contracts.devices import DeviceInfo, HostReport, Lease, RunnerReport
from railbus_shared.contracts.jobs import JobRecord, JobSpec

_GIB: Final = 1 << 30
_TIME: Final = clock.rfc3339(0)
_PER_HOST: Final = 8
STATES: Final = ("nothing free", "everything free", "half free")


@dataclass(frozen=True)
class PassTime:
    """How long passes over one cluster took."""

    state: str
    seconds: tuple[float, ...]
    num_placed: int


def measure(state: str, *, num_jobs: int, num_devices: int, repeats: int, seed: int = 0) -> PassTime:
    """Time the pass over the same facts several times."""
    manager = _manager(state, num_jobs=num_jobs, num_devices=num_devices, rng=random.Random(seed))
    seconds, placed = [], 0
    for _ in range(repeats):
        gc.collect()
        began = time.process_time()
        placed = len(manager.plan(1000.0).placements)
        seconds.append(time.process_time() - began)
    return PassTime(state, tuple(seconds), placed)


def _manager(state: str, *, num_jobs: int, num_devices: int, rng: random.Random) -> DeviceManager:
    manager = DeviceManager(policy=Policy(quotas={"owner-5": 400}))
    facts = manager.facts
    devices = list(_devices(num_devices))
    for first in range(0, num_devices, _PER_HOST):
        host = devices[first].host
        report = HostReport(host=host, devices=tuple(devices[first : first + _PER_HOST]), reported_at=_TIME)
        facts.apply_host(host, report)
        facts.apply_runner(
            host,
            RunnerReport(host=host, runner="r", ready=True, entrypoints=("classifier", "causal_lm"), reported_at=_TIME),
            now=0,
        )
    held = {"nothing free": devices, "everything free": [], "half free": devices[::2]}[state]
    for number, device in enumerate(held):
        record = _record(num_jobs + number, rng).changed(
            state="running", lease_epoch=1, host=device.host, devices=(device.id,), attempt=1
        )
        lease = Lease(device=device.id, host=device.host, holder=record.id, lease_epoch=1, nonce="n", granted_at=_TIME)
        facts.apply_lease(device.id, lease, now=0)
        facts.apply_record(record.id, record, now=0)
    for number in range(num_jobs):
        record = _record(number, rng)
        facts.apply_record(record.id, record, now=0)
    return manager


def _devices(number: int) -> Iterator[DeviceInfo]:
    for index in range(number):
        host, slot = f"h{index // _PER_HOST}", index % _PER_HOST
        yield DeviceInfo(
            id=f"{host}-gpu{slot}",
            host=host,
            kind="gpu",
            name="device",
            uuid=f"GPU-{host}-{slot}",
            nvlink_peers=tuple(
                f"GPU-{host}-{peer}" for peer in range(_PER_HOST) if peer // 4 == slot // 4 and peer != slot
            ),
            numa_node=slot // 4,
            index=slot,
            memory_bytes=(24, 40, 80)[index // _PER_HOST % 3] * _GIB,
            labels={"zone": "ab"[index // _PER_HOST % 2]},
        )


def _record(number: int, rng: random.Random) -> JobRecord:
    """A queued job: one of many shapes, of six owners, some with time limits."""
    spec = JobSpec.parse(
        {
            "model": "m",
            "dataset": "d",
            "entrypoint": rng.choice(["classifier", "causal_lm"]),
            "owner": f"owner-{rng.randrange(6)}",
            "priority": rng.choice([0, 0, 0, 5]),
            "time_limit_s": float(rng.randrange(60, 7200)),
            "devices": {
                "kind": "gpu",
                "count": rng.choice([1, 1, 1, 2, 4, 8]),
                "min_memory_bytes": rng.choice([0, 30 * _GIB, 60 * _GIB]),
                "labels": rng.choice([{}, {}, {"zone": "a"}]),
            },
        }
    )
    return JobRecord(
        id=f"j-{number}",
        spec=spec,
        spec_sha256="0" * 64,
        sequence=number,
        incarnation="i",
        priority=spec.priority,
        submitted_at=_TIME,
        changed_at=_TIME,
    )
