"""The loader on real files: datasets validated, shards hashed once per host and ahead of readers, damage told."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import json
import logging
import mmap
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

import small_datasets
from railbus_dataloader.loader import ShardLoader, ranges_of
from railbus_dataloader.measures import Measures
from railbus_dataloader.verification import Verification, Wanted
from railbus_shared import files, wire
from railbus_shared.contracts.requests import MAX_VERIFIED_RANGES, OpenedStream, OpenStream
from railbus_shared.data.verified import Fingerprint
from railbus_shared.errors import (
    DatasetNotFound,
    IndexInvalid,
    InvalidName,
    NotFound,
    RailbusError,
    SchemaInvalid,
    ShardCorrupt,
)
from railbus_shared.layout import Layout
from railbus_shared.metrics import Metrics
from until import PATIENCE_S


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def new_loader(layout: Layout) -> ShardLoader:
    return ShardLoader(
        layout,
        host="h1",
        state_dir=layout.state / "dataloader",
        measures=Measures.of(Metrics("dataloader")),
        tell=lambda *_: None,
    )


@pytest.fixture
async def loader(layout: Layout) -> AsyncIterator[ShardLoader]:
    made = new_loader(layout)
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def running(loader: ShardLoader) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        ahead = tasks.create_task(loader.run())
        yield
        ahead.cancel()


def asked(name: str = "d") -> OpenStream:
    return OpenStream(job="j-1", lease_epoch=1, dataset=name)


async def verified(loader: ShardLoader, name: str = "d") -> list[bool]:
    return small_datasets.verified(await loader.open(asked(name)))


async def until_verified(loader: ShardLoader, expected: list[bool]) -> None:
    while True:
        if await verified(loader) == expected:
            return
        await asyncio.sleep(0.01)


def shard(layout: Layout, number: int, name: str = "d") -> Path:
    return layout.shards(name) / f"shard-{number:05d}.data"


# --- what there is ---------------------------------------------------------------------------------------------------


async def test_a_dataset_is_described(layout: Layout, loader: ShardLoader) -> None:
    index = small_datasets.write(layout, 30, num_shards=3, test=5)
    found = await loader.describe("d")
    assert (found.dataset, found.samples, found.bytes, found.num_shards) == ("d", 30, index.file.bytes, 3)
    assert {name: split.samples for name, split in found.splits.items()} == {"train": 25, "test": 5}
    assert (set(found.columns), found.index_sha256, found.hosts) == ({"x", "id", "flag"}, index.sha256, ("h1",))


async def test_what_holds_together_is_listed_and_what_does_not_is_logged(
    layout: Layout, loader: ShardLoader, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b", "a", "broken", "cut"):
        small_datasets.write(layout, 10, name=name)
    layout.index("broken").write_bytes(b"{")
    shard(layout, 0, "cut").write_bytes(b"short")
    (layout.datasets / "half").mkdir()
    (layout.datasets / "Not A Name").mkdir()
    (layout.datasets / "Not A Name" / "index.json").write_bytes(b"{}")
    with caplog.at_level(logging.WARNING):
        assert [found.dataset for found in await loader.list_all()] == ["a", "b"]
    assert {getattr(record, "dataset", "a folder") for record in caplog.records} == {"broken", "cut", "a folder"}


async def test_without_a_tree_there_are_no_datasets(loader: ShardLoader) -> None:
    assert await loader.list_all() == []


async def test_a_dataset_that_was_imported_later_is_seen(layout: Layout, loader: ShardLoader) -> None:
    with pytest.raises(DatasetNotFound, match="'d'"):
        await loader.describe("d")
    small_datasets.write(layout, 10)
    assert (await loader.describe("d")).samples == 10


def rename(layout: Layout) -> None:
    layout.dataset("d").rename(layout.dataset("e"))
    layout.dataset("d").symlink_to(layout.dataset("e"))
    text = layout.schema("d").read_text().replace('"name": "d"', '"name": "e"')
    layout.schema("d").write_text(text)
    index = json.loads(layout.index("d").read_bytes())
    index |= {"dataset": "e", "schema_sha256": files.sha256_file(layout.schema("d"))}
    layout.index("d").write_text(json.dumps(index))


def folder_for_index(layout: Layout) -> None:
    layout.index("d").unlink()
    layout.index("d").mkdir()


FAULTS: list[tuple[str, Callable[[Layout], object], type[RailbusError], str]] = [
    ("no index", lambda layout: layout.index("d").unlink(), DatasetNotFound, "'d'"),
    ("no schema", lambda layout: layout.schema("d").unlink(), SchemaInvalid, "schema.json is missing"),
    ("cut index", lambda layout: layout.index("d").write_bytes(b'{"form'), IndexInvalid, "not valid JSON"),
    ("a folder for the index", folder_for_index, IndexInvalid, "Is a directory"),
    ("other schema", lambda layout: layout.schema("d").write_bytes(b"{}"), SchemaInvalid, "'name'"),
    ("under another name", rename, SchemaInvalid, "has value 'e', but its folder is called 'd'"),
    ("no shard", lambda layout: shard(layout, 1).unlink(), IndexInvalid, "shard-00001.data"),
    ("cut shard", lambda layout: shard(layout, 1).write_bytes(b"x"), ShardCorrupt, "found 1 bytes"),
]


@pytest.mark.parametrize(("edit", "error", "said"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
async def test_a_fault_that_shows_without_reading_shards_is_told_whatever_is_asked(
    edit: Callable[[Layout], object], error: type[RailbusError], said: str, layout: Layout, loader: ShardLoader
) -> None:
    small_datasets.write(layout, 30, num_shards=3)
    await loader.describe("d")
    edit(layout)
    for ask in (loader.describe("d"), loader.open(asked()), loader.verify("d")):
        with pytest.raises(error) as caught:
            await ask
        assert said in caught.value.message


@pytest.mark.parametrize("name", ["../d", "", "A", "d/../d", "d\n"])
async def test_a_name_that_is_none_never_becomes_a_path(name: str, loader: ShardLoader) -> None:
    with pytest.raises(InvalidName):
        await loader.describe(name)


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_a_stream_tells_where_everything_lies(layout: Layout, loader: ShardLoader) -> None:
    index = small_datasets.write(layout, 30, num_shards=3)
    opened = await loader.open(asked())
    assert (opened.schema_path, opened.index_path) == (str(layout.schema("d")), str(layout.index("d")))
    assert opened.index_sha256 == index.sha256
    assert (opened.num_shards, opened.is_cached, opened.shards_path) == (3, False, str(layout.shards("d")))
    assert dict(small_datasets.opened_paths(opened)) == {number: shard(layout, number) for number in range(3)}
    assert (await loader.open(asked())).stream != opened.stream


async def test_what_is_verified_is_told_in_ranges(layout: Layout, loader: ShardLoader) -> None:
    small_datasets.write(layout, 30, num_shards=5)
    await loader.verify("d", [0, 1, 3])
    opened = await loader.open(asked())
    assert [(one.first, one.shards) for one in opened.verified] == [(0, 2), (3, 1)]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], []),
        ([4], [(4, 1)]),
        ([0, 1, 2], [(0, 3)]),
        ([0, 2, 3, 4, 7], [(0, 1), (2, 3)]),
        (range(0, 20_000, 2), [(0, 1), (2, 1)]),
    ],
)
def test_rising_numbers_become_ranges_and_no_more_of_them_than_fit(
    numbers: Sequence[int], expected: list[tuple[int, int]]
) -> None:
    assert [(one.first, one.shards) for one in ranges_of(numbers, limit=2)] == expected


def test_the_longest_answer_fits_into_a_message() -> None:
    far = range(2**62, 2**62 + 40_000, 2)
    opened = OpenedStream(
        stream="s" * 64, dataset="d" * 128, schema_path="/x" * 2048, index_path="/x" * 2048, index_sha256="0" * 64,
        num_shards=2**62, shards_path="/x" * 2048, verified=ranges_of(far),
    )  # fmt: skip
    assert len(opened.verified) == MAX_VERIFIED_RANGES
    assert OpenedStream.parse(wire.decode(wire.encode(opened.to_map()))) == opened


async def test_opening_works_though_nobody_runs_ahead(layout: Layout, loader: ShardLoader) -> None:
    small_datasets.write(layout, 30, num_shards=3)
    for _ in range(100):
        assert await verified(loader) == [False, False, False]


async def test_shards_are_verified_ahead_of_their_readers(layout: Layout, loader: ShardLoader) -> None:
    small_datasets.write(layout, 200, num_shards=80)
    async with running(loader):
        await until_verified(loader, [True] * 80)


async def test_damage_that_is_met_ahead_is_logged_and_stops_nothing(
    layout: Layout, loader: ShardLoader, caplog: pytest.LogCaptureFixture
) -> None:
    small_datasets.write(layout, 30, num_shards=3)
    small_datasets.flip(shard(layout, 1))
    async with running(loader):
        await until_verified(loader, [True, False, True])
    assert str(shard(layout, 1)) in {getattr(record, "path", "") for record in caplog.records}
    with pytest.raises(ShardCorrupt):
        await loader.verify("d", [1])


def resident_frac(path: Path) -> float:
    """The share of a file's pages that lie in the page cache."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory,
    ):
        pages = -(-len(memory) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        begin = ctypes.c_char.from_buffer(memory)
        done = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(begin), ctypes.c_size_t(len(memory)), found)
        del begin
        assert done == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in found) / pages


