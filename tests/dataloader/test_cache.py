"""The cache on real files: what is fetched when, what leaves for it, and that its budget holds at every moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

import small_datasets
from fakes import FolderFinder, FolderSource
from railbus_dataloader import cache
from railbus_dataloader.loader import Limits, ShardLoader
from railbus_dataloader.measures import Measures
from railbus_dataloader.sources import WantedFile
from railbus_shared import files
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Sidecar, Split
from railbus_shared.contracts.requests import OpenedStream, OpenStream, StreamProgress
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.shard_paths import cache_key
from railbus_shared.data.verified import Fingerprint
from railbus_shared.data.writer import write_dataset
from railbus_shared.errors import (
    BusUnavailable,
    CacheTooSmall,
    DatasetNotFound,
    InvalidField,
    NotFound,
    ShardCorrupt,
    TransientError,
)
from railbus_shared.layout import Layout
from railbus_shared.metrics import Metrics
from until import until
from watching import bytes_below, watched

KIB = 1 << 10
SHARD_BYTES = 64 * KIB


class Host:
    """A loader whose datasets lie under another root, with what it has told."""

    def __init__(self, tmp_path: Path, *, cache_bytes: int, ttl_s: float = 30.0, ahead_bytes: int = 1 << 30) -> None:
        self.here = Layout(tmp_path / "here")
        self.there = Layout(tmp_path / "there")
        self.source = FolderSource(self.there)
        self.finder = FolderFinder([self.source])
        self.told: list[tuple[str, dict[str, object]]] = []
        self.metrics = Metrics("dataloader")
        self.loader = ShardLoader(
            self.here,
            host="here",
            state_dir=self.here.state / "dataloader",
            measures=Measures.of(self.metrics),
            tell=lambda what, data: self.told.append((what, data)),
            limits=Limits(session_ttl_s=ttl_s, cache_bytes=cache_bytes, ahead_bytes=ahead_bytes),
            finder=self.finder,
        )

    def write(self, num_shards: int, *, name: str = "d", shard_bytes: int = SHARD_BYTES) -> DatasetIndex:
        """A dataset elsewhere, whose shards have a little more than so many bytes."""
        values = np.arange(num_shards * shard_bytes // 8, dtype=np.int64).reshape(-1, 128)
        schema = DatasetSchema(
            name=name,
            columns={"x": Column(dtype="int64", shape=(128,))},
            splits={"train": Split(first=0, samples=len(values))},
        )
        index = write_dataset(self.there, schema, [{"x": values}], shard_bytes=shard_bytes)
        assert len(index.file.shards) == num_shards
        return index

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[ShardLoader]:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self.loader.run())
            try:
                yield self.loader
            finally:
                running.cancel()
        await self.loader.close()

    async def open(self, name: str = "d", job: str = "j-1") -> OpenedStream:
        return await self.loader.open(OpenStream(job=job, lease_epoch=1, dataset=name))

    async def tell(self, opened: OpenedStream, *, ahead: tuple[int, ...] = (), released: tuple[int, ...] = ()) -> None:
        told = StreamProgress(stream=opened.stream, dataset=opened.dataset, ahead=ahead, released=released)
        await self.loader.progress(told)

    async def read(self, opened: OpenedStream, number: int) -> None:
        """As a trainer's first read of a shard: verified, then whole at its path."""
        await self.loader.verify(opened.dataset, [number], stream=opened.stream)
        path = small_datasets.opened_paths(opened)[number]
        index = DatasetIndex.read(Path(opened.schema_path), Path(opened.index_path))
        assert files.sha256_file(path) == index.file.shards[number].sha256

    def cached(self, opened: OpenedStream) -> set[int]:
        return {number for number, path in small_datasets.opened_paths(opened).items() if path.exists()}

    def value(self, name: str) -> float:
        found = self.metrics.registry.get_sample_value(f"railbus_data_{name}")
        assert found is not None
        return found


def fitting(shards: int, *, spare: int = KIB) -> int:
    """Bytes of a cache into which so many shards fit."""
    return shards * (SHARD_BYTES + 2 * KIB) + spare


