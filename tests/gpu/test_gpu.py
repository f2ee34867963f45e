"""On a machine with an NVIDIA GPU: discover, lease, mask, train, save, give the memory back, also after kill -9.

One command: `.venv/bin/pytest tests/gpu -m gpu`. What is shown here is shown nowhere else; see docs/devices.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import pytest

from railbus.client import Client
from railbus_shared import wire
from railbus_shared.contracts.requests import DeviceState
from railbus_shared.errors import NoFreeDevice, error_from_wire
from running_up import RunningUp, finished, until_event
from until import until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # the first use of CUDA in a process takes seconds

PATIENT_S = 60.0
_SLACK_BYTES = 200 << 20


def job(entrypoint: str = "on_gpu:train", **fields: Any) -> dict[str, Any]:
    spec = {"model": "on-gpu", "dataset": "digits", "entrypoint": entrypoint, "devices": {"kind": "gpu"}}
    return {**spec, **fields}


LASTING = job(params={"epochs": 400, "pause_s": 0.02, "mib": 1024}, checkpoint={"every_steps": 20})


async def gpus(client: Client) -> list[DeviceState]:
    return [state for state in (await client.devices()).devices if state.device.kind == "gpu"]


async def all_clear(client: Client) -> bool:
    """Whether nobody has any GPU and all memory is back."""
    return all(
        state.state == "free"
        and not state.holders
        and state.device.memory_used_bytes <= state.device.memory_idle_bytes + _SLACK_BYTES
        for state in await gpus(client)
    )


async def until_clear(client: Client) -> None:
    await until(lambda: all_clear(client), seconds=PATIENT_S)


async def ask(up: RunningUp, verb: str, body: dict[str, object]) -> dict[str, Any]:
    async with up.raw_client() as raw:
        reply = await raw.request(f"railbus.req.devices.{verb}", wire.encode(body), timeout=30)
    answer = wire.decode(reply.data)
    if "code" in answer:
        raise error_from_wire(answer)
    return answer


def data_of(events: list[dict[str, object]], kind: str) -> list[Any]:
    return [event["data"] for event in events if event["type"] == kind]


async def test_a_gpu_is_discovered_with_what_the_driver_says_of_it(up: RunningUp) -> None:
    async with up.client() as client:
        await until_clear(client)
        found = await gpus(client)
    assert found
    for state in found:
        device = state.device
        assert device.uuid.startswith(("GPU-", "MIG-"))
        assert device.healthy, device.health_reason
        assert device.memory_bytes > 1 << 30
        assert device.shares == (1 if device.is_mig else 2)


async def test_a_job_trains_on_the_gpu_of_its_lease_alone_and_its_memory_comes_back(up: RunningUp) -> None:
    async with up.client() as client:
        await until_clear(client)
        name = (await client.submit(job(params={"mib": 1024}, checkpoint={"every_steps": 10}))).id
        events = await finished(client, name, timeout_s=120)
        record = await client.job(name)
        assert record.state == "succeeded", record.reason
        uuids = {state.device.id: state.device.uuid for state in await gpus(client)}
        await until_clear(client)
    (started,) = data_of(events, "job.started")
    (leased,) = (uuids[device] for device in started["devices"])
    (looked,) = data_of(events, "app.looked")
    assert (looked["visible"], looked["device"], looked["count"]) == (leased, "cuda:0", 1)
    if leased.startswith("GPU-"):  # of a slice torch tells the GPU's
        assert looked["uuid"].removeprefix("GPU-") == leased.removeprefix("GPU-")
    metas = sorted(up.layout.checkpoints("on-gpu").glob("*.meta.json"))
    assert json.loads(metas[-1].read_bytes())["devices"] == started["devices"]


async def test_the_classifier_learns_on_a_gpu(up: RunningUp) -> None:
    async with up.client() as client:
        name = (await client.submit(job("classifier", model="digits-gpu", params={"epochs": 6}))).id
        events = await finished(client, name, timeout_s=120)
    (ended,) = data_of(events, "job.succeeded")
    assert ended["metrics"]["accuracy"] > 0.9


async def test_a_lease_by_hand_keeps_jobs_off_the_gpu_until_it_is_released(up: RunningUp) -> None:
    async with up.client() as client:
        await until_clear(client)
        number = len(await gpus(client))
        wanted: dict[str, object] = {"holder": "ann", "devices": {"kind": "gpu", "count": number}, "ttl_s": 120}
        held = await ask(up, "lease", wanted)
        assert {state.state for state in await gpus(client)} == {"leased"}
        with pytest.raises(NoFreeDevice):
            await ask(up, "lease", {"holder": "bob", "devices": {"kind": "gpu"}})
        name = (await client.submit(job())).id
        assert (await client.job(name)).state == "queued"
        await ask(up, "release", held)
        assert (await finished(client, name, timeout_s=120))[-1]["type"] == "job.succeeded"


async def test_a_killed_trainer_gives_its_memory_back_and_the_job_goes_on(up: RunningUp) -> None:
    async with up.client() as client:
        await until_clear(client)
        name = (await client.submit(LASTING)).id
        looked = await until_event(client, name, "app.looked")
        await until_event(client, name, "job.checkpointed", count=2)
        assert isinstance(looked["data"], dict)
        os.kill(looked["data"]["pid"], signal.SIGKILL)
        await until_event(client, name, "checkpoint.resumed", timeout_s=120)
        await client.cancel(name)
        await finished(client, name, timeout_s=120)
        await until_clear(client)


async def test_a_killed_runner_gives_its_gpus_back_and_the_job_goes_on(up: RunningUp) -> None:
    async with up.client() as client:
        await until_clear(client)
        name = (await client.submit(LASTING)).id
        await until_event(client, name, "job.checkpointed", count=2)
        up.kill("runner")
        await until_event(client, name, "checkpoint.resumed", timeout_s=120)
        await client.cancel(name)
        await finished(client, name, timeout_s=120)
        await until_clear(client)


async def test_a_job_that_shares_a_gpu_gets_no_more_than_its_fraction(up: RunningUp) -> None:
    async with up.client() as client:
        await until_clear(client)
        if not any(state.device.shares > 1 for state in await gpus(client)):
            pytest.skip("MIG slices are not shared")
        devices = {"kind": "gpu", "sharing": "fraction", "fraction": 0.5}
        name = (await client.submit(job("on_gpu:greedy", devices=devices, params={"fraction": 0.5}))).id
        events = await finished(client, name, timeout_s=120)
        assert len(data_of(events, "app.capped")) == 1, events[-1]
        await until_clear(client)


async def test_two_jobs_train_on_one_gpu_side_by_side(up: RunningUp) -> None:
    async with up.client() as client:
        await until_clear(client)
        shared = [state.device.id for state in await gpus(client) if state.device.shares > 1]
        if not shared:
            pytest.skip("MIG slices are not shared")
        devices = {"kind": "gpu", "sharing": "fraction", "fraction": 0.5}
        names = [
            (await client.submit({**LASTING, "model": f"half-{n}", "devices": devices})).id
            for n in range(2 * len(shared))
        ]
        for name in names:
            await until_event(client, name, "job.first_step", timeout_s=120)
        assert all(len(state.holders) == 2 for state in await gpus(client) if state.device.shares > 1)
        for name in names:
            await client.cancel(name)
            await finished(client, name, timeout_s=120)
        await until_clear(client)


async def test_a_gpu_that_a_stranger_uses_is_granted_once_he_has_gone(up: RunningUp) -> None:
    held = "import torch; x = torch.ones(1 << 28, device='cuda'); print('held', flush=True); input()"
    async with up.client() as client:
        await until_clear(client)
        stranger = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", held), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert stranger.stdout is not None
            assert await stranger.stdout.readline() == b"held\n"

            async def is_seen() -> bool:
                return any(state.device.compute_pids for state in await gpus(client))

            try:
                await until(is_seen, seconds=10)
            except TimeoutError:
                pytest.skip("NVML names no processes here, as in a container with process ids of its own")
            assert [state.state for state in await gpus(client) if state.device.compute_pids] == ["reclaiming"]
        finally:
            stranger.kill()
            await stranger.wait()
        await until_clear(client)
