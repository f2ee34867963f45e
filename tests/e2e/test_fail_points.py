"""kill -9 between two steps that belong together, under `railbus up`: the job ends once, with the bits it would have.

What kills itself is the service that makes the change of the record which the point names (see `fail_points`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import Any

import pytest

from fail_points import arm
from histories import untold, violations
from railbus.client import Client
from railbus_runner import processes
from railbus_shared.errors import TransientError
from running_up import RunningUp, until_event
from until import until

pytestmark = pytest.mark.timeout(180)  # starts services that import torch, kills them, and trains

JOB: dict[str, Any] = {
    "model": "paced",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "params": {"epochs": 2, "pause_s": 0.01},
    "seed": 7,
    "checkpoint": {"every_steps": 10},
    "devices": {"kind": "cpu"},
}
_expected: list[object] = []
"""The weights of an undisturbed run."""


async def _through(client: Client, up: RunningUp, job: str) -> list[dict[str, Any]]:
    """What the logs tell of a job once it has ended, also there, and its devices are free again."""

    async def is_over() -> bool:
        with contextlib.suppress(TransientError):  # whoever would answer may have died just now
            return (await client.job(job)).is_final
        return False

    async def are_free() -> bool:
        with contextlib.suppress(TransientError):
            return all(device.state == "free" for device in (await client.devices()).devices)
        return False

    async def is_told_once() -> bool:
        await client.flush()
        return untold(up.log_lines(), [job]) == {}

    await until(is_over, seconds=90)
    await until(are_free)
    await until(is_told_once)
    return [line for line in up.log_lines() if line.get("job") == job]


def _weights(lines: list[dict[str, Any]]) -> set[object]:
    return {line["data"]["sha256"] for line in lines if line["type"] == "app.weighed"}


@pytest.mark.parametrize(
    ("point", "attempts", "lease_epochs", "told"),
    [
        ("after.Placed", 1, {2}, set()),  # the record knows and no runner has been asked
        ("after.Started", 2, {2}, set()),  # the record says running and nothing has been forked
        ("before.Saved", 2, {2}, {"checkpoint.swept"}),  # a checkpoint has its name and the record does not name it
        ("after.Saved", 2, {2}, {"checkpoint.completed", "checkpoint.resumed"}),  # it does, and the meta is a draft
        ("after.Ended", 1, {1}, set()),  # it does, and the end is not told, the leases are not given back
    ],
)
async def test_a_service_that_dies_between_two_steps_costs_nothing_but_time(
    failing_up: RunningUp, point: str, attempts: int, lease_epochs: set[int], told: set[str]
) -> None:
    up, folder = failing_up, failing_up.root.parent
    async with up.client() as client:
        if not _expected:
            lines = await _through(client, up, (await client.submit({**JOB, "model": "undisturbed"})).id)
            _expected.extend(_weights(lines))
        arm(folder, point)
        job = (await client.submit({**JOB, "model": f"paced-{point.lower()}"})).id
        lines = await _through(client, up, job)
        record = await client.job(job)
    assert not (folder / point).exists(), "nobody came to the point"
    assert (record.state, record.attempt) == ("succeeded", attempts), record
    assert record.lease_epoch in lease_epochs
    assert _weights(lines) == set(_expected)
    types = {line["type"] for line in lines}
    assert told <= types
    assert ("checkpoint.resumed" in types) == ("checkpoint.resumed" in told)
    assert violations(lines) == []


@pytest.mark.parametrize("point", ["before.Started", "after.Started"])
async def test_a_runner_that_is_told_to_stop_while_it_takes_a_job_gives_it_back_uncharged(
    failing_up: RunningUp, point: str
) -> None:
    up, folder = failing_up, failing_up.root.parent
    async with up.client() as client:
        await until(up.is_ready)
        arm(folder, point, signal.SIGTERM)
        job = (await client.submit({**JOB, "model": f"stopped-{point.lower()}", "max_attempts": 1})).id
        lines = await _through(client, up, job)
        record = await client.job(job)
    assert not (folder / point).exists(), "nobody came to the point"
    assert (record.state, record.attempt, record.lease_epoch) == ("succeeded", 1, 2), record
    assert [line["data"]["cause"] for line in lines if line["type"] == "job.requeued"] == ["preempted"]


WRITTEN_BESIDE: dict[str, Any] = {
    **JOB,
    "params": {"epochs": 4, "pause_s": 0.03},
    "checkpoint": {"every_steps": 5, "mode": "async"},
}


_whole: list[object] = []
"""The weights of an undisturbed run of it."""


async def _undisturbed_beside(client: Client, up: RunningUp) -> set[object]:
    if not _whole:
        spec = {**WRITTEN_BESIDE, "model": "beside-whole", "params": {"epochs": 4}}
        _whole.extend(_weights(await _through(client, up, (await client.submit(spec)).id)))
    return set(_whole)


def _processes_of(up: RunningUp, job: str) -> tuple[int, int]:
    """Pids of a job's trainer and of its writer, as its runner remembers them."""
    state = json.loads((up.layout.state / "runner" / "attempts" / f"{job}.1.json").read_bytes())
    return state["pid"], state["writer_pid"]


