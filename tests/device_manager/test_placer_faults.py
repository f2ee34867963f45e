"""Placers as processes of their own that are stopped, killed and robbed of their store; the runner is played."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import fail_points
from histories import violations
from host_processes import Host, running_host
from played_cluster import JOB, History, played_runner
from railbus.client import Client
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import NotFound
from railbus_shared.settings import CommonSettings
from servers import Server
from until import until

pytestmark = pytest.mark.timeout(120)  # waits for leases and for the placer's key to expire


@contextlib.asynccontextmanager
async def placing(common: CommonSettings, folder: Path, name: str) -> AsyncIterator[Host]:
    """A device_manager without devices of its own, with fail points in `folder`."""
    async with running_host(
        common,
        folder / name,
        name,
        ("device_manager",),
        launcher=(sys.executable, fail_points.__file__),
        env={fail_points.FOLDER: str(folder)},
        settings={"device_manager_cpu_slots": "0", "lease_ttl_s": "6", "heartbeat_s": "0.5"},
    ) as host:
        yield host


async def leader(bus: Bus) -> str:
    """Who has the placer's key, by its producer's name."""
    entry = await Bucket(bus, bus.subjects.leader).get("placer")
    return "" if entry is None or entry.value is None else str(entry.value["holder"])


async def test_a_placer_that_is_stopped_with_leases_in_hand_or_killed_costs_nothing_but_time(
    common: CommonSettings, bus: Bus, tmp_path: Path
) -> None:
    """It holds leases when it is stopped; they lapse, another places the job, and then it goes on where it was."""
    settings, history, client = common.model_copy(update={"lease_ttl_s": 6}), History(), Client(bus)
    async with (
        played_runner(settings, "a", history=history) as runner,
        placing(common, tmp_path, "dm1") as first,
    ):

        async def dm1_places() -> bool:
            return "dm1" in await leader(bus)

        await client.submit({**JOB, "id": "early"})
        await until(dm1_places)
        async with placing(common, tmp_path, "dm2") as second:
            await until(lambda: runner.has("early"))
            fail_points.arm(tmp_path, "before.Placed", signal.SIGSTOP)
            await client.submit({**JOB, "id": "contested"})
            await runner.end("early")
            await until(lambda: not (tmp_path / "before.Placed").exists())
            await until(lambda: runner.has("contested"))
            assert "dm2" in await leader(bus)
            first.processes["device_manager"].send_signal(signal.SIGCONT)
            for number in range(4):
                await client.submit({**JOB, "id": f"later-{number}"})
            await until(functools.partial(_says, first, "a job has changed in the meantime"))
            (held,) = (await Bucket(bus, bus.subjects.leases).read_all()).values()
            assert held.value is not None
            assert held.value["holder"] == "contested"
            second.processes["device_manager"].kill()
            await second.processes["device_manager"].wait()
            await runner.end("contested")
            for number in range(4):
                await until(functools.partial(runner.has, f"later-{number}"))
                await runner.end(f"later-{number}")
    for job in ("early", "contested", *(f"later-{number}" for number in range(4))):
        assert history.of(job) == ["job.started", "job.succeeded"]
    assert violations(history.events) == []


def _says(host: Host, words: str) -> bool:
    return words in host.log("device_manager").read_text()


async def test_a_store_that_is_wiped_while_jobs_wait_is_refused_and_not_made_anew(
    common: CommonSettings, bus: Bus, server: Server, tmp_path: Path
) -> None:
    async with placing(common, tmp_path, "dm1") as host:
        await Client(bus).submit({**JOB, "id": "waits"})
        server.kill()
        shutil.rmtree(server.folder / "store")
        server.start()
        async with asyncio.timeout(60):
            status = await host.processes["device_manager"].wait()
    lines = [json.loads(line) for line in host.log("device_manager").read_text().splitlines()]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert (status, line["error"]["code"]) == (2, "STORE_MISSING")
    with pytest.raises(NotFound):
        await bus.last_sequence("RAILBUS_JOBS")
