"""A store is backed up while jobs run, lost, and put back: the jobs go on, and every event stands in the logs once."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from commands import railbus
from railbus.importing import import_dataset
from railbus_shared.errors import JobNotFound
from railbus_shared.layout import Layout
from running_up import RunningUp, finished, start_up, until_event

pytestmark = pytest.mark.timeout(240)  # starts services that import torch, twice

JOB = {
    "model": "m",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "devices": {"kind": "cpu"},
    "params": {"epochs": 1},
    "checkpoint": {"every_steps": 10},
}
LONG = {**JOB, "params": {"epochs": 12, "pause_s": 0.05}}


async def test_a_store_that_was_backed_up_while_jobs_ran_is_put_back_and_they_go_on(tmp_path: Path) -> None:
    root = tmp_path / "learning"
    import_dataset(Layout(root), "digits")
    up = _started(tmp_path)
    async with up.client() as client:
        await client.submit({**JOB, "id": "ended"})
        before = await finished(client, "ended")
        await client.submit({**LONG, "id": "runs"})
        await until_event(client, "runs", "job.checkpointed")
        await client.submit({**JOB, "id": "waits"})
        nameless = (await client.submit(JOB)).id
        done = railbus("--root", str(root), "backup", "monday", cwd=tmp_path)
        assert done.status == 0, done.err
        await client.submit({**JOB, "id": "lost"})
        await until_event(client, "runs", "job.checkpointed", count=2)
    while_it_runs = railbus("--root", str(root), "restore", "monday", cwd=tmp_path)
    assert (while_it_runs.status, "ALREADY_RUNNING" in while_it_runs.err) == (2, True)
    assert up.stop() == 0

    shutil.rmtree(Layout(root).state / "nats" / "store")
    done = railbus("--root", str(root), "restore", "monday", cwd=tmp_path)
    assert done.status == 0, done.err
    up = _started(tmp_path)
    async with up.client() as client:
        for job in ("runs", "waits", nameless):
            assert (await finished(client, job))[-1]["type"] == "job.succeeded", job
        record = await client.job("ended")
        assert (record.state, record.attempt) == ("succeeded", 1)
        with pytest.raises(JobNotFound):
            await client.job("lost")
        again = [event["id"] for event in await finished(client, "ended")]
        assert again == [event["id"] for event in before]
        assert {job.id for job in (await client.jobs()).jobs} == {"ended", "runs", "waits", nameless}
    assert up.stop() == 0
    lines = up.log_lines()
    times = Counter((line["producer"], line["number"]) for line in lines)
    assert {key: count for key, count in times.items() if count > 1} == {}
    assert {event["id"] for event in before} <= {line["id"] for line in lines}
    assert len({line["incarnation"] for line in lines}) == 2


def _started(folder: Path) -> RunningUp:
    up = start_up(folder, "--cpu-slots", "1")
    up.wait_until_ready()
    return up
