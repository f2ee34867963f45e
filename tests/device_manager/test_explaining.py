"""Why, dry runs and refusals over a real NATS: one device_manager with two GPUs that a test sets, and no dataloader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster_for_tests import GIB, runner
from fakes import FakeGpus
from railbus_device_manager.service import DeviceManagerService
from railbus_device_manager.settings import Settings
from railbus_device_manager.submissions import OUTCOME_HEADER
from railbus_shared import wire
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.endpoints import serving
from railbus_shared.contracts.devices import Lease
from railbus_shared.contracts.waiting import Why
from railbus_shared.errors import InvalidField, JobNotFound, NeverFits, UnknownEntrypoint
from railbus_shared.metrics import Metrics
from railbus_shared.service import Context
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import LearningTelemetry
from until import PATIENCE_S, until

GPUS = {f"GPU-{number}f1e2d3c-1111-2222-3333-444455556666": 16 * GIB for number in range(2)}
JOB: dict[str, Any] = {"model": "m", "dataset": "d", "entrypoint": "classifier"}


@pytest.fixture
async def asking(common: CommonSettings, bus: Bus) -> AsyncIterator[Bus]:
    """A person's connection to a device_manager that knows its GPUs and a runner that starts nothing."""
    telemetry, metrics = LearningTelemetry("device_manager", host=common.host), Metrics("device_manager")
    async with Bus.open(common, name="device_manager", service=True) as own:
        context = Context(common, own, telemetry, metrics, asyncio.Event())
        settings = Settings(cpu_slots=0, place_s=0.1, quotas={"ann": 1})
        service = DeviceManagerService(context, settings, gpus=FakeGpus("testhost", dict(GPUS)))
        report = runner("testhost", ready=False).to_map()
        await Bucket(bus, bus.subjects.devices).put("testhost.runner", report)
        async with (
            serving(own, "device_manager", "", service.endpoints(), metrics=metrics, rejected=lambda *_: None),
            asyncio.TaskGroup() as tasks,
        ):
            working = tasks.create_task(service.run())
            await own.client.flush()
            await until(lambda: _is_reported(bus))
            yield bus
            context.stopping.set()
            await working


async def _is_reported(bus: Bus) -> bool:
    return len(await _devices(bus)) == len(GPUS)


async def ask(bus: Bus, verb: str, body: dict[str, object]) -> dict[str, Any]:
    return await bus.request(f"railbus.req.jobs.{verb}", body)


async def test_why_and_a_dry_run_are_answered_from_the_queue_as_it_is(asking: Bus) -> None:
    spec = {**JOB, "id": "first", "owner": "ann", "devices": {"kind": "gpu", "count": 1}}
    await ask(asking, "submit", spec)
    told = Why.parse(await ask(asking, "why", {"id": "first"}))
    assert (told.job, told.headline, told.place) == ("first", "runner_not_ready", 1)
    assert [(one.host, one.word, one.fitting) for one in told.hosts] == [("testhost", "runner_not_ready", 2)]
    dry = Why.parse(await ask(asking, "dry_run", {**JOB, "devices": {"kind": "gpu", "count": 2}}))
    assert (dry.job, dry.place, dry.ahead, dry.headline) == (None, 2, ("first",), "runner_not_ready")
    assert (await ask(asking, "list", {}))["total"] == 1
    (listed,) = (await ask(asking, "list", {}))["jobs"]
    assert listed["reason"] == told.text

    held = {
        name: Lease(device=name, host="testhost", holder="bob", nonce=name, granted_at=told_at)
        for name, told_at in ((state["device"]["id"], "2026-01-01T00:00:00Z") for state in await _devices(asking))
    }
    for name, lease in held.items():
        await Bucket(asking, asking.subjects.leases).put(name, lease.to_map(), ttl_s=60)
    await Bucket(asking, asking.subjects.devices).put("testhost.runner", runner("testhost").to_map())
    told = Why.parse(await ask(asking, "why", {"id": "first"}))
    assert told.headline == "resources"
    assert {one.holder for one in told.holders} == {"bob"}
    assert (told.expected_start, told.expected_basis) == (None, "nobody knows when bob ends")


async def _devices(bus: Bus) -> list[dict[str, Any]]:
    answer: dict[str, Any] = await bus.request("railbus.req.devices.list", {})
    return list(answer["devices"])


async def test_what_cannot_be_is_refused_with_the_most_that_can_by_a_submission_and_a_dry_run_alike(
    asking: Bus,
) -> None:
    async def is_refused() -> bool:
        """Not before every host that is there has had time to report."""
        try:
            await ask(asking, "dry_run", {**JOB, "devices": {"kind": "gpu", "count": 3}})
        except NeverFits:
            return True
        return False

    await until(is_refused)
    for verb in ("submit", "dry_run"):
        with pytest.raises(NeverFits, match="testhost has the most: 2") as caught:
            await ask(asking, verb, {**JOB, "devices": {"kind": "gpu", "count": 3}})
        assert caught.value.details == {"field": "devices.count", "value": 3, "largest": 2}
        with pytest.raises(NeverFits, match="no host has a gpu with 40 GiB"):
            await ask(asking, verb, {**JOB, "devices": {"kind": "gpu", "min_memory_bytes": 40 * GIB}})
        with pytest.raises(UnknownEntrypoint):
            await ask(asking, verb, {**JOB, "entrypoint": "clasifier"})
        with pytest.raises(InvalidField):
            await ask(asking, verb, {**JOB, "devices": {"count": 0}})
    with pytest.raises(JobNotFound):
        await ask(asking, "why", {"id": "nobody"})
    waits = {**JOB, "id": "patient", "wait_for_hosts": True, "devices": {"kind": "gpu", "count": 3}}
    assert (await ask(asking, "submit", waits))["state"] == "queued"
    await Bucket(asking, asking.subjects.devices).put("testhost.runner", runner("testhost", entrypoints=()).to_map())
    assert (await ask(asking, "submit", waits))["id"] == "patient"  # accepted once is accepted
    with pytest.raises(UnknownEntrypoint):
        await ask(asking, "submit", {**waits, "id": "another"})
    await Bucket(asking, asking.subjects.devices).put("testhost.runner", runner("testhost").to_map())
    told = Why.parse(await ask(asking, "why", {"id": "patient"}))
    assert (told.headline, told.can_ever_start) == ("no_such_device", False)


@pytest.mark.parametrize("body", [b"", wire.encode({**JOB, "model": "of-mallory"})], ids=["refused", "accepted"])
async def test_an_event_of_a_job_sends_its_outcome_into_no_inbox_but_of_device_managers(
    asking: Bus, body: bytes
) -> None:
    """Whoever may submit could else put words of their own into answers to other services and people."""
    targets = ("_RINBOX.runner.mux.x", "_INBOX.ann.mux", "_R_.abcdef.ghijkl", "_RINBOX.device_managers.x")
    heard = [await asking.client.subscribe(target) for target in targets]
    own = await asking.client.subscribe("_RINBOX.device_manager.mux")
    for target in (*targets, own.subject):
        await asking.publish(Outgoing("railbus.jobs.submit", body, "", headers={OUTCOME_HEADER: target}))
    assert (await own.next_msg(PATIENCE_S)).subject == own.subject
    await asking.client.flush()
    assert [one.pending_msgs for one in heard] == [0] * len(targets)
