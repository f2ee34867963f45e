"""Trainers that misbehave and a NATS that falls silent, under `railbus up`.

Each job ends in time, in one state, for one reason, and leaves nothing; what cannot be reached has not failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from railbus.client import Client
from railbus_runner import processes
from railbus_shared.contracts.jobs import JobRecord
from running_up import RunningUp, finished, until_event
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(120)  # starts services that import torch

LIMITS = ("memory.max", "memory.limit_in_bytes")
FAULTY = Path(__file__).parents[1] / "entrypoints" / "faulty.py"
JOB: dict[str, Any] = {"model": "m", "dataset": "digits", "devices": {"kind": "cpu"}, "max_attempts": 1}


@pytest.fixture(scope="module")
def up(up: RunningUp) -> RunningUp:
    """With the trainers that misbehave."""
    shutil.copy(FAULTY, up.root.parent / "entrypoints" / "faulty.py")
    return up


async def _submit(client: Client, what: str, **fields: object) -> str:
    """Submit a job, once the runner has offered its entrypoint."""
    entrypoint = f"faulty:{what}"

    async def is_offered() -> bool:
        return any(entrypoint in runner.entrypoints for runner in (await client.devices()).runners)

    await until(is_offered)
    return (await client.submit({**JOB, "entrypoint": entrypoint, **fields})).id


def _of_type(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in events if event["type"] == kind]


async def _end_of(client: Client, job: str) -> tuple[JobRecord, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = await finished(client, job)
    return await client.job(job), events


async def test_a_trainer_that_ignores_sigterm_and_leaves_daemons_is_gone_when_its_grace_is_over(up: RunningUp) -> None:
    async with up.client() as client:
        job = await _submit(client, "stubborn", stop_grace_s=1.0)
        settled: dict[str, Any] = await until_event(client, job, "app.settled")
        pids, cwd = settled["data"]["pids"], Path(settled["data"]["cwd"])
        assert all(processes.process_info(pid) is not None for pid in pids)
        assert cwd.is_relative_to(up.layout.state.resolve())
        await client.cancel(job)
        record, events = await _end_of(client, job)
    assert (record.state, record.end_cause) == ("cancelled", "cancelled")
    assert [pid for pid in pids if processes.process_info(pid) is not None] == []
    assert not cwd.exists()
    assert [data["exit_code"] for data in _of_type(events, "job.cancelled")] == [-9]


async def test_a_job_that_waits_for_its_data_is_cancelled_without_its_grace(up: RunningUp) -> None:
    async with up.client() as client:
        first = await _submit(client, "heedless", stop_grace_s=0.0)
        await until_event(client, first, "train.metrics")
        job = await _submit(client, "quick", stop_grace_s=600.0)
        up.kill("dataloader", signal.SIGSTOP)
        try:
            await client.cancel(first)
            await until_event(client, job, "job.started")
            await client.cancel(job)
            record, events = await _end_of(client, job)
        finally:
            up.kill("dataloader", signal.SIGCONT)
    assert record.state == "cancelled"
    assert not _of_type(events, "app.worked")


async def test_a_trainer_that_takes_no_steps_is_reminded_by_sigterm_if_it_handles_that(up: RunningUp) -> None:
    async with up.client() as client:
        job = await _submit(client, "heedless", stop_grace_s=8.0)
        await until_event(client, job, "train.metrics")
        await client.cancel(job)
        record, events = await _end_of(client, job)
    assert record.state == "cancelled"
    assert len(_of_type(events, "app.reminded")) == 1
    assert [data["exit_code"] for data in _of_type(events, "job.cancelled")] == [0]


async def test_a_trainer_that_is_killed_alone_is_tried_again_at_once_from_its_checkpoint(up: RunningUp) -> None:
    paced = {"entrypoint": "paced:train", "params": {"epochs": 6, "pause_s": 0.03}, "checkpoint": {"every_steps": 10}}
    async with up.client() as client:
        job = (await client.submit({**JOB, **paced, "max_attempts": 2})).id
        await until_event(client, job, "job.checkpointed", count=2)
        state = json.loads((up.layout.state / "runner" / "attempts" / f"{job}.1.json").read_bytes())
        os.kill(state["pid"], signal.SIGKILL)
        record, events = await _end_of(client, job)
    assert (record.state, record.attempt, record.lease_epoch) == ("succeeded", 2, 2)
    assert [data["cause"] for data in _of_type(events, "job.requeued")] == ["signal"]
    assert len(_of_type(events, "checkpoint.resumed")) == 1


async def test_a_hang_is_told_with_the_stacks_and_ends_the_attempt_if_the_job_says_so(up: RunningUp) -> None:
    async with up.client() as client:
        job = await _submit(client, "hang", stall_s=8.0, on_stall="end")  # it begins in less
        record, events = await _end_of(client, job)
    (stalled,) = _of_type(events, "job.stalled")
    assert "_stuck_in_native_code" in stalled["stacks"]
    assert "thread" in stalled["stacks"]
    assert (record.state, record.end_cause) == ("failed", "hang")
    assert record.error is not None
    assert "_stuck_in_native_code" in str(record.error.details["stacks"])
    assert "stall_s" in record.error.message


async def test_a_flood_is_cut_and_counted_and_leaks_are_told(up: RunningUp) -> None:
    async with up.client() as client:
        job = await _submit(client, "messy")
        record, events = await _end_of(client, job)
    assert record.state == "succeeded"
    lines = [data["line"] for data in _of_type(events, "job.output")]
    dropped = _of_type(events, "job.output_dropped")
    assert lines[-1] == "the last line"
    assert len(lines) < 10_000
    assert len(lines) + sum(data["lines"] for data in dropped) >= 125_000
    assert sum(data["bytes"] for data in dropped) > 900_000_000
    (leaked,) = _of_type(events, "attempt.leaked")
    assert [
        ("time.sleep(600)" in one["command"], processes.process_info(one["pid"])) for one in leaked["processes"]
    ] == [(True, None)]
    assert _of_type(events, "attempt.workdir_removed") == [{"files": 1, "names": ["left.txt"]}]


@pytest.mark.root
async def test_a_trainer_that_fills_its_memory_is_told_so_by_the_kernels_own_count_and_not_tried_again(
    up: RunningUp,
) -> None:
    async with up.client() as client:
        job = await _submit(client, "hoard", max_attempts=3)
        await until_event(client, job, "train.metrics")
        state = json.loads((up.layout.state / "runner" / "attempts" / f"{job}.1.json").read_bytes())
        limits = [Path(group) / name for group in state["cgroups"] for name in LIMITS]
        if not (limits := [path for path in limits if path.exists()]):
            await client.cancel(job)
            pytest.skip("no control group here limits memory")
        limits[0].write_text(str(256 << 20))  # the slot has all of this host's, which a test had better not fill
        (up.layout.state / "runner" / "work" / f"{job}.1" / "go").touch()
        record, _ = await _end_of(client, job)
    assert (record.state, record.end_cause, record.attempt, record.exit_code) == ("failed", "host_oom", 1, -9)
    assert record.error is not None
    assert record.error.details["oom_kills"] == 1
    assert "min_memory_bytes" in record.error.hint


async def test_a_gpus_own_words_name_the_cause(up: RunningUp) -> None:
    async with up.client() as client:
        record, _ = await _end_of(client, await _submit(client, "broken"))
    assert (record.state, record.end_cause) == ("failed", "device_fault")
    assert record.error is not None
    assert "uncorrectable ECC" in record.error.message


async def test_a_working_directory_that_is_not_allowed_is_refused_with_the_setting(up: RunningUp) -> None:
    async with up.client() as client:
        record, _ = await _end_of(client, await _submit(client, "quick", workdir="/tmp"))
    assert (record.state, record.end_cause) == ("failed", "bad_input")
    assert record.error is not None
    assert record.error.details["field"] == "workdir"
    assert "RAILBUS_RUNNER_WORKDIRS" in record.error.hint


async def test_an_attempt_goes_on_after_nats_was_silent_for_less_and_for_more_than_a_lease(up: RunningUp) -> None:
    """Past its lease the trainer waits, which is no stall; its leases have lapsed then, and are taken up again."""
    paced = {"entrypoint": "paced:train", "params": {"epochs": 300, "pause_s": 0.03}}
    async with up.client() as client:
        job = (await client.submit({**JOB, **paced, "stall_s": 6.0, "on_stall": "end"})).id
        await until_event(client, job, "job.first_step")  # nats-py leaves a socket open where a server falls silent
    for silent_s in (2, 14):  # leases live for 6 s, after which the trainer waits for longer than it may stall
        up.kill("nats", signal.SIGSTOP)
        try:
            await asyncio.sleep(silent_s)
        finally:
            up.kill("nats", signal.SIGCONT)
        await asyncio.to_thread(up.wait_until, up.is_ready, timeout_s=PATIENCE_S, what="ready again")
    async with up.client() as client:
        awaited: dict[str, Any] = await until_event(client, job, "job.lease_awaited")
        await client.cancel(job)
        record, events = await _end_of(client, job)
    told = [event["type"] for event in events]
    assert (record.state, record.attempt, record.lease_epoch) == ("cancelled", 1, 1), record
    assert record.checkpoint is not None
    assert record.checkpoint.step >= awaited["step"]
    assert told.count("job.started") == 1
    assert not {"job.requeued", "job.stalled", "attempt.fenced"} & set(told)


async def test_an_attempt_keeps_its_leases_until_its_end_is_written_however_long_the_cause_is_looked_for(
    hasty_up: RunningUp,
) -> None:
    shutil.copy(FAULTY, hasty_up.root.parent / "entrypoints" / "faulty.py")
    endless = {"log_rules": [{"pattern": "(a+)+$", "cause": "signal"}]}  # given up after 5 s, longer than they live
    async with hasty_up.client() as client:
        job = await _submit(client, "trap", max_attempts=3, retry=endless)
        record, events = await _end_of(client, job)
    assert (record.state, record.end_cause, record.lease_epoch) == ("failed", "user_error", 1)
    assert _of_type(events, "job.requeued") == []
