"""A dataset in object storage, opened without NATS: here the store is a folder."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy.random  # noqa: F401 - see `loading`
import pytest
from torch.utils.data import DataLoader

import payloads
import small_datasets
from railbus_runner.objects import open_object_store
from railbus_runner.opening import Dataset
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.selection import Selection
from railbus_shared.data.writer import append_dataset
from railbus_shared.errors import DatasetNotFound, IndexInvalid, NoSource, NotFound, NotSupported, ShardCorrupt
from railbus_shared.layout import Layout
from torch_loaders import taken

pytestmark = pytest.mark.timeout(60)  # processes are started, on a busy machine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "there")
    small_datasets.write(layout, 30, num_shards=3)
    return layout


def opened(folder: Path, *, version: int | None = None) -> Dataset:
    stored = open_object_store(folder.as_uri(), version=version)
    selection = Selection.of([(0, stored.index.file.samples)])
    return Dataset(stored.index, stored.folder, split=None, selection=selection, stored=stored)


def is_here(dataset: Dataset) -> list[bool]:
    return [path.exists() for path in dataset.paths.values()]


def ids(dataset: Dataset) -> list[int]:
    return [number for batch in dataset.stream("train", batch_size=7, shuffle=False) for number in batch["id"].tolist()]


def loading(dataset: Any) -> DataLoader[Any]:
    """A loader with a process of its own.

    That would import numpy.random if it were not there, and might collect a former loader in the midst of it, which
    importlib does not survive.
    """
    return DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")


def test_a_shard_comes_when_it_is_first_read_and_stays(layout: Layout) -> None:
    dataset = opened(layout.dataset("d"))
    assert (is_here(dataset), dataset[12]["id"].item()) == ([False] * 3, 12)
    assert is_here(dataset) == [False, True, False]
    assert ids(dataset) == list(range(30))
    for path in layout.shards("d").iterdir():
        path.unlink()
    assert ids(opened(layout.dataset("d"))) == list(range(30))
    assert not [path for path in dataset.paths[0].parent.iterdir() if path.name.startswith(".")]


def test_a_sidecar_comes_with_its_shard(tmp_path: Path) -> None:
    payloads.write(tmp_path / "r", "raw")
    dataset = opened(tmp_path / "r")
    assert [len(sample["words"]) for sample in dataset] == [0 if n % 4 == 0 else n * 7 % 300 for n in range(17)]


def test_an_older_version_is_opened_by_its_number(layout: Layout) -> None:
    append_dataset(layout, "d", [small_datasets.arrays(5)], split="train")
    assert len(opened(layout.dataset("d"))) == 35
    older = opened(layout.dataset("d"), version=1)
    assert ids(older) == list(range(30))
    with pytest.raises(NotFound, match="versions/000003"):
        opened(layout.dataset("d"), version=3)


def test_what_is_damaged_there_is_refused_and_what_is_damaged_here_is_fetched_again(layout: Layout) -> None:
    dataset = opened(layout.dataset("d"))
    small_datasets.flip(layout.shards("d") / dataset.paths[1].name)
    with pytest.raises(ShardCorrupt, match=r"file://.*/d/shards/shard-00001\.data"):
        dataset[12]
    assert dataset[0]["id"].item() == 0
    small_datasets.flip(dataset.paths[0])
    assert opened(layout.dataset("d"))[0]["id"].item() == 0
    assert is_here(dataset) == [True, False, False]


def test_what_is_missing_there_is_said_so(layout: Layout, tmp_path: Path) -> None:
    dataset = opened(layout.dataset("d"))
    (layout.shards("d") / dataset.paths[1].name).unlink()
    with pytest.raises(NoSource, match=r"shard-00001\.data cannot be read"):
        dataset[12]
    (tmp_path / "there/datasets/e").mkdir()
    with pytest.raises(DatasetNotFound, match="no dataset lies there"):
        opened(tmp_path / "there/datasets/e")
    layout.index("d").write_bytes(b"{")
    with pytest.raises(IndexInvalid):
        opened(layout.dataset("d"))


def test_a_worker_of_torchs_loader_fetches_nothing_and_says_what_helps(layout: Layout) -> None:
    dataset = opened(layout.dataset("d"))
    for copies in (dataset, dataset.stream("train", batch_size=7)):
        loader = loading(copies)
        with pytest.raises(NotSupported, match=r"DataLoader\(num_workers=0\)"):
            taken(loader)
    dataset.verify()
    assert [sample["id"].item() for sample in loading(dataset)] == list(range(30))
    stream = dataset.stream("train", batch_size=7, shuffle=False)
    assert [number for batch in loading(stream) for number in batch["id"].tolist()] == list(range(30))
    assert pickle.loads(pickle.dumps(dataset))[3]["id"].item() == 3  # noqa: S301 - our own bytes


def test_the_streams_own_workers_read_what_is_fetched_for_them(layout: Layout) -> None:
    dataset = opened(layout.dataset("d"))
    with_workers = dataset.stream("train", batch_size=7, shuffle=False, workers=1)
    assert [number for batch in with_workers for number in batch["id"].tolist()] == list(range(30))
    assert DatasetIndex.load(dataset.paths[0].parent.parent).sha256 == dataset.index.sha256
