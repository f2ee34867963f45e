"""A runner that nobody could tell to stop its trainer finds it in the job's record."""

from __future__ import annotations

from pathlib import Path

import pytest

from histories import unended, violations
from host_processes import TRAINING, running_host
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.happenings import CancelAsked, PreemptAsked
from railbus_shared.layout import Layout
from railbus_shared.records import JobRecords
from railbus_shared.settings import CommonSettings
from running_up import PACED
from until import until

JOB = {
    "model": "paced",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 2000, "pause_s": 0.03},
    "checkpoint": {"every_steps": 10},
    "devices": {"kind": "cpu"},
    "stop_grace_s": 20,
}


@pytest.mark.timeout(150)  # starts services that import torch, and trains
async def test_an_attempt_ends_within_a_renewal_although_no_order_to_stop_arrives(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    """The record is changed as a device_manager would, and the message to the runner is never sent."""
    entrypoints = tmp_path / "code"
    entrypoints.mkdir()
    (entrypoints / "paced.py").write_text(PACED)
    import_dataset(Layout(tmp_path / "a"), "digits")
    records, client = JobRecords(Bucket(bus, bus.subjects.jobs)), Client(bus)

    async def record() -> JobRecord:
        return (await records.get(job)).record

    async def has_saved(lease_epoch: int) -> bool:
        now = await record()
        return now.state == "running" and now.lease_epoch == lease_epoch and now.checkpoint not in (None, before)

    settings = {"lease_ttl_s": "6", "runner_entrypoint_dirs": f'["{entrypoints}"]'}
    async with running_host(common, tmp_path / "a", "a", TRAINING, settings=settings):
        job, before = (await client.submit(JOB)).id, None
        await until(lambda: has_saved(1))
        await records.apply(job, PreemptAsked(1, "j-other"))
        before = (await record()).checkpoint
        await until(lambda: has_saved(2))
        assert ((await record()).attempt, (await record()).end_cause) == (1, "preempted")
        await records.apply(job, CancelAsked(by="ada"))
        events = [event async for event in client.follow(job)]
        final = await record()
    assert (final.state, final.cancelled_by, final.end_cause) == ("cancelled", "ada", "cancelled")
    assert [event["data"]["cause"] for event in events if event["type"] == "job.requeued"] == ["preempted"]  # type: ignore[index]
    assert violations(events) == []
    assert unended(events) == set()
