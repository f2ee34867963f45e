"""A host that the network cuts off for longer than a lease: it loses its job, and when it is back it does no harm."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from histories import violations
from host_processes import TRAINING, running_host
from network import Network, network
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.bus.bucket import Bucket
from railbus_shared.layout import Layout
from railbus_shared.records import JobRecords
from railbus_shared.settings import CommonSettings
from running_up import PACED, until_event
from servers import Server

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]  # services that import torch, and leases that must lapse

JOB: dict[str, Any] = {
    "model": "paced",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 1000, "pause_s": 0.03},
    "checkpoint": {"every_steps": 20},
    "devices": {"kind": "cpu"},
    "stop_grace_s": 0,
}
SHORT = {"lease_ttl_s": "6", "heartbeat_s": "0.5", "insecure": "1"}


@pytest.fixture
def net() -> Iterator[Network]:
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("ip and nsenter are missing")
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(network())
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"no network namespace can be made here: {exc.stderr.decode(errors='replace').strip()}")
        yield made


async def test_a_host_that_is_cut_off_one_way_or_both_is_fenced_and_takes_its_job_up_again_when_it_is_back(
    net: Network, tmp_path: Path
) -> None:
    (tmp_path / "nats").mkdir()
    server = Server(tmp_path / "nats", host=net.here)
    server.start()
    common = CommonSettings(root=tmp_path / "c", nats_url=server.url, insecure=True)
    import_dataset(Layout(tmp_path / "a"), "digits")
    (tmp_path / "entrypoints").mkdir()
    (tmp_path / "entrypoints" / "paced.py").write_text(PACED)
    there = {f"{service}_http_host": net.there for service in TRAINING}
    there |= {"runner_entrypoint_dirs": json.dumps([str(tmp_path / "entrypoints")]), "device_manager_cpu_slots": "1"}
    try:
        async with (
            running_host(
                common, tmp_path / "b", "b", ("device_manager",), settings={**SHORT, "device_manager_cpu_slots": "0"}
            ),
            running_host(
                common,
                tmp_path / "a",
                "a",
                TRAINING,
                launcher=(*net.inside, sys.executable, "-m"),
                settings={**SHORT, **there},
            ),
            Client.connect(common) as client,
        ):
            await _is_cut_off_twice(client, net)
    finally:
        server.stop()


async def _is_cut_off_twice(client: Client, net: Network) -> None:
    job, records = (await client.submit(JOB)).id, JobRecords(Bucket(client.bus, client.bus.subjects.jobs))
    for count, trouble in enumerate((net.silent, net.cut), start=1):
        await until_event(client, job, "job.checkpointed", count=2 * count)
        with trouble():
            await until_event(client, job, "job.requeued", count=count)
            assert (await records.get(job)).record.state == "queued"  # who is cut off might be asked otherwise
        await until_event(client, job, "job.started", count=count + 1)
        await until_event(client, job, "checkpoint.resumed", count=count)
    await client.cancel(job)
    events = [event async for event in client.follow(job)]
    record = await client.job(job)
    assert (record.state, record.lease_epoch) == ("cancelled", 3), record
    assert violations(events) == []
    assert len([event for event in events if event["type"] == "job.cancelled"]) == 1
