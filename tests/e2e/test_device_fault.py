"""A job whose device breaks under it goes on from its last checkpoint; real services, on a NATS without permissions.

The test plays the device_manager that has seen the fault: it tells the runner, as `tests/device_manager` shows it does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from host_processes import TRAINING, running_host
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.bus.connection import Bus
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from running_up import PACED, finished, until_event

pytestmark = pytest.mark.timeout(120)  # starts services that import torch

JOB = {
    "model": "unlucky",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 8, "pause_s": 0.03},
    "checkpoint": {"every_steps": 10},
    "devices": {"kind": "cpu"},
}


async def test_an_attempt_whose_device_broke_ends_as_device_fault_and_the_job_goes_on(
    common: CommonSettings, bus: Bus, tmp_path: Path
) -> None:
    import_dataset(Layout(tmp_path / "a"), "digits")
    (tmp_path / "paced.py").write_text(PACED)
    settings = {"heartbeat_s": "0.5", "runner_entrypoint_dirs": json.dumps([str(tmp_path)])}
    settings |= {"runner_grace_s": "5", "device_manager_cpu_slots": "1"}
    async with running_host(common, tmp_path / "a", "a", TRAINING, settings=settings), Client.connect(common) as client:
        job = (await client.submit(JOB)).id
        await until_event(client, job, "job.checkpointed", count=2)
        order = {"job": job, "lease_epoch": 1, "reason": "device_fault", "why": "device a-gpu0: XID 79"}
        await bus.request("railbus.req.runner.a.stop", order)
        requeued = await until_event(client, job, "job.requeued")
        events = await finished(client, job)
        record = await client.job(job)
    assert isinstance(requeued["data"], dict)
    assert requeued["data"]["cause"] == "device_fault"
    assert requeued["data"]["error"]["code"] == "DEVICE_BROKEN"
    assert "XID 79" in requeued["data"]["error"]["message"]
    assert [event["type"] for event in events].count("checkpoint.resumed") == 1
    assert (record.state, record.lease_epoch) == ("succeeded", 2)