async def test_a_shard_that_lies_elsewhere_is_fetched_to_the_path_that_was_told(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(3))
    index = host.write(3)
    async with host.running():
        opened = await host.open()
        assert (opened.verified, opened.num_shards) == ((), 3)
        assert (opened.index_sha256, host.cached(opened)) == (index.sha256, set())
        assert opened.is_cached
        await host.read(opened, 2)
        assert host.cached(opened) == {2}
        assert (await host.open()).verified == ()  # so that it is asked for
        await host.read(opened, 2)
    (fetched,) = [data for what, data in host.told if what == "dataset.fetched"]
    assert (fetched["dataset"], fetched["file"]) == ("d", "shard-00002.data")
    assert (host.value("cache_hits_total"), host.value("cache_misses_total")) == (1, 1)
    assert host.value("cache_bytes") == index.file.shards[2].bytes == bytes_below(host.here.cache)


@pytest.mark.timeout(60)  # reads a dataset ten times as large as its cache, several trainers at once
async def test_a_dataset_streams_through_a_cache_that_it_does_not_fit_into_and_the_budget_holds(
    tmp_path: Path,
) -> None:
    budget = 1024 * KIB
    host = Host(tmp_path, cache_bytes=budget)
    index = host.write(40, shard_bytes=255 * KIB)
    assert budget // index.file.shards[0].bytes == 4

    async def train(job: str, order: list[int]) -> None:
        opened = await host.open(job=job)
        released: tuple[int, ...] = ()
        for place, number in enumerate(order):
            await host.tell(opened, ahead=tuple(order[place:]), released=released)
            await host.read(opened, number)
            released = (number,)
        host.loader.end_session(opened.stream)

    with watched(host.here.cache) as seen:
        async with host.running(), asyncio.TaskGroup() as tasks:
            tasks.create_task(train("j-1", list(range(40))))
            tasks.create_task(train("j-2", list(range(39, -1, -1))))
    assert len(seen) > 50
    assert 3 * index.file.shards[0].bytes < max(seen) <= budget
    assert host.value("cache_evictions_total") >= 36
    assert host.value("cache_budget_bytes") == budget


async def test_look_ahead_fetches_in_the_trainers_order_and_a_reader_finds_its_shard(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(3))
    host.write(5)
    async with host.running():
        opened = await host.open()
        await host.tell(opened, ahead=(3, 1, 4, 0, 2))
        await until(lambda: host.cached(opened) == {3, 1, 4})
        assert host.source.asked == [f"shard-0000{number}.data" for number in (3, 1, 4)]
        await host.read(opened, 3)
        assert host.value("cache_hits_total") == 1
        await host.tell(opened, ahead=(1, 4, 0, 2), released=(3,))
        await until(lambda: host.cached(opened) == {1, 4, 0})


async def test_look_ahead_goes_no_farther_than_its_share(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(5), ahead_bytes=fitting(2))
    host.write(5)
    async with host.running():
        opened = await host.open()
        await host.tell(opened, ahead=(0, 1, 2, 3, 4))
        await until(lambda: host.cached(opened) == {0, 1})
        await until(lambda: host.value("ahead_bytes_total") > SHARD_BYTES * 2)
        await host.tell(opened, ahead=(1, 2, 3, 4))
        await until(lambda: host.cached(opened) == {0, 1, 2})


async def test_what_a_trainer_does_not_want_after_all_is_given_up(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(3))
    host.write(4)
    host.source.may_go.clear()
    async with host.running():
        opened = await host.open()
        await host.tell(opened, ahead=(0,))
        await until(lambda: host.source.running == 1)
        await host.tell(opened, ahead=(3,))
        await until(lambda: host.source.asked == ["shard-00000.data", "shard-00003.data"])
        host.source.may_go.set()
        await until(lambda: host.cached(opened) == {3})
        assert bytes_below(host.here.cache) == small_datasets.opened_paths(opened)[3].stat().st_size


@pytest.mark.parametrize("end", ["closed", "silent"])
async def test_with_its_session_ends_what_was_being_fetched_for_it(tmp_path: Path, end: str) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2), ttl_s=1 if end == "silent" else 30)
    host.write(2)
    host.source.may_go.clear()
    async with host.running():
        opened = await host.open()
        await host.tell(opened, ahead=(0, 1))
        await until(lambda: bool(host.source.asked))
        if end == "closed":
            assert (host.source.running, host.value("sessions")) == (1, 1)
            host.loader.end_session(opened.stream)
        await until(lambda: host.source.running == 0)
        await until(lambda: bytes_below(host.here.cache) == 0)
        assert host.value("sessions") == 0


