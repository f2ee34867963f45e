"""Two hosts with roots of their own on one NATS: what lies on one is trained on at the other."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import small_datasets
from dataloader_processes import Dataloader, dataloader
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.requests import OpenedStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import open_shard
from railbus_shared.errors import DatasetNotFound, RailbusError, ShardCorrupt
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from until import until

pytestmark = pytest.mark.timeout(90)  # starts processes of the service


async def _opened(host: Dataloader) -> OpenedStream:
    return OpenedStream.parse(await host.ask("open", {"job": "j-1", "lease_epoch": 1, "dataset": "d"}))


async def _verify(host: Dataloader, opened: OpenedStream, *shards: int) -> None:
    await host.ask("verify", {"dataset": "d", "stream": opened.stream, "shards": list(shards)})


def _ids(opened: OpenedStream, number: int) -> list[int]:
    """The column `id` of a shard, as a trainer reads it."""
    index = DatasetIndex.read(Path(opened.schema_path), Path(opened.index_path))
    samples = index.file.shards[number].samples
    out = np.empty(samples, np.int64)
    shard = open_shard(small_datasets.opened_paths(opened)[number], index, number)
    shard.take("id", np.arange(samples, dtype=np.int64), out)
    return [int(one) for one in out]


async def _told_by(bus: Bus, *hosts: str) -> None:
    """Waits until the bucket of datasets names these hosts for `d`."""
    bucket = Bucket(bus, bus.subjects.datasets)

    async def is_told() -> bool:
        entry = await bucket.get("d")
        return entry is not None and entry.value is not None and entry.value["hosts"] == list(hosts)

    await until(is_told)


async def test_a_stream_of_a_dataset_that_lies_on_another_host_only(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    async with dataloader(common, bus, tmp_path / "a", "a") as a, dataloader(common, bus, tmp_path / "b", "b") as b:
        with pytest.raises(DatasetNotFound):
            await b.ask("open", {"job": "j-1", "lease_epoch": 1, "dataset": "d"})
        index = small_datasets.write(a.layout, 3000, num_shards=3)
        await _told_by(bus, "a")
        opened = await _opened(b)
        assert opened.index_sha256 == index.sha256
        assert opened.is_cached
        assert opened.shards_path == str(b.layout.cache.absolute())
        await _verify(b, opened, 0, 1, 2)
        ids = [one for number in range(3) for one in _ids(opened, number)]
        assert ids == list(range(3000))
        assert "CRITICAL" not in b.log.read_text()


async def test_a_shard_that_is_damaged_on_the_other_host_is_never_read(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    async with dataloader(common, bus, tmp_path / "a", "a") as a, dataloader(common, bus, tmp_path / "b", "b") as b:
        small_datasets.write(a.layout, 3000, num_shards=2)
        small_datasets.flip(a.layout.shards("d") / "shard-00001.data")
        await _told_by(bus, "a")
        opened = await _opened(b)
        await _verify(b, opened, 0)
        with pytest.raises(ShardCorrupt, match="host a"):
            await _verify(b, opened, 1)
        assert not os.path.lexists(small_datasets.opened_paths(opened)[1])


async def test_an_origin_stands_in_for_hosts(bus: Bus, common: CommonSettings, tmp_path: Path) -> None:
    origin = Layout(tmp_path / "origin")
    small_datasets.write(origin, 3000, num_shards=3)
    origins = f'["file://{origin.datasets}"]'
    async with dataloader(common, bus, tmp_path / "b", "b", origins=origins) as b:
        opened = await _opened(b)
        await _verify(b, opened, 2)
        assert _ids(opened, 2) == list(range(2000, 3000))


async def test_a_host_that_is_killed_while_it_sends_is_waited_for(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    async with dataloader(common, bus, tmp_path / "b", "b", stall_s="1") as b:
        async with dataloader(common, bus, tmp_path / "a", "a") as a:
            small_datasets.write(a.layout, 3000, num_shards=3)
            await _told_by(bus, "a")
            opened = await _opened(b)
            await _verify(b, opened, 0)
            a.process.kill()
            await a.process.wait()
        with pytest.raises(RailbusError) as told:
            await _verify(b, opened, 1)
        assert told.value.status == 503
        async with dataloader(common, bus, tmp_path / "a", "a"):
            await _verify(b, opened, 1, 2)
            assert _ids(opened, 1) == list(range(1000, 2000))
