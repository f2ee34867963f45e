"""A dataset that is not here: found on other hosts or at an origin, and its index kept by its hash."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import small_datasets
from railbus_dataloader.fetching import FetchLimits, NatsSource
from railbus_dataloader.objectstore import ObjectStoreSource
from railbus_dataloader.remote import RemoteDatasets
from railbus_dataloader.sources import WantedFile
from railbus_shared import clock, files
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.requests import DatasetSummary, SplitSummary
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import DatasetNotFound, IndexInvalid, InvalidName, NoSource, TransientError
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from remote_hosts import bulk, serving_host
from servers import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Without JetStream: nothing here is stored."""
    folder = tmp_path / "nats"
    folder.mkdir()
    running = Server(folder, jetstream=False)
    running.start()
    yield running
    running.stop()


class Told:
    """What the hosts have told of datasets."""

    def __init__(self) -> None:
        self.summaries: dict[str, DatasetSummary] = {}

    def add(self, index: DatasetIndex, *hosts: str) -> None:
        self.summaries[index.schema.name] = DatasetSummary(
            dataset=index.schema.name,
            format="columns",
            samples=index.file.samples,
            bytes=index.file.bytes,
            num_shards=len(index.file.shards),
            splits={"train": SplitSummary(samples=index.file.samples)},
            columns=("x",),
            index_sha256=index.sha256,
            hosts=hosts,
            described_at=clock.now(),
        )

    async def summary(self, dataset: str) -> DatasetSummary | None:
        return self.summaries.get(dataset)

    async def hosts(self, wanted: WantedFile) -> Sequence[str]:
        found = self.summaries.get(wanted.dataset)
        return found.hosts if found is not None else ()


def finder(told: Told, bus: Bus, folder: Path, *origins: str) -> RemoteDatasets:
    peers = NatsSource(bus, told.hosts, host="here", limits=FetchLimits(pause_s=0.02))
    return RemoteDatasets(
        folder, told.summary, host="here", peers=peers, origins=[ObjectStoreSource(url) for url in origins]
    )


async def test_a_dataset_of_another_host_is_found_and_its_shards_can_be_had(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    told, kept = Told(), tmp_path / "indexes"
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        index = small_datasets.write(host.layout, 30, num_shards=3)
        told.add(index, "a")
        found = await finder(told, bus, kept).find("d")
        assert (found.index, found.hosts) == (index, ("a",))
        assert (found.index_path, found.schema_path) == (
            kept / index.sha256 / "index.json",
            kept / index.sha256 / "schema.json",
        )
        assert DatasetIndex.read(found.schema_path, found.index_path).sha256 == index.sha256
        shard = index.file.shards[1]
        want = WantedFile("d", index.sha256, shard.file, shard.sha256, shard.bytes)
        await found.sources[0].fetch(want, tmp_path / "got")
        assert files.sha256_file(tmp_path / "got") == shard.sha256
        assert sorted(path.name for path in kept.iterdir()) == [index.sha256]


async def test_an_index_is_asked_for_once_and_again_if_it_was_lost_or_damaged(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    told, kept = Told(), tmp_path / "indexes"
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        told.add(small_datasets.write(host.layout, 30), "a")
        looking = finder(told, bus, kept)
        found = await looking.find("d")
        for _ in range(2):
            assert await looking.find("d") == found
        assert len(host.requests) == 2
        await finder(told, bus, kept).find("d")
        assert len(host.requests) == 2
        found.index_path.unlink()
        await looking.find("d")
        small_datasets.flip(found.index_path)
        assert (await finder(told, bus, kept).find("d")).index.sha256 == found.index.sha256
        assert len(host.requests) == 6


async def test_a_new_version_on_another_host_is_found_and_the_old_one_stays(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    told, kept = Told(), tmp_path / "indexes"
    async with (
        serving_host(common, tmp_path, "a") as old,
        serving_host(common, tmp_path, "b") as new,
        bulk(common) as bus,
    ):
        looking = finder(told, bus, kept)
        told.add(small_datasets.write(old.layout, 30), "a")
        first = await looking.find("d")
        told.add(small_datasets.write(new.layout, 40), "b")
        second = await looking.find("d")
    assert (first.index.file.samples, second.index.file.samples) == (30, 40)
    assert first.index_path.exists()


async def test_what_no_host_has_comes_from_an_origin(server: Server, common: CommonSettings, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "x")
    index = small_datasets.write(layout, 30)
    async with bulk(common) as bus:
        looking = finder(Told(), bus, tmp_path / "indexes", f"file://{tmp_path}/nothing", f"file://{layout.datasets}")
        found = await looking.find("d")
        assert (found.index, found.hosts) == (index, ())
        shard = index.file.shards[0]
        want = WantedFile("d", index.sha256, shard.file, shard.sha256, shard.bytes)
        with pytest.raises(TransientError):
            await found.sources[0].fetch(want, tmp_path / "got")
        await found.sources[2].fetch(want, tmp_path / "got")
        assert files.sha256_file(tmp_path / "got") == shard.sha256


async def test_a_host_that_is_gone_gives_way_to_an_origin(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    layout, told = Layout(tmp_path / "x"), Told()
    told.add(small_datasets.write(layout, 30), "gone")
    async with bulk(common) as bus:
        with pytest.raises(NoSource):
            await finder(told, bus, tmp_path / "indexes").find("d")
        found = await finder(told, bus, tmp_path / "indexes", f"file://{layout.datasets}").find("d")
        assert found.index.file.samples == 30


async def test_what_nobody_has_does_not_exist(server: Server, common: CommonSettings, tmp_path: Path) -> None:
    layout, told = Layout(tmp_path / "x"), Told()
    told.add(small_datasets.write(layout, 30), "here")  # what was told is over: it does not lie here any more
    (tmp_path / "empty").mkdir()
    async with bulk(common) as bus:
        looking = finder(told, bus, tmp_path / "indexes", f"file://{tmp_path}/empty")
        for name in ("d", "e"):
            with pytest.raises(DatasetNotFound, match=name):
                await looking.find(name)
        with pytest.raises(InvalidName):
            await looking.find("../d")


async def test_an_index_at_an_origin_that_does_not_hold_together_is_told(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "x")
    small_datasets.write(layout, 30)
    layout.index("d").write_bytes(b'{"format_version": 1}')
    async with bulk(common) as bus:
        with pytest.raises(IndexInvalid):
            await finder(Told(), bus, tmp_path / "indexes", f"file://{layout.datasets}").find("d")
    assert not list((tmp_path / "indexes").glob("*/index.json"))


async def test_litter_and_versions_that_nobody_asks_for_are_removed_at_the_start(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    layout, kept = Layout(tmp_path / "x"), tmp_path / "indexes"
    index = small_datasets.write(layout, 30)
    async with bulk(common) as bus:
        looking = finder(Told(), bus, kept, f"file://{layout.datasets}")
        await looking.tidy()
        await looking.find("d")
        (kept / ".half.tmp").write_bytes(b"x")
        (kept / "old").mkdir()
        os.utime(kept / "old", (0, 0))
        await looking.tidy()
    assert [path.name for path in kept.iterdir()] == [index.sha256]
