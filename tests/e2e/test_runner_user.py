"""A runner that root starts and that becomes another user: its key is out of reach of training code, and all works."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from commands import railbus_here
from host_processes import Host, running_host
from railbus.client import Client
from railbus_shared.layout import Layout
from running_up import PACED
from thief import CODE, can_import, has_stolen, launcher, params
from until import until
from users_for_tests import Cluster, running_cluster

pytestmark = [
    pytest.mark.root,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(400),  # starts services one after the other, the runner with torch each time, and trains
]

UID = 23_456
BESIDE = ("telemetry", "dataloader", "device_manager")


@dataclass
class Site:
    """NATS with the keys of all, which are root's, and a tree that is another user's."""

    cluster: Cluster
    layout: Layout
    code: Path
    start: tuple[str, ...]
    """Words before a command of that user's."""

    def seed(self, service: str = "runner") -> str:
        return self.cluster.keys[service].seed_path.read_text().strip()

    @contextlib.asynccontextmanager
    async def service(self, name: str, **settings: str) -> AsyncIterator[Host]:
        """As root starts it."""
        launcher = (*self.start, sys.executable, "-P", "-s", "-m")
        own = {"nats_key_file": str(self.cluster.keys[name].seed_path), "lease_ttl_s": "5", "heartbeat_s": "0.3"}
        common = self.cluster.settings(name)
        async with running_host(
            common, self.layout.root, "here", (name,), launcher=launcher, settings={**own, **settings}
        ) as host:
            yield host

    def runner(self, user: str = str(UID), **settings: str) -> contextlib.AbstractAsyncContextManager[Host]:
        return self.service(
            "runner", runner_user=f"{user}:{user}", runner_entrypoint_dirs=json.dumps([str(self.code)]), **settings
        )

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client.connect(self.cluster.settings("user")) as client:
            yield client


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """In a folder that every user may enter, which those of pytest are not."""
    start = launcher(Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2])
    if os.geteuid() != 0 or not can_import(start, UID):
        pytest.skip("another user cannot run Python here")
    folder = Path(tempfile.mkdtemp(prefix="railbus-test-"))
    folder.chmod(0o755)
    try:
        code = folder / "code"
        code.mkdir()
        (code / "thief.py").write_text(CODE)
        (code / "paced.py").write_text(PACED)
        layout = Layout(folder / "learning")
        done = railbus_here("--root", str(layout.root), "dataset", "import", "digits", cwd=folder)
        assert done.status == 0, done.err
        for made in (layout.models, layout.state / "run"):
            made.mkdir(parents=True)
        for path in (layout.root, *layout.root.rglob("*")):
            os.chown(path, UID, UID)
        with running_cluster(folder) as cluster:
            yield Site(cluster, layout, code, start)
    finally:
        shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def others(site: Site) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for name in BESIDE:
            await stack.enter_async_context(site.service(name))
        yield


def _job(name: str, entrypoint: str, **spec: Any) -> dict[str, Any]:
    fixed = {"dataset": "digits", "devices": {"kind": "cpu"}, "checkpoint": {"every_steps": 10}}
    return {"id": name, "model": name, "entrypoint": entrypoint, **fixed, **spec}


async def test_training_code_finds_no_way_to_the_key_and_its_job_succeeds(site: Site, others: None) -> None:
    loot = site.layout.root / "loot.json"
    what = params(site.cluster.keys["runner"].seed_path, site.seed(), loot)
    async with site.runner(), site.client() as client:
        job = await client.submit(_job("thief", "thief:steal", params=what))
        record = await job.wait()
    assert record.state == "succeeded", record
    found = json.loads(loot.read_text())
    assert found["uids"] == [str(UID)] * 4
    assert has_stolen(found, site.seed()) == {}
    assert loot.stat().st_uid == UID


async def _has_saved(client: Client, job: str) -> bool:
    record = await client.job(job)
    assert record.state in {"queued", "placed", "running"}, record
    return record.state == "running" and record.checkpoint is not None


async def test_it_comes_back_to_nats_with_the_key_in_memory_and_its_jobs_go_on_after_a_kill(
    site: Site, others: None
) -> None:
    paced = {"epochs": 8, "pause_s": 0.05}
    async with site.runner() as host:
        async with site.client() as client:
            await client.submit(_job("paced", "paced:train", params=paced))
            await until(lambda: _has_saved(client, "paced"))
        site.cluster.server.stop()
        site.cluster.server.start()
        async with site.client() as client:
            record = (await client.wait(["paced"]))[0]
            assert (record.state, record.attempt) == ("succeeded", 1), record
            await client.submit(_job("killed", "paced:train", params=paced))
            await until(lambda: _has_saved(client, "killed"))
        host.processes["runner"].send_signal(signal.SIGKILL)
        await host.processes["runner"].wait()
    async with site.runner(), site.client() as client:
        record = (await client.wait(["killed"]))[0]
    assert (record.state, record.attempt) == ("succeeded", 2), record
    assert record.checkpoint is not None
    owners = {path.stat().st_uid for path in site.layout.models.rglob("*")}
    assert owners == {UID}
