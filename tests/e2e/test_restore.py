"""A store of NATS that is lost is refused, put back from a backup, accepted, and used on: with real services."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commands import railbus
from railbus.importing import import_dataset
from railbus_shared.errors import JobNotFound
from railbus_shared.layout import Layout
from running_up import RunningUp, finished, start_up

pytestmark = pytest.mark.timeout(240)  # starts services three times

JOB = {
    "model": "m",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "devices": {"kind": "cpu"},
    "params": {"epochs": 1},
}


async def test_a_store_that_was_lost_is_put_back_and_what_came_after_the_backup_is_no_more(tmp_path: Path) -> None:
    root = tmp_path / "learning"
    import_dataset(Layout(root), "digits")
    store, backup = Layout(root).state / "nats" / "store", tmp_path / "backup"

    up = _started(tmp_path)
    kept = await _trained(up, "kept")
    assert up.stop() == 0
    shutil.copytree(store, backup)
    up = _started(tmp_path)
    lost = await _trained(up)
    assert up.stop() == 0

    shutil.rmtree(store)
    refused = start_up(tmp_path)
    assert refused.process.wait(60) == 2
    assert "STORE_MISSING" in refused.logs()
    shutil.rmtree(store)  # the server has made an empty one
    shutil.copytree(backup, store)
    done = railbus("--root", str(root), "restore", cwd=tmp_path)
    assert done.status == 0, done.err

    up = _started(tmp_path)
    async with up.client() as client:
        assert (await client.job(kept)).state == "succeeded"
        with pytest.raises(JobNotFound):
            await client.job(lost)
    again = await _trained(up)
    assert lost.split("-")[1] != again.split("-")[1]  # of another incarnation: no id is given twice
    assert up.stop() == 0


def _started(folder: Path) -> RunningUp:
    up = start_up(folder)
    up.wait_until_ready()
    return up


async def _trained(up: RunningUp, job: str | None = None) -> str:
    async with up.client() as client:
        submitted = (await client.submit({**JOB, **({"id": job} if job else {})})).id
        assert (await finished(client, submitted))[-1]["type"] == "job.succeeded"
    return submitted
