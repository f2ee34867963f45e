"""kill -9 of what runs, in mid-training, under one `railbus up`, which starts again what was killed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from histories import FINAL, unended, violations
from railbus.client import Client
from running_up import RunningUp, finished, until_event
from until import PATIENCE_S

pytestmark = pytest.mark.timeout(180)  # starts services that import torch, kills them, and trains

JOB: dict[str, Any] = {
    "model": "paced",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 8, "pause_s": 0.03},
    "seed": 7,
    "checkpoint": {"every_steps": 20},
    "devices": {"kind": "cpu"},
}
_expected: list[object] = []
"""The weights of an undisturbed run."""


def _weights(events: list[dict[str, object]]) -> object:
    (weighed,) = [event for event in events if event["type"] == "app.weighed"] or [_told(events)]
    data = weighed["data"]
    assert isinstance(data, dict)
    return data["sha256"]


def _told(events: list[dict[str, object]]) -> dict[str, object]:
    raise AssertionError([(event["type"], event.get("number")) for event in events][-20:])


async def _undisturbed(client: Client) -> object:
    if not _expected:
        job = {**JOB, "model": "undisturbed", "params": {**JOB["params"], "pause_s": 0}}
        _expected.append(_weights(await finished(client, (await client.submit(job)).id)))
    return _expected[0]


def _assert_a_good_history(up: RunningUp, job: str) -> None:
    """Every event is told once, and together they keep what is promised of jobs."""
    lines = up.log_lines()
    keys = [(line["producer"], line["number"]) for line in lines]
    assert len(keys) == len(set(keys))
    assert violations(lines) == []
    assert job not in unended(lines)
    assert [line["type"] for line in lines if line.get("job") == job and line["type"] in FINAL] == ["job.succeeded"]


async def test_a_killed_runners_job_goes_on_from_its_last_checkpoint_bit_by_bit(up: RunningUp) -> None:
    async with up.client() as client:
        expected = await _undisturbed(client)
        job = (await client.submit(JOB)).id
        await until_event(client, job, "job.checkpointed", count=2)
        up.kill("runner")
        events = await finished(client, job)
        record = await client.job(job)
        await client.flush()
    assert (record.state, record.attempt, record.lease_epoch) == ("succeeded", 2, 2)
    assert [event["data"] for event in events if event["type"] == "checkpoint.resumed"]
    assert _weights(events) == expected
    _assert_a_good_history(up, job)


@pytest.mark.parametrize("service", ["telemetry", "nats", "device_manager", "dataloader"])
async def test_a_trainer_does_not_notice_the_death_of(up: RunningUp, service: str) -> None:
    async with up.client() as client:
        expected = await _undisturbed(client)
        job = (await client.submit(JOB)).id
        await until_event(client, job, "job.checkpointed")
        up.kill(service)
        events = await finished(client, job)
        record = await client.job(job)
        up.wait_until(up.is_ready, timeout_s=PATIENCE_S, what="ready again")
        await client.flush()
    assert (record.state, record.attempt, record.lease_epoch) == ("succeeded", 1, 1)
    assert not [event for event in events if event["type"] == "checkpoint.resumed"]
    assert _weights(events) == expected
    _assert_a_good_history(up, job)


async def test_a_runner_paused_past_its_lease_finds_itself_fenced(up: RunningUp) -> None:
    import signal

    async with up.client() as client:
        job = (await client.submit({**JOB, "params": {"epochs": 40, "pause_s": 0.03}})).id
        await until_event(client, job, "job.checkpointed")
        up.kill("runner", signal.SIGSTOP)
        await until_event(client, job, "job.requeued")
        up.kill("runner", signal.SIGCONT)
        await until_event(client, job, "job.started", count=2)
        record = await client.job(job)
        assert record.lease_epoch == 2
        await client.cancel(job)
        await finished(client, job)
        await client.flush()
    assert violations(up.log_lines()) == []


async def test_readiness_follows_nats_and_liveness_does_not(up: RunningUp) -> None:
    import signal

    from running_up import SERVICES

    up.kill("nats", signal.SIGSTOP)
    try:
        for service in SERVICES:

            def names_nats(name: str = service) -> bool:
                status, text = up.get(name, "/readyz")
                missing = [line for line in text.splitlines() if line.startswith("[-]")]
                return status == 503 and any("nats" in line.lower() for line in missing)

            await asyncio.to_thread(up.wait_until, names_nats, timeout_s=PATIENCE_S, what=f"{service} answers 503")
            assert up.get(service, "/livez")[0] == 200
    finally:
        up.kill("nats", signal.SIGCONT)
    await asyncio.to_thread(up.wait_until, up.is_ready, timeout_s=PATIENCE_S, what="ready again")