async def test_a_shard_that_is_known_is_brought_into_the_page_cache_again(layout: Layout, loader: ShardLoader) -> None:
    small_datasets.write(layout, 100_000)
    await loader.verify("d")
    with shard(layout, 0).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_frac(shard(layout, 0)) > 0.5:
        pytest.skip("this file system keeps its pages")
    async with running(loader):
        await loader.open(asked())
        while True:
            if resident_frac(shard(layout, 0)) == 1:
                return
            await asyncio.sleep(0.01)


# --- verification ----------------------------------------------------------------------------------------------------


async def test_shards_are_verified_when_asked_for(layout: Layout, loader: ShardLoader) -> None:
    index = small_datasets.write(layout, 30, num_shards=3)
    found = await loader.verify("d", [2, 0])
    assert (found.shards, found.bytes) == ((2, 0), index.file.shards[2].bytes + index.file.shards[0].bytes)
    assert await verified(loader) == [True, False, True]
    assert (await loader.verify("d")).shards == (0, 1, 2)
    assert await verified(loader) == [True, True, True]


@pytest.mark.parametrize("number", [-1, 3, 2**40])
async def test_a_shard_that_does_not_exist_is_not_verified(number: int, layout: Layout, loader: ShardLoader) -> None:
    small_datasets.write(layout, 30, num_shards=3)
    with pytest.raises(NotFound, match=f"has value {number}: dataset 'd' has shards 0 to 2"):
        await loader.verify("d", [0, number])


