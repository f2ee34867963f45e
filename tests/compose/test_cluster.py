"""compose.yaml with compose.cluster.yaml: three NATS nodes, and the one that leads is lost, or cut off."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import nats
import nats.errors
import pytest
from nats.aio.client import Client

from compose_stack import SERVICES, Stack
from histories import violations
from running_up import PACED
from until import until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]  # images may have to be built

NODES = {"nats": "nats", "nats-2": "nats_2", "nats-3": "nats_3"}
"""Service and name of its port."""

OVERRIDE = """
services:
  runner:
    environment:
      RAILBUS_RUNNER_ENTRYPOINT_DIRS: '["/entrypoints"]'
    volumes: ["{entrypoints}:/entrypoints:ro"]
"""
JOB: dict[str, Any] = {
    "model": "m",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "devices": {"kind": "cpu"},
    "params": {"epochs": 8, "pause_s": 0.05},
    "checkpoint": {"every_steps": 10},
    "max_attempts": 1,
}
_SEEN = """
import asyncio, json, nats
async def main():
    seed = open("/run/secrets/railbus.nk").read().strip()
    urls = ["nats://nats:4222", "nats://nats-2:4222", "nats://nats-3:4222"]
    client = await nats.connect(urls, nkeys_seed_str=seed, inbox_prefix=b"_RINBOX.device_manager")
    info = await client.jetstream().stream_info("RAILBUS_JOBS")
    current = [replica.current for replica in info.cluster.replicas]
    print(json.dumps([info.cluster.leader, info.config.num_replicas, 1 + sum(map(bool, current))]))
    await client.close()
