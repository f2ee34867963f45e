"""A whole set of services on three NATS nodes, while those that lead are killed, paused and restarted.

Trainers do not notice, jobs that are submitted meanwhile run, each job succeeds in its first attempt, and every event
is written down once.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from host_processes import TRAINING, Host, running_host
from nats_cluster import Cluster, running_cluster
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.errors import TransientError
from railbus_shared.layout import Layout
from running_up import PACED, finished, log_lines, until_event
from until import until

pytestmark = pytest.mark.timeout(300)  # starts services that import torch, and waits for several elections

JOB: dict[str, Any] = {
    "model": "m",
    "dataset": "digits",
    "entrypoint": "paced:train",
    "devices": {"kind": "cpu"},
    "params": {"epochs": 4, "pause_s": 0.05},
    "checkpoint": {"every_steps": 10},
    "max_attempts": 1,
}


@dataclass
class Stack:
    """The nodes, and one host whose services join all of them."""

    nodes: Cluster
    host: Host

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client.connect(self.nodes.settings(self.host.layout.root)) as client:
            yield client


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    root = tmp_path / "learning"
    import_dataset(Layout(root), "digits")
    entrypoints = tmp_path / "entrypoints"
    entrypoints.mkdir()
    (entrypoints / "paced.py").write_text(PACED)
    settings = {
        "replicas": "3",
        "heartbeat_s": "0.5",
        "lease_ttl_s": "30",  # two elections long, as the documentation says
        "device_manager_cpu_slots": "1",
        "runner_entrypoint_dirs": json.dumps([str(entrypoints)]),
    }
    with running_cluster(tmp_path) as nodes:
        services = ("telemetry", *TRAINING)
        async with running_host(nodes.settings(root), root, "one", services, settings=settings) as host:
            yield Stack(nodes, host)


async def test_jobs_in_flight_succeed_once_whichever_node_is_lost(stack: Stack) -> None:
    async with stack.client() as client:
        await _the_leader_of_jobs_is_killed(stack, client)
        await _every_node_is_restarted(stack, client)
        await _the_leader_of_leases_is_paused(stack, client)
        await until(lambda: _all_are_listed_as_ended(client))  # the list follows the records
        jobs = {job.id: job for job in (await client.jobs()).jobs}
        await until(lambda: _every_event_is_written_once(stack, list(jobs)))
    ends = {name: (job.state, job.attempt, job.lease_epoch) for name, job in jobs.items()}
    assert ends == dict.fromkeys(("killed", "meanwhile", "rolling", "paused"), ("succeeded", 1, 1))


async def _the_leader_of_jobs_is_killed(stack: Stack, client: Client) -> None:
    await _submitted(client, "killed")
    await until_event(client, "killed", "job.checkpointed")
    leader = await stack.nodes.leader("RAILBUS_JOBS")
    leader.kill()
    await _submitted(client, "meanwhile")
    await finished(client, "killed")
    await finished(client, "meanwhile")
    leader.start()
    await until(lambda: stack.nodes.is_whole("RAILBUS_JOBS"))


async def _every_node_is_restarted(stack: Stack, client: Client) -> None:
    await _submitted(client, "rolling")
    await until_event(client, "rolling", "job.checkpointed")
    for node in stack.nodes.nodes:
        node.kill(signal.SIGTERM)
        node.start()
        await until(lambda: stack.nodes.is_whole("RAILBUS_JOBS"))
    await finished(client, "rolling")


async def _the_leader_of_leases_is_paused(stack: Stack, client: Client) -> None:
    await _submitted(client, "paused")
    await until_event(client, "paused", "job.checkpointed")
    leader = await stack.nodes.leader("KV_railbus_leases")
    leader.pause()
    try:
        await finished(client, "paused")
    finally:
        leader.resume()


async def _submitted(client: Client, job: str) -> None:
    """A job with an id is asked for again until it is taken, as `submit_all` does."""

    async def is_taken() -> bool:
        try:
            await client.submit({**JOB, "id": job})
        except TransientError:
            return False
        return True

    await until(is_taken)


async def _all_are_listed_as_ended(client: Client) -> bool:
    return all(job.is_final for job in (await client.jobs()).jobs)


def _every_event_is_written_once(stack: Stack, jobs: list[str]) -> bool:
    """Each producer numbers what it tells: no number of those that are written down is missing or there twice."""
    numbers: dict[str, list[int]] = defaultdict(list)
    lines = log_lines(stack.host.layout)
    for line in lines:
        numbers[line["producer"]].append(line["number"])
    assert all(len(told) == len(set(told)) for told in numbers.values())
    ended = {line["job"] for line in lines if line["type"] == "job.succeeded"}
    return ended == set(jobs) and all(max(told) - min(told) + 1 == len(told) for told in numbers.values())