async def test_damage_is_told_with_path_expected_and_actual_hash(layout: Layout, loader: ShardLoader) -> None:
    index = small_datasets.write(layout, 30, num_shards=3)
    path = shard(layout, 1)
    small_datasets.flip(path, at=-100)
    with pytest.raises(ShardCorrupt) as caught:
        await loader.verify("d")
    expected = {"path": str(path), "expected": index.file.shards[1].sha256, "actual": files.sha256_file(path)}
    assert caught.value.details == expected
    small_datasets.write(layout, 30, num_shards=3)
    assert (await loader.verify("d")).shards == (0, 1, 2)


async def test_what_was_verified_is_remembered_after_a_restart(layout: Layout, loader: ShardLoader) -> None:
    small_datasets.write(layout, 30, num_shards=3)
    await loader.verify("d", [0, 1])
    again = new_loader(layout)
    assert await verified(again) == [True, True, False]
    await again.close()


class Counted:
    """A hash function that counts, and that can be held up."""

    def __init__(self) -> None:
        self.calls = 0
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, path: Path) -> str:
        self.calls += 1
        assert self.may_go.wait(PATIENCE_S)
        return files.sha256_file(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(b"shard" * 1000)
    return path


def wanted(path: Path) -> Wanted:
    return Wanted(path, files.sha256_file(path), path.stat().st_size)


async def test_many_who_ask_at_once_share_one_hashing(file: Path, tmp_path: Path) -> None:
    counted = Counted()
    verification = Verification(tmp_path / "verified.json", hash_file=counted)
    counted.may_go.clear()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(50):
            tasks.create_task(verification.verify(wanted(file)))
        await asyncio.sleep(0.05)
        counted.may_go.set()
    assert counted.calls == 1
    await verification.verify(wanted(file))
    assert counted.calls == 1
    await verification.verify(wanted(file), again=True)
    assert counted.calls == 2
    await verification.close()


async def test_damage_is_told_to_all_who_asked(file: Path, tmp_path: Path) -> None:
    verification = Verification(tmp_path / "verified.json")
    asked_for = wanted(file)
    small_datasets.flip(file)
    told = await asyncio.gather(*[verification.verify(asked_for) for _ in range(10)], return_exceptions=True)
    assert [type(one) for one in told] == [ShardCorrupt] * 10
    await verification.close()


async def test_one_who_gives_up_takes_nothing_from_the_others(file: Path, tmp_path: Path) -> None:
    counted = Counted()
    verification = Verification(tmp_path / "verified.json", hash_file=counted)
    counted.may_go.clear()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(verification.verify(wanted(file)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await verification.verify(wanted(file))
        counted.may_go.set()
    assert counted.calls == 1
    await verification.close()


async def test_damage_that_nobody_waits_for_any_more_is_logged_and_raises_nowhere(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted()
    verification = Verification(tmp_path / "verified.json", hash_file=counted)
    asked_for = wanted(file)
    small_datasets.flip(file)
    counted.may_go.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await verification.verify(asked_for)
    counted.may_go.set()
    await verification.close()
    await asyncio.sleep(0)
    gc.collect()
    assert [record.message for record in caplog.records] == ["shard is damaged"]


async def test_closing_waits_for_the_hashing_under_way(file: Path, tmp_path: Path) -> None:
    counted = Counted()
    verification = Verification(tmp_path / "verified.json", hash_file=counted)
    counted.may_go.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await verification.verify(wanted(file))
    async with asyncio.TaskGroup() as tasks:
        closing = tasks.create_task(verification.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        counted.may_go.set()
    assert str(file) in json.loads((tmp_path / "verified.json").read_bytes())


def replaced(file: Path) -> None:
    file.unlink()
    file.write_bytes(b"SHARD" * 1000)


def replaced_with_the_same_times(file: Path) -> None:
    status = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"SHARD" * 1000)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("flipped", small_datasets.flip),
    ("cut", lambda file: os.truncate(file, 10)),
    ("replaced", replaced),
    ("replaced with the same times", replaced_with_the_same_times),
]


@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
async def test_a_file_that_changes_is_no_longer_verified(
    change: Callable[[Path], object], file: Path, tmp_path: Path
) -> None:
    verification = Verification(tmp_path / "verified.json")
    asked_for = wanted(file)
    await verification.verify(asked_for)
    change(file)
    assert not verification.is_verified(asked_for)
    with pytest.raises(ShardCorrupt):
        await verification.verify(asked_for)
    await verification.close()


async def test_a_change_right_after_the_hashing_does_not_hide_in_a_tick_of_the_clock(
    file: Path, tmp_path: Path
) -> None:
    def hash_then_change(path: Path) -> str:
        found = files.sha256_file(path)
        with path.open("r+b") as opened:
            opened.write(b"\xff")
        return found

    verification = Verification(tmp_path / "verified.json", hash_file=hash_then_change)
    for round_number in range(30):
        asked_for = Wanted(file, hashlib.sha256(content := bytes([round_number]) * 5000).hexdigest(), 5000)
        file.write_bytes(content)
        await verification.verify(asked_for)
        assert not verification.is_verified(asked_for)
    await verification.close()


async def test_a_change_right_after_somebody_has_vouched_does_not_hide_in_a_tick_of_the_clock(
    file: Path, tmp_path: Path
) -> None:
    verification = Verification(tmp_path / "verified.json")
    for round_number in range(30):
        file.write_bytes(content := bytes([round_number]) * 5000)
        asked_for = Wanted(file, hashlib.sha256(content).hexdigest(), 5000)
        verification.vouched(asked_for, Fingerprint.of(file))
        assert verification.is_verified(asked_for)
        with file.open("r+b") as opened:
            opened.write(b"\xff")
        assert not verification.is_verified(asked_for)
    await verification.close()


async def test_a_file_that_is_not_what_was_vouched_for_is_hashed(file: Path, tmp_path: Path) -> None:
    verification = Verification(tmp_path / "verified.json")
    asked_for = wanted(file)
    was = Fingerprint.of(file)
    os.utime(file)
    verification.vouched(asked_for, was)
    assert not verification.is_verified(asked_for)
    file.unlink()
    verification.vouched(asked_for, was)
    assert not verification.is_verified(asked_for)
    await verification.close()


async def test_another_hash_for_the_same_file_is_not_taken_for_verified(file: Path, tmp_path: Path) -> None:
    verification = Verification(tmp_path / "verified.json")
    await verification.verify(wanted(file))
    with pytest.raises(ShardCorrupt):
        await verification.verify(Wanted(file, "0" * 64, file.stat().st_size))
    await verification.close()


async def test_a_file_that_is_missing_is_told(file: Path, tmp_path: Path) -> None:
    verification = Verification(tmp_path / "verified.json")
    asked_for = wanted(file)
    file.unlink()
    with pytest.raises(IndexInvalid, match="No such file"):
        await verification.verify(asked_for)
    await verification.close()


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"3", b'{"a": 1}', b'{"a": [1, 2, 3]}', b'{"a": ["x", "y", "z", 0]}', b"\xff" * 99]
)
async def test_a_damaged_memory_is_forgotten_and_made_anew(garbage: bytes, file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "verified.json"
    memory.write_bytes(garbage)
    verification = Verification(memory)
    assert not verification.is_verified(wanted(file))
    await verification.verify(wanted(file))
    assert Verification(memory).is_verified(wanted(file))
    await verification.close()


async def test_a_memory_that_cannot_be_written_fails_no_verification(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_bytes(b"a file where a folder should be")
    verification = Verification(tmp_path / "state" / "verified.json")
    await verification.verify(wanted(file))
    assert verification.is_verified(wanted(file))
    assert "verified shards not remembered" in {record.message for record in caplog.records}
    await verification.close()
