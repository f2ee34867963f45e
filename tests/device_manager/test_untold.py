"""Whoever ends or accepts a job may be killed before it tells so; a device_manager tells it then, over a real NATS."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from histories import untold
from played_cluster import JOB, History, device_manager, played_runner
from railbus.client import Client
from railbus_device_manager import untold as untold_ends
from railbus_device_manager.submissions import new_record
from railbus_shared import clock, wire
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.contents import contents
from railbus_shared.bus.follow import follow
from railbus_shared.bus.sink import BusSink
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.effects import tell_end
from railbus_shared.records import HeldRecord, JobRecords
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import LearningTelemetry
from records_for_tests import record
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second instead of five that an end may be on its way."""
    monkeypatch.setattr(untold_ends, "_ON_ITS_WAY_S", 1.0)


async def _stored(bus: Bus) -> list[dict[str, object]]:
    """Every event that the stream holds now."""
    marker = {"type": "app.marked", "at": clock.now()}
    await bus.publish(Outgoing(bus.subjects.event("app", "test", "marked"), wire.encode(marker), ""))
    found: list[dict[str, object]] = []
    async with contextlib.aclosing(follow(bus, bus.subjects.all_events)) as events:
        async for event in events:
            if event == marker:
                break
            found.append(event)
    return found


async def test_an_end_that_its_runner_could_not_tell_is_told_once_also_if_it_was_only_slow(
    common: CommonSettings, bus: Bus
) -> None:
    unsent = History()
    async with (
        played_runner(common.model_copy(update={"lease_ttl_s": 20}), "a", history=unsent) as runner,
        device_manager(common, "dm1", history=BusSink(bus)),
    ):
        job = (await Client(bus).submit(JOB)).id
        await until(lambda: runner.has(job))
        await runner.end(job, "user_error")
        await until(lambda: _is_told(bus, job, "failed"))
        await until(lambda: "job.failed" in unsent.of(job))
    (late,) = [event for event in unsent.events if event["type"] == "job.failed"]
    await BusSink(bus).send([late])
    stored = await _stored(bus)
    (told,) = [event for event in stored if event["type"] == "job.failed"]
    same = ("id", "producer", "number", "job", "attempt", "lease_epoch", "severity", "data")
    assert [told[name] for name in same] == [late[name] for name in same]
    assert (told["source"], late["source"]) == ("device_manager", "runner")


async def _is_told(bus: Bus, job: str, state: str) -> bool:
    subject = bus.subjects.event("job", job, state)
    return subject in (await contents(bus, bus.subjects.events_stream, subject)).subjects


async def test_a_placer_that_begins_tells_the_ends_that_lack_and_none_that_may_have_been_told(
    common: CommonSettings, bus: Bus
) -> None:
    """More jobs than are asked for one by one; and one that ended before the oldest event that there still is."""
    jobs = Bucket(bus, bus.subjects.jobs)
    before = record("succeeded", id="old", sequence=999, ended_at="2026-01-01T00:00:00Z")
    await jobs.create("old", before.to_map())
    telemetry = LearningTelemetry("runner", host="a").with_sink(BusSink(bus))
    telemetry.event("app.began")
    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(telemetry.run())
        await telemetry.flush(timeout_s=PATIENCE_S)
        for number in range(1, 151):
            ended = record("failed" if number % 3 else "cancelled", id=f"j-{number}", sequence=number)
            ended = ended.changed(incarnation=bus.incarnation, ended_at=clock.now())
            revision = await jobs.create(ended.id, ended.to_map())
            if number % 10:
                tell_end(telemetry, HeldRecord(ended, revision))
        await telemetry.flush(timeout_s=PATIENCE_S)
        telling.cancel()
    wanted = [f"j-{number}" for number in range(1, 151)]
    async with device_manager(common, "dm1", history=BusSink(bus)):
        await until(lambda: _are_told(bus, wanted))
    stored = await _stored(bus)
    assert untold(stored, wanted) == {}
    assert untold(stored, ["old"]) == {"old": 0}


async def _are_told(bus: Bus, jobs: list[str]) -> bool:
    found = await contents(bus, bus.subjects.events_stream, bus.subjects.event("job", "*", "*"))
    return len([one for one in found.subjects if one.endswith((".failed", ".cancelled"))]) >= len(jobs)


@pytest.mark.parametrize("moved_on", [False, True])
async def test_a_job_whose_record_was_made_by_one_that_was_killed_is_told_to_be_queued(
    common: CommonSettings, bus: Bus, moved_on: bool
) -> None:
    spec = JobSpec.parse(JOB)
    sequence = await bus.publish(Outgoing(bus.subjects.submit, wire.encode(spec.to_map()), "m-1"))
    made = new_record(spec, sequence=sequence, incarnation=bus.incarnation, now=clock.now())
    if moved_on:
        made = made.changed(priority=5, changed_at=clock.now())
    held = await JobRecords(Bucket(bus, bus.subjects.jobs)).create(made)
    async with device_manager(common, "dm1", history=BusSink(bus)):
        await until(lambda: _is_told(bus, made.id, "queued"))
        again = await Client(bus).submit(JOB)
    told = [event for event in await _stored(bus) if event["type"] == "job.queued"]
    assert [event["job"] for event in told] == [made.id, again.id]
    assert [event["number"] for event in told] == [sequence, sequence + 1]
    assert isinstance(data := told[0]["data"], dict)
    assert data.get("revision") == (None if moved_on else held.revision)