asyncio.run(main())
"""


class ClusterStack(Stack):
    """The stack on three nodes."""

    def command(self, *arguments: str) -> list[str]:
        files = ("compose.yaml", "compose.cluster.yaml", str(self.override))
        return ["docker", "compose", "-p", self.project, *(word for file in files for word in ("-f", file)), *arguments]

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        urls = [f"nats://127.0.0.1:{self.ports[name]}" for name in NODES.values()]
        client = await nats.connect(urls, nkeys_seed_str=self.seed(), error_cb=_ignore)
        try:
            yield client
        finally:
            await client.close()

    def jobs_stream(self) -> tuple[str | None, int, int]:
        """Leader, copies that are wanted, copies that are up to date; as a service sees them."""
        try:
            leader, wanted, current = json.loads(self.inside("device_manager", _SEEN))
        except pytest.fail.Exception:  # it elects a leader
            return None, 0, 0
        return leader, wanted, current

    def cut_off(self, node: str) -> Callable[[], None]:
        """Take a node out of its networks, without a word to anybody; gives what brings it back."""
        container = self.compose("ps", "--quiet", node)
        networks = list(self.inspect(node)["NetworkSettings"]["Networks"])
        for network in networks:
            self._engine("network", "disconnect", network, container)

        def heal() -> None:
            for network in networks:
                self._engine("network", "connect", "--alias", node, network, container)

        return heal

    def _engine(self, *words: str) -> None:
        done = self._run(["docker", *words], timeout_s=30)
        assert done.returncode == 0, done.stderr

    def lines(self) -> list[dict[str, Any]]:
        """What telemetry has on disk now, of days that are closed and of today."""
        files = [(name, data) for name, data in self.files("logs").items() if "/trainer.log." in name]
        logs = [gzip.decompress(data) if name.endswith(".gz") else data for name, data in files]
        return [json.loads(line) for log in logs for line in log.splitlines(keepends=True) if line.endswith(b"\n")]

    async def takes(self, job: dict[str, Any]) -> bool:
        """Whether a job could be submitted now; one that was already is the same job."""
        try:
            async with asyncio.timeout(4):  # what is asked of a node that is cut off is never answered
                await self.publish(job)
        except (nats.errors.Error, TimeoutError, OSError, KeyError):
            return False
        return True


async def _ignore(error: Exception) -> None:
    """A node is lost on purpose."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterStack]:
    """Built, up and healthy; removed afterwards. Skips where no Docker engine answers, which fails with CI set."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            subprocess.run(command, capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as exc:
            give_up = pytest.fail if os.environ.get("CI") else pytest.skip
            give_up(f"`{' '.join(command)}` does not answer: {exc}")
    folder = tmp_path_factory.mktemp("cluster")
    for above in (folder, *folder.parents[:2]):
        above.chmod(above.stat().st_mode | 0o055)  # the containers' users look for what is mounted below
    (folder / "deploy").mkdir()
    (folder / "entrypoints").mkdir()
    (folder / "entrypoints" / "paced.py").write_text(PACED)
    override = folder / "override.yaml"
    override.write_text(OVERRIDE.format(entrypoints=folder / "entrypoints"))
    tag = os.environ.get("RAILBUS_TAG", "test")
    stack = ClusterStack(f"railbus-cluster-{os.getpid()}", override, folder / "deploy", ports=_free_ports(), tag=tag)
    try:
        stack.compose("build", timeout_s=1800)
        begun_s = time.monotonic()
        stack.up()
        print(f"three nodes and all services healthy: {time.monotonic() - begun_s:.1f} s")
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "5")


def _free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as held:
        names = (*SERVICES, *NODES.values())
        sockets = {name: held.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        return {name: int(each.getsockname()[1]) for name, each in sockets.items()}


async def test_a_job_in_flight_succeeds_once_when_the_leader_of_the_cluster_is_lost(cluster: ClusterStack) -> None:
    cluster.compose("exec", "-T", "dataloader", "railbus", "dataset", "import", "digits")
    await cluster.publish({**JOB, "id": "inflight"})
    await cluster.has_checkpoint("inflight")
    leader, wanted, current = cluster.jobs_stream()
    assert (leader in NODES, wanted, current) == (True, 3, 3)

    cluster.compose("kill", str(leader))  # by the engine, so that it stays down
    lost_s = time.monotonic()
    await until(lambda: cluster.takes({**JOB, "id": "meanwhile"}), seconds=90)
    print(f"jobs are taken again after {time.monotonic() - lost_s:.1f} s")
    records = [await cluster.ended(job) for job in ("inflight", "meanwhile")]
    ends = [(record["state"], record["attempt"], record["lease_epoch"]) for record in records]
    assert ends == [("succeeded", 1, 1)] * 2
    assert cluster.jobs_stream()[0] in {*NODES} - {leader}

    cluster.compose("start", str(leader))
    await until(lambda: asyncio.to_thread(_is_whole, cluster), seconds=60)


def _is_whole(cluster: ClusterStack) -> bool:
    return cluster.jobs_stream()[1:] == (3, 3)


async def test_a_job_in_flight_succeeds_once_when_the_leader_of_the_cluster_is_cut_off(cluster: ClusterStack) -> None:
    """Nobody ends a connection: whoever was on that node finds out by silence."""
    await cluster.publish({**JOB, "id": "cut"})
    await cluster.has_checkpoint("cut")
    leader = str(cluster.jobs_stream()[0])
    heal = cluster.cut_off(leader)
    cut_s = time.monotonic()
    await until(lambda: cluster.takes({**JOB, "id": "over-the-cut"}), seconds=90)
    print(f"jobs are taken again after {time.monotonic() - cut_s:.1f} s")
    heal()  # while both jobs are in flight
    records = [await cluster.ended(job) for job in ("cut", "over-the-cut")]
    ends = [(record["state"], record["attempt"], record["lease_epoch"]) for record in records]
    assert ends == [("succeeded", 1, 1)] * 2
    await until(lambda: asyncio.to_thread(_is_whole, cluster), seconds=60)
    await until(lambda: asyncio.to_thread(_have_ends, cluster, {"cut", "over-the-cut"}), seconds=30)
    lines = cluster.lines()
    keys = [(line["producer"], line["number"]) for line in lines]
    assert (len(keys) - len(set(keys)), violations(lines)) == (0, [])
    ended = sorted(line["job"] for line in lines if line["type"] == "job.succeeded")
    assert ended == ["cut", "inflight", "meanwhile", "over-the-cut"]


def _have_ends(cluster: ClusterStack, jobs: set[str]) -> bool:
    """Whether the ends of these jobs are written down."""
    return jobs <= {line["job"] for line in cluster.lines() if line["type"] == "job.succeeded"}


def test_nodes_ask_each_other_for_a_password_and_nobody_else_can_see_it(cluster: ClusterStack) -> None:
    password = (cluster.deploy / "keys" / "route").read_text().strip()
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in (cluster.deploy / "keys" / "route", cluster.deploy / "cluster.conf")
    }
    assert modes == {"route": 0o600, "cluster.conf": 0o600}
    logs = cluster.compose("logs", "--no-color")
    assert password not in logs
    for node in NODES:
        published = cluster.inspect(node)["NetworkSettings"]["Ports"]
        assert {port for port, at in published.items() if at} == {"4222/tcp"}
