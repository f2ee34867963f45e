"""Placers that both believe to be the one, and claimers that race for the same devices and records."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from cluster_for_tests import device
from histories import unended, violations
from played_cluster import JOB, History, PlayedRunner, device_manager, played_runner
from railbus.client import Client
from railbus_shared import leases
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.errors import Conflict, NoFreeDevice, RequestTimeout, StaleLeaseEpoch
from railbus_shared.happenings import Placed, Started
from railbus_shared.records import Applied, JobRecords
from railbus_shared.settings import CommonSettings
from records_for_tests import record

pytestmark = pytest.mark.timeout(90)


class _AlwaysLeader:
    """What a placer believes that was paused for longer than its key lived."""

    async def held(self) -> bool:
        return True

    async def resign(self) -> None:
        return


async def _end_all(runners: list[PlayedRunner], jobs: set[str]) -> None:
    """End whatever has started, until every job has had its turn."""
    left = set(jobs)
    while left:
        for runner in runners:
            for ref in list(runner.attempts):
                await runner.end(ref.job)
                left.discard(ref.job)
        await asyncio.sleep(0.005)


async def test_two_placers_at_once_lease_no_device_twice_and_start_no_job_twice(
    common: CommonSettings, bus: Bus
) -> None:
    settings, history = common.model_copy(update={"lease_ttl_s": 30}), History()
    async with AsyncExitStack() as stack:
        runners = [
            await stack.enter_async_context(played_runner(settings, host, history=history, devices=2)) for host in "ab"
        ]
        for name in ("dm1", "dm2"):
            service = await stack.enter_async_context(device_manager(settings, name, history=history))
            vars(service._placer)["_leadership"] = _AlwaysLeader()
        client = Client(bus)
        jobs = {(await client.submit({**JOB, "name": f"job {number}"})).id for number in range(40)}
        async with asyncio.timeout(60):
            await _end_all(runners, jobs)
        records = JobRecords(Bucket(bus, bus.subjects.jobs))
        found = [(await records.get(job)).record for job in jobs]
    assert {record.state for record in found} == {"succeeded"}
    assert {record.attempt for record in found} == {1}
    assert violations(history.events) == []
    assert unended(history.events) == set()


async def test_of_eight_racing_claimers_one_gets_the_devices_and_one_the_job(common: CommonSettings, bus: Bus) -> None:
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(Bus.open(common, name=f"claimer-{n}")) for n in range(8)]
        records = JobRecords(Bucket(bus, bus.subjects.jobs))
        devices = (device("a-cpu0"), device("a-cpu1"))
        for race in range(40):
            made = record().changed(id=f"j-{race}")
            await records.create(made)
            found = await asyncio.gather(*(_claim(one, made.id, devices) for one in buses))
            winners = [applied for applied in found if applied is not None]
            assert len(winners) == 1, race
            assert (await records.get(made.id)).record == winners[0].record
            held = [await Bucket(bus, bus.subjects.leases).get(one.id) for one in devices]
            assert [entry is not None for entry in held] == [True, True]
            for one in devices:
                await Bucket(bus, bus.subjects.leases).remove(one.id)


async def _claim(bus: Bus, job: str, devices: tuple[DeviceInfo, ...]) -> Applied | None:
    """All that a placer does for a placement; None if another was quicker."""
    try:
        held = await leases.grant(Bucket(bus, bus.subjects.leases), devices, holder=job, lease_epoch=1, ttl_s=30)
    except (NoFreeDevice, RequestTimeout):
        return None
    applied = await JobRecords(Bucket(bus, bus.subjects.jobs)).apply(job, Placed(1, "a", ("a-cpu0", "a-cpu1")))
    assert len(held) == 2
    return applied if applied.decision.is_changed else None


async def test_of_eight_starts_of_one_attempt_one_begins(common: CommonSettings, bus: Bus) -> None:
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(Bus.open(common, name=f"runner-{n}")) for n in range(8)]
        records = JobRecords(Bucket(bus, bus.subjects.jobs))
        for race in range(30):
            made = record("placed").changed(id=f"j-{race}")
            await records.create(made)
            found = await asyncio.gather(
                *(
                    JobRecords(Bucket(one, one.subjects.jobs)).apply(made.id, Started(1, "a" if n % 2 else "b"))
                    for n, one in enumerate(buses)
                ),
                return_exceptions=True,
            )
            began = [one for one in found if isinstance(one, Applied) and one.decision.is_changed]
            refused = [one for one in found if isinstance(one, StaleLeaseEpoch | Conflict)]
            assert (len(began), len(refused)) == (1, 4), found
            assert (await records.get(made.id)).record.attempt == 1
