"""Devices on a whole system: leased by hand, drained, and the jobs that wait for them."""

from __future__ import annotations

from typing import Any

import pytest

import dashboard
from railbus.client import Client
from railbus_shared import wire
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.errors import LeaseLost, NoFreeDevice, error_from_wire
from running_up import SERVICES, RunningUp, finished
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(120)  # starts services that import torch

JOB: dict[str, Any] = {
    "model": "waits",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 1, "pause_s": 0},
    "devices": {"kind": "cpu"},
}


async def _ask(up: RunningUp, verb: str, body: dict[str, object]) -> dict[str, Any]:
    async with up.raw_client() as raw:
        reply = await raw.request(f"railbus.req.devices.{verb}", wire.encode(body), timeout=PATIENCE_S)
    answer = wire.decode(reply.data)
    if "code" in answer:
        raise error_from_wire(answer)
    return answer


async def _until(client: Client, job: str, claim: str) -> JobRecord:
    """The record once its reason says so."""

    async def says_so() -> bool:
        return claim in (await client.job(job)).reason

    await until(says_so)
    return await client.job(job)


async def _only_state(client: Client) -> str:
    (device,) = (await client.devices()).devices
    return device.state


async def _until_free(client: Client) -> None:
    async def is_free() -> bool:
        return await _only_state(client) == "free"

    await until(is_free)


async def test_a_device_leased_by_hand_is_waited_for_and_free_once_released(up: RunningUp) -> None:
    held = await _ask(up, "lease", {"holder": "someone", "devices": {"kind": "cpu"}, "ttl_s": 60})
    async with up.client() as client:
        assert await _only_state(client) == "leased"
        with pytest.raises(NoFreeDevice):
            await _ask(up, "lease", {"holder": "another", "devices": {"kind": "cpu"}})
        job = (await client.submit(JOB)).id
        record = await _until(client, job, "someone")
        assert record.state == "queued"
        held = await _ask(up, "renew", held)
        await _ask(up, "release", held)
        assert (await finished(client, job))[-1]["type"] == "job.succeeded"
        await _until_free(client)  # the lease is given back once the end is told
    with pytest.raises(LeaseLost):
        await _ask(up, "renew", held)


async def test_a_lease_by_hand_that_is_not_renewed_ends_by_itself(up: RunningUp) -> None:
    await _ask(up, "lease", {"holder": "forgetful", "devices": {"kind": "cpu"}, "ttl_s": 1})
    async with up.client() as client:
        await _until_free(client)


async def test_a_drained_host_takes_no_jobs_until_it_is_undrained(up: RunningUp) -> None:
    async with up.client() as client:
        host = (await client.devices()).hosts[0].host
        await _ask(up, "drain", {"host": host})
        job = (await client.submit({**JOB, "model": "drained"})).id
        record = await _until(client, job, "drain")
        assert record.state == "queued"
        await _ask(up, "drain", {"host": host, "draining": False})
        assert (await finished(client, job))[-1]["type"] == "job.succeeded"
        await _until_free(client)


async def test_jobs_wait_for_the_one_device_oldest_first_and_priority_before_age(up: RunningUp) -> None:
    async with up.client() as client:
        held = await _ask(up, "lease", {"holder": "gate", "devices": {"kind": "cpu"}, "ttl_s": 60})
        jobs = [(await client.submit({**JOB, "model": f"q{n}", "priority": p})).id for n, p in enumerate((0, 0, 5))]
        await _until(client, jobs[2], "gate")
        await _ask(up, "release", held)
        for job in jobs:
            await finished(client, job)
        started = [(await client.job(job)).started_at or "" for job in jobs]
    assert started[2] < started[0] < started[1]


def test_whatever_the_dashboard_asks_for_is_served(up: RunningUp) -> None:
    pages = [up.get(service, "/metrics")[1] for service in SERVICES]
    served = {line.split()[2] for page in pages for line in page.splitlines() if line.startswith("# TYPE ")}
    # a counter is declared as `x` or as `x_total`, whichever form the page has
    assert {dashboard.family(name) for name in dashboard.metrics()} <= {dashboard.family(name) for name in served}
