"""A running job makes room for one of higher priority, over a real NATS; the runner is played."""

from __future__ import annotations

import functools

import pytest

from played_cluster import JOB, History, device_manager, played_runner
from railbus.client import Client
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.settings import CommonSettings
from until import until

pytestmark = pytest.mark.timeout(90)


async def test_a_job_that_made_room_goes_on_afterwards_and_its_devices_went_to_whom_it_made_room_for(
    common: CommonSettings, bus: Bus
) -> None:
    settings, history, client = common.model_copy(update={"lease_ttl_s": 20}), History(), Client(bus)

    async def job(name: str) -> JobRecord:
        return await client.job(name)

    async with (
        played_runner(settings, "a", history=history, devices=2) as runner,
        device_manager(settings, "dm1", history=history, preempt_after_s=0.0),
    ):
        for name, fields in {"spared": {"preemptible": False}, "low": {}}.items():
            await client.submit({**JOB, "id": name, **fields})
            await until(functools.partial(runner.has, name))
        (device,) = (await job("low")).devices
        await client.submit({**JOB, "id": "high", "priority": 5, "preemptible": False})
        await until(lambda: bool(runner.stops))
        assert [(stop.job, stop.reason) for stop in runner.stops] == [("low", "preempted")]
        assert (await job("low")).preempted_by == "high"
        await client.submit({**JOB, "id": "higher", "priority": 9})  # its turn is before, but the device is not its own
        await runner.end("low", "preempted")
        await until(lambda: runner.has("high"))
        assert (await job("high")).devices == (device,)
        assert [(await job(name)).state for name in ("low", "higher", "spared")] == ["queued", "queued", "running"]
        await runner.end("high")
        await until(lambda: runner.has("higher"))
        await runner.end("higher")
        await until(lambda: runner.has("low"))
        found = await job("low")
        assert (found.state, found.attempt, found.preempted_by) == ("running", 1, None)
    assert [stop.job for stop in runner.stops] == ["low"]
    assert history.of("low").count("job.preempting") == 1
