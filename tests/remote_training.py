"""A job of one host on data that lies on another one only, streamed through a cache that it does not fit into.

The hosts are simulated: each has a root and service processes of its own, on one real nats-server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from entrypoints.reading import BATCH, Digest
from host_processes import TRAINING, running_host
from railbus.client import Client
from railbus_runner.opening import open_dataset
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from until import until
from watching import watched

ROW_BYTES = 8192
_ROWS = 4096
_SEED = 7


@dataclass(frozen=True)
class Case:
    """What is streamed through what."""

    samples: int
    shard_bytes: int
    cache_bytes: int
    window: int
    """Shards that are shuffled together."""
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """What has come of it."""

    index: DatasetIndex
    peak_bytes: int
    """The most that lay in the cache at any time."""
    looks: int
    trained_s: float
    read: dict[str, Any]
    metas: list[dict[str, Any]]


def write(layout: Layout, case: Case) -> DatasetIndex:
    """Samples that tell their number, and bytes that cost little to make."""
    columns = {"id": Column(dtype="int64", shape=()), "x": Column(dtype="uint8", shape=(ROW_BYTES - 8,))}
    schema = DatasetSchema(name="far", columns=columns, splits={"train": Split(first=0, samples=case.samples)})
    return write_dataset(layout, schema, _chunks(case.samples), shard_bytes=case.shard_bytes)


def _chunks(samples: int) -> Iterator[dict[str, np.ndarray]]:
    block = np.random.default_rng(0).integers(0, 256, (_ROWS, ROW_BYTES - 8), dtype=np.uint8)
    for first in range(0, samples, _ROWS):
        ids = np.arange(first, min(first + _ROWS, samples))
        block[:, 0] = first // _ROWS % 251
        yield {"id": ids, "x": block[: len(ids)]}


def read_locally(layout: Layout, case: Case) -> dict[str, object]:
    """What a reader beside the data finds, in the order of the job's seed."""
    digest = Digest()
    stream = open_dataset(layout.dataset("far")).stream(
        "train", batch_size=BATCH, seed=_SEED, shuffle="window", window=case.window
    )
    for batch in stream:
        digest.take(batch)
    return digest.told()


async def train_far_away(common: CommonSettings, folder: Path, case: Case) -> Outcome:
    """Write the dataset on host `a`, train on it on host `b`."""
    index = write(Layout(folder / "a"), case)
    settings = {
        "lease_ttl_s": "10",
        "heartbeat_s": "0.5",
        "runner_entrypoint_dirs": json.dumps([str(Path(__file__).parent / "entrypoints")]),
        "dataloader_cache_bytes": str(case.cache_bytes),
        "device_manager_cpu_slots": "1",
    }
    async with (
        running_host(common, folder / "a", "a", ("dataloader",)),
        running_host(common, folder / "b", "b", TRAINING, settings=settings) as b,
        Client.connect(common) as client,
    ):
        await until(lambda: _is_known(client))
        with watched(b.layout.cache, every_s=0.002) as seen:
            began = time.monotonic()
            read = await _trained(client, case)
            trained_s = time.monotonic() - began
        metas = sorted(b.layout.checkpoints("far-away").glob("*.meta.json"))
        return Outcome(index, max(seen), len(seen), trained_s, read, [json.loads(one.read_bytes()) for one in metas])


async def _is_known(client: Client) -> bool:
    return [found.dataset for found in (await client.datasets()).datasets] == ["far"]


async def _trained(client: Client, case: Case) -> dict[str, Any]:
    """Submit the job, and wait for its success; what it told of what it has read."""
    spec = {
        "model": "far-away",
        "dataset": "far",
        "entrypoint": "reading:train",
        "seed": _SEED,
        "params": {"window": case.window},
        "devices": {"kind": "cpu"},
    }
    job = (await client.submit(spec)).id
    async with asyncio.timeout(case.timeout_s):
        events = [event async for event in client.follow(job)]
    assert events[-1]["type"] == "job.succeeded", events[-3:]
    (read,) = [event["data"] for event in events if event["type"] == "app.read"]
    return cast("dict[str, Any]", read)
