"""A dataset in a script or a notebook, without NATS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import payloads
import railbus
import small_datasets
from railbus_runner.opening import Dataset, open_dataset
from railbus_runner.packed import Packed
from railbus_runner.vouching import user_memory
from railbus_shared import files
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import DatasetNotFound, InvalidField, NotFound, NotSupported, ShardCorrupt
from railbus_shared.layout import Layout


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    small_datasets.write(layout, 30, num_shards=4, test=7)
    return layout


@pytest.fixture
def dataset(layout: Layout) -> Dataset:
    return open_dataset(layout.dataset("d"))


def shard(layout: Layout, number: int) -> Path:
    return layout.shards("d") / DatasetIndex.load(layout.dataset("d")).file.shards[number].file


def test_it_tells_what_it_is(dataset: Dataset) -> None:
    assert len(dataset) == 30
    assert set(dataset.schema.columns) == {"x", "id", "flag"}
    assert {name: split.samples for name, split in dataset.splits.items()} == {"train": 23, "test": 7}
    assert "d version 1: 30 samples" in repr(dataset)
    assert railbus.open_dataset is open_dataset


@pytest.mark.parametrize("number", [0, 7, 29, -1, -30])
def test_a_sample_is_a_tensor_of_each_column(number: int, dataset: Dataset) -> None:
    sample = dataset[number]
    held = small_datasets.arrays(30)
    assert sample["id"].item() == number % 30
    assert torch.equal(sample["x"], torch.from_numpy(held["x"][number]))


@pytest.mark.parametrize("number", [30, -31])
def test_a_sample_that_is_not_there_is_an_index_error(number: int, dataset: Dataset) -> None:
    with pytest.raises(IndexError, match=f"sample {number} of 30"):
        dataset[number]


def test_a_sample_of_variable_length_is_its_items(tmp_path: Path) -> None:
    payloads.write(tmp_path / "r", "raw")
    dataset = open_dataset(tmp_path / "r")
    assert [len(sample["words"]) for sample in dataset] == [0 if n % 4 == 0 else n * 7 % 300 for n in range(17)]
    (batch,) = dataset.stream("all", batch_size=17, shuffle=False)
    assert isinstance(batch["words"], Packed)


def test_with_a_split_it_is_that_one_alone(layout: Layout) -> None:
    test = open_dataset(layout.dataset("d"), split="test")
    assert [sample["id"].item() for sample in test] == list(range(23, 30))
    assert [batch["id"].tolist() for batch in test.stream(batch_size=4, shuffle=False)] == [
        [23, 24, 25, 26],
        [27, 28, 29],
    ]
    assert len(list(test.stream("train", batch_size=23))) == 1


def test_a_stream_needs_a_split(dataset: Dataset) -> None:
    with pytest.raises(InvalidField, match="it has test, train"):
        dataset.stream(batch_size=4)


def test_a_file_url_is_a_folder(layout: Layout) -> None:
    assert len(open_dataset(layout.dataset("d").as_uri())) == 30


@pytest.mark.parametrize("url", ["ftp://bucket/d", "https://host/d", "file://host/d"])
def test_another_url_is_refused_with_a_way_out(url: str) -> None:
    with pytest.raises(NotSupported, match="copy the dataset"):
        open_dataset(url)


def test_what_is_not_there_is_said_so(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(NotFound, match="it has test, train"):
        open_dataset(layout.dataset("d"), split="valid")
    with pytest.raises(NotFound, match="version"):
        open_dataset(layout.dataset("d"), version=2)


def test_a_damaged_shard_is_refused_before_its_first_sample(layout: Layout, dataset: Dataset) -> None:
    small_datasets.flip(shard(layout, 1))
    assert dataset[0]["id"].item() == 0
    with pytest.raises(ShardCorrupt, match=r"shard-00001\.data"):
        dataset[8]
    with pytest.raises(ShardCorrupt):
        list(dataset.stream("train", batch_size=4))


def test_a_missing_shard_is_a_corrupt_one(layout: Layout, dataset: Dataset) -> None:
    shard(layout, 0).unlink()
    with pytest.raises(ShardCorrupt, match=r"shard-00000\.data"):
        dataset[0]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    seen: list[str] = []
    real = files.sha256_file

    def sha256_file(path: Path) -> str:
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(files, "sha256_file", sha256_file)
    return seen


def test_a_shard_is_hashed_once_and_again_when_it_has_changed(layout: Layout, hashed: list[str]) -> None:
    for _ in range(2):
        list(open_dataset(layout.dataset("d")).stream("train", batch_size=4))
    assert sorted(hashed) == [f"shard-0000{number}.data" for number in range(4)]
    path = shard(layout, 2)
    path.write_bytes(path.read_bytes())
    list(open_dataset(layout.dataset("d")).stream("train", batch_size=4))
    assert hashed[4:] == ["shard-00002.data"]
    assert user_memory().is_file()


def test_verifying_hashes_what_is_remembered_too(layout: Layout, dataset: Dataset, hashed: list[str]) -> None:
    dataset.verify()
    dataset.verify()
    assert len(hashed) == 8
    path = shard(layout, 3)
    before = path.stat()
    small_datasets.flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ShardCorrupt, match=r"shard-00003\.data"):
        dataset.verify()


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_hashing(layout: Layout, cache: Path) -> None:
    cache.write_text("no folder")
    assert open_dataset(layout.dataset("d"))[0]["id"].item() == 0


def test_a_damaged_sidecar_is_refused(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "r", "raw")
    sidecar = index.file.shards[0].sidecar
    assert sidecar is not None
    small_datasets.flip(tmp_path / "r" / "shards" / sidecar.file)
    with pytest.raises(ShardCorrupt, match=r"\.offsets"):
        open_dataset(tmp_path / "r")[0]


def test_neither_nats_nor_a_service_is_loaded_for_it(layout: Layout) -> None:
    code = (
        "import sys, railbus\n"
        "assert 'torch' not in sys.modules\n"
        "dataset = railbus.open_dataset(sys.argv[1])\n"
        "next(iter(dataset.stream('train', batch_size=4)))\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'nats', 'aiohttp', 'uvloop', 'pyarrow'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(layout.dataset("d"))], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