@pytest.mark.parametrize(
    ("point", "told"),
    [
        ("before.Saved", {"checkpoint.swept", "checkpoint.resumed"}),
        ("after.Saved", {"checkpoint.completed", "checkpoint.resumed"}),
    ],
)
async def test_a_runner_that_dies_while_a_writer_waits_for_its_answer_costs_nothing_but_time(
    failing_up: RunningUp, point: str, told: set[str]
) -> None:
    up, folder = failing_up, failing_up.root.parent
    async with up.client() as client:
        expected = await _undisturbed_beside(client, up)
        job = (await client.submit({**WRITTEN_BESIDE, "model": f"beside-{point.lower()}"})).id
        async for event in client.follow(job):
            if event["type"] == "checkpoint.written" and event["source"] == "writer":
                arm(folder, point)
                break
        await until(lambda: not (folder / point).exists())
        lines = await _through(client, up, job)
        record = await client.job(job)
    assert (record.state, record.attempt) == ("succeeded", 2)
    assert _weights(lines) == expected
    types = {line["type"] for line in lines}
    assert told == types & {"checkpoint.swept", "checkpoint.completed", "checkpoint.resumed", "checkpoint.rejected"}
    assert violations(lines) == []


async def test_a_trainer_that_is_killed_while_its_writer_writes_goes_on_from_that_checkpoint(
    failing_up: RunningUp,
) -> None:
    up, point = failing_up, "writer.data_written"
    async with up.client() as client:
        expected = await _undisturbed_beside(client, up)
        arm(up.root.parent, point, signal.SIGSTOP)
        job = (await client.submit({**WRITTEN_BESIDE, "model": "beside-killed"})).id
        await until(lambda: not (up.root.parent / point).exists())
        trainer, writer = _processes_of(up, job)
        os.kill(trainer, signal.SIGKILL)
        await until(lambda: processes.process_info(trainer) is None)
        os.kill(writer, signal.SIGCONT)
        lines = await _through(client, up, job)
    assert processes.process_info(writer) is None
    last = [line for line in lines if line["type"] == "checkpoint.written" and line["attempt"] == 1][-1]
    assert last["source"] == "writer"
    (resumed,) = [line for line in lines if line["type"] == "checkpoint.resumed"]
    assert (resumed["step"], resumed["data"]["checkpoint"]) == (last["step"], last["data"]["checkpoint"])
    assert _weights(lines) == expected
    assert {"attempt.leaked", "checkpoint.swept", "checkpoint.failed"}.isdisjoint(line["type"] for line in lines)
    assert violations(lines) == []


async def test_a_writer_that_was_stopped_past_the_lease_with_its_runner_commits_nothing(failing_up: RunningUp) -> None:
    up, point = failing_up, "writer.meta_drafted"
    async with up.client() as client:
        arm(up.root.parent, point, signal.SIGSTOP)
        job = (await client.submit({**WRITTEN_BESIDE, "model": "beside-fenced"})).id
        await until(lambda: not (up.root.parent / point).exists())
        _, writer = _processes_of(up, job)
        before = (await client.job(job)).checkpoint
        up.kill("runner", signal.SIGSTOP)
        await until_event(client, job, "job.requeued")
        up.kill("runner", signal.SIGCONT)
        lines = await _through(client, up, job)
    assert processes.process_info(writer) is None
    written = {line["step"] for line in lines if line["type"] == "checkpoint.written" and line["attempt"] == 1}
    assert written == ({before.step} if before is not None else set())
    assert [line["type"] for line in lines if line["type"] in ("attempt.fenced", "job.succeeded")] == [
        "attempt.fenced",
        "job.succeeded",
    ]
    assert "checkpoint.swept" in {line["type"] for line in lines}
    assert violations(lines) == []