async def test_many_trainers_share_one_fetch(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(2)
    async with host.running():
        streams = [await host.open(job=f"j-{number}") for number in range(10)]
        async with asyncio.TaskGroup() as tasks:
            for opened in streams:
                tasks.create_task(host.read(opened, 0))
    assert host.source.asked == ["shard-00000.data"]


async def test_one_who_gives_up_takes_nothing_from_the_others_and_the_last_one_ends_the_fetch(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(2)
    host.source.may_go.clear()
    async with host.running():
        first, second = await host.open(), await host.open()
        async with asyncio.TaskGroup() as tasks:
            readers = [tasks.create_task(host.read(opened, 0)) for opened in (first, second)]
            await until(lambda: host.source.running == 1)
            readers[0].cancel()
            await asyncio.sleep(0.05)
            assert host.source.running == 1
            readers[1].cancel()
            await until(lambda: host.source.running == 0)
            host.source.may_go.set()
            tasks.create_task(host.read(second, 0))
    assert host.source.asked == ["shard-00000.data"] * 2


async def test_what_a_trainer_holds_stays_and_another_waits_until_it_is_released(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(4)
    async with host.running():
        first, second = await host.open(), await host.open()
        await host.read(first, 0)
        await host.read(first, 1)
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(host.read(second, 2))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            assert host.cached(first) == {0, 1}
            await host.tell(first, released=(0,))
        assert host.cached(first) == {1, 2}
    evicted = [data for what, data in host.told if what == "dataset.evicted"]
    assert [small_datasets.opened_paths(first)[0].parent.name] == [data["key"] for data in evicted]


async def test_a_reader_whose_stream_fell_silent_is_told_to_ask_again_and_holds_nothing_up(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2), ttl_s=1)
    host.write(3)
    async with host.running():
        first, second = await host.open(), await host.open()
        await host.read(second, 0)
        await host.read(first, 1)

        async def wait_in_silence() -> None:
            with pytest.raises(TransientError, match="silent for too long"):
                await host.loader.verify("d", [2], stream=second.stream)

        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(wait_in_silence())
            while not waiting.done():
                await host.tell(first)
                await asyncio.sleep(0.02)
        assert host.cached(first) == {0, 1}
        await host.read(second, 2)
        assert host.cached(first) == {1, 2}


async def test_a_cache_that_is_too_small_is_told_with_the_sizes_and_the_remedy(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=SHARD_BYTES // 2)
    index = host.write(2)
    async with host.running():
        opened = await host.open()
        with pytest.raises(CacheTooSmall) as caught:
            await host.read(opened, 0)
    assert caught.value.details["needed_bytes"] == index.file.shards[0].bytes
    assert caught.value.details["budget_bytes"] == SHARD_BYTES // 2
    assert "RAILBUS_DATALOADER_CACHE_BYTES" in caught.value.hint


async def test_a_trainer_that_holds_all_the_room_is_told_so_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(3)
    async with host.running():
        opened = await host.open()
        with pytest.raises(CacheTooSmall, match="held by the same trainer"):
            await host.loader.verify("d", stream=opened.stream)
        await host.tell(opened, released=(0,))
        await host.read(opened, 2)


async def test_all_of_a_dataset_can_be_verified_by_somebody_who_holds_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(5)
    async with host.running():
        assert (await host.loader.verify("d")).shards == (0, 1, 2, 3, 4)


async def test_the_next_source_goes_on_where_one_was_cut_off(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(1)
    host.source.cut = BusUnavailable("cut off")
    host.finder.sources.append(FolderSource(host.there))
    async with host.running():
        await host.read(await host.open(), 0)
    assert [source.asked for source in host.finder.sources] == [["shard-00000.data"]] * 2


async def test_a_source_that_lies_is_passed_over_and_nothing_of_it_stays(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(2)
    host.source.is_lying = True
    async with host.running():
        opened = await host.open()
        with pytest.raises(ShardCorrupt):
            await host.read(opened, 0)
        assert bytes_below(host.here.cache) == 0
        host.finder.sources.append(FolderSource(host.there))
        await host.read(await host.open(), 1)


async def test_without_a_source_that_answers_the_error_says_that_it_may_help_to_try_again(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(1)
    host.source.cut = BusUnavailable("cut off")
    async with host.running():
        opened = await host.open()
        with pytest.raises(TransientError, match="cut off"):
            await host.read(opened, 0)
        assert bytes_below(host.here.cache) == 0
        await host.read(opened, 0)


async def test_a_cached_shard_that_was_damaged_is_fetched_again(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(1)
    async with host.running():
        opened = await host.open()
        await host.read(opened, 0)
        small_datasets.flip(small_datasets.opened_paths(opened)[0])
        await host.read(opened, 0)
    assert len(host.source.asked) == 2


async def test_a_shard_is_hashed_as_it_comes_and_not_again_until_it_changes(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(1)
    async with host.running():
        opened = await host.open()
        await host.read(opened, 0)
        assert host.value("shards_verified_total") == 0
        os.utime(small_datasets.opened_paths(opened)[0])
        await host.read(opened, 0)
        assert host.value("shards_verified_total") == 1
    assert len(host.source.asked) == 1


async def test_a_shard_that_a_source_changes_after_it_has_vouched_for_it_is_hashed(tmp_path: Path) -> None:
    class Careless(FolderSource):
        async def fetch(self, wanted: WantedFile, into: Path) -> Fingerprint:
            was = await super().fetch(wanted, into)
            await asyncio.sleep(0.05)  # the clock of the file system ticks
            if len(self.asked) == 1:
                small_datasets.flip(into)
            return was

    host = Host(tmp_path, cache_bytes=fitting(2))
    host.finder.sources[:] = [source := Careless(host.there)]
    host.write(1)
    async with host.running():
        await host.read(await host.open(), 0)
    assert len(source.asked) == 2


async def test_after_a_restart_what_lay_there_is_used_and_litter_is_removed(tmp_path: Path) -> None:
    before = Host(tmp_path, cache_bytes=fitting(3))
    before.write(3)
    async with before.running():
        opened = await before.open()
        await before.read(opened, 0)
        await before.read(opened, 1)
    bundle = small_datasets.opened_paths(opened)[0].parents[1]
    for litter in (".0123.tmp", ".0123.gone"):
        (bundle / litter).mkdir()
        (bundle / litter / "half").write_bytes(b"half")
    after = Host(tmp_path, cache_bytes=fitting(3))
    async with after.running():
        await after.read(await after.open(), 1)
        assert not list(bundle.glob(".*"))
    assert after.source.asked == []


async def test_a_shard_whose_files_cannot_be_removed_counts_until_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_AGAIN_S", 0.2)
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(3)
    async with host.running():
        opened = await host.open()
        await host.read(opened, 0)
        await host.tell(opened, released=(0,))
        folder = small_datasets.opened_paths(opened)[0].parent
        folder.rename(tmp_path / "aside")
        folder.symlink_to(tmp_path / "aside")  # which is renamed, and not removed
        await host.read(opened, 1)
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(host.read(opened, 2))
            await until(lambda: any("problem" in data for _, data in host.told))
            assert not waiting.done()
            assert host.value("cache_bytes") == sum(host.loader._located[opened.stream].sizes[:2])
            (leaving,) = folder.parent.glob(".*.gone")
            leaving.unlink()
        await host.tell(opened, released=(1,))
        await host.read(opened, 0)
        assert host.cached(opened) == {0, 2}


@pytest.mark.parametrize("ends", ["read", "evicted"])
async def test_a_cached_shard_that_somebody_has_deleted_is_fetched_again(tmp_path: Path, ends: str) -> None:
    host = Host(tmp_path, cache_bytes=fitting(1))
    host.write(2)
    async with host.running():
        opened = await host.open()
        await host.read(opened, 0)
        await host.tell(opened, released=(0,))
        shutil.rmtree(small_datasets.opened_paths(opened)[0].parent)
        if ends == "evicted":
            await host.read(opened, 1)
            await host.tell(opened, released=(1,))
        await host.read(opened, 0)
        assert host.cached(opened) == {0}
    assert not [data for _, data in host.told if "problem" in data]


async def test_after_a_restart_a_trainer_that_goes_on_keeps_what_it_holds(tmp_path: Path) -> None:
    before = Host(tmp_path, cache_bytes=fitting(2))
    before.write(3)
    async with before.running():
        opened = await before.open()
        await before.read(opened, 0)
        await before.read(opened, 1)
    after = Host(tmp_path, cache_bytes=fitting(2), ttl_s=1)
    async with after.running():
        other = await after.open(job="j-2")
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(after.read(other, 2))
            while not waiting.done():  # as its runner does, long before the session would expire
                held = StreamProgress(stream=opened.stream, dataset="d", held=(1,))
                await after.loader.progress(held)
                await after.tell(other)
                await asyncio.sleep(0.05)
        assert after.cached(opened) == {1, 2}
        await after.loader.verify("d", [1], stream=opened.stream)


async def test_a_budget_that_was_lowered_is_kept_to_from_the_start(tmp_path: Path) -> None:
    before = Host(tmp_path, cache_bytes=fitting(3))
    before.write(3)
    async with before.running():
        opened = await before.open()
        for number in (2, 0, 1):
            await before.read(opened, number)
            await asyncio.sleep(0.02)  # the clock of the file system ticks
    after = Host(tmp_path, cache_bytes=fitting(2))
    async with after.running():
        await until(lambda: after.cached(opened) == {0, 1})
        await after.read(await after.open(), 0)


async def test_a_word_of_an_unknown_stream_is_heeded_if_it_names_its_dataset(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(3))
    host.write(3)
    async with host.running():
        await host.loader.progress(StreamProgress(stream="s-old", ahead=(1,)))
        assert host.value("sessions") == 0
        await host.loader.progress(StreamProgress(stream="s-old", dataset="d", ahead=(1,)))
        await until(lambda: host.source.asked == ["shard-00001.data"])
        with pytest.raises(InvalidField, match="reads dataset 'd'"):
            await host.loader.verify("e", stream="s-old")
        with pytest.raises(NotFound, match="has value 3"):
            await host.loader.verify("d", [3], stream="s-old")


async def test_datasets_that_nobody_has_are_told_apart_from_those_under_the_root(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(1))
    small_datasets.write(host.here, 10, name="here")
    host.write(1, name="d")
    assert (await host.loader.describe("here")).hosts == ("here",)
    assert (await host.loader.describe("d")).hosts == ("there",)
    assert [found.dataset for found in await host.loader.list_all()] == ["here"]
    with pytest.raises(DatasetNotFound):
        await host.loader.describe("nowhere")
    await host.loader.close()


async def test_a_sidecar_is_fetched_verified_and_removed_with_its_shard_and_lies_beside_it(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(1))
    values, lengths = np.zeros(2 * SHARD_BYTES, np.uint8), np.full(32, SHARD_BYTES // 16)
    schema = DatasetSchema(
        name="d",
        payload="raw",
        columns={"x": Column(dtype="uint8", shape=(), variable_length=True)},
        splits={"train": Split(first=0, samples=32)},
    )
    rows = Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))
    index = write_dataset(host.there, schema, [{"x": rows}], shard_bytes=SHARD_BYTES)
    (sidecar, _) = [shard.sidecar for shard in index.file.shards]
    assert sidecar is not None
    async with host.running():
        opened = await host.open()
        await host.read(opened, 0)
        beside = small_datasets.opened_paths(opened)[0].with_name(sidecar.file)
        assert files.sha256_file(beside) == sidecar.sha256
        small_datasets.flip(beside)
        await host.read(opened, 0)
        assert files.sha256_file(beside) == sidecar.sha256
        await host.tell(opened, released=(0,))
        await host.read(opened, 1)
        assert not beside.exists()


def test_versions_share_a_shard_that_is_the_same_in_all(tmp_path: Path) -> None:
    shard = Host(tmp_path, cache_bytes=1).write(2).file.shards[0]
    sidecar = Sidecar(file="shard-00000.offsets", bytes=8, sha256="0" * 64)
    same = shard.changed(first_sample=7)
    others = [shard.changed(file="other"), shard.changed(sha256="1" * 64), shard.changed(sidecar=sidecar)]
    assert cache_key(same) == cache_key(shard)
    assert len({cache_key(one) for one in (shard, *others)}) == 4


async def test_a_shard_that_comes_once_its_session_has_expired_must_be_asked_for_again(tmp_path: Path) -> None:
    """Its trainer waits for it through an outage in which its runner can say nothing, and is to find it held."""
    host = Host(tmp_path, cache_bytes=fitting(1), ttl_s=1)
    host.write(2)
    host.source.may_go.clear()
    async with host.running() as loader:
        opened = await host.open()
        verifying = asyncio.create_task(loader.verify("d", [0], stream=opened.stream))
        await until(lambda: host.source.running == 1)
        await until(lambda: host.value("sessions") == 0)
        host.source.may_go.set()
        with pytest.raises(TransientError, match="was closed"):
            await verifying
        await host.read(opened, 0)
        assert host.value("sessions") == 1
    assert host.source.asked == ["shard-00000.data"]


async def test_a_stream_that_is_closed_while_its_shards_come_stays_closed(tmp_path: Path) -> None:
    host = Host(tmp_path, cache_bytes=fitting(2))
    host.write(2)
    host.source.may_go.clear()
    async with host.running() as loader:
        opened = await host.open()
        verifying = asyncio.create_task(loader.verify("d", [0, 1], stream=opened.stream))
        await until(lambda: host.source.running == 1)
        loader.end_session(opened.stream)
        host.source.may_go.set()
        with pytest.raises(TransientError, match="was closed"):
            await verifying
        assert host.value("sessions") == 0
