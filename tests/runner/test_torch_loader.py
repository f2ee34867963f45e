"""Inside torch's own DataLoader: the same sequence for any number of workers, and states that go on."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.random  # noqa: F401 - or a forked worker imports it, and may collect a former loader in the midst of it
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker

import small_datasets
from railbus_runner.stream import ShardStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import NotSupported
from railbus_shared.layout import Layout
from torch_loaders import taken

pytestmark = pytest.mark.timeout(60)  # processes are started, on a busy machine


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Layout, DatasetIndex]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    layout = Layout(tmp_path)
    return layout, small_datasets.write(layout, 30, num_shards=4, test=7)


def of_parent_only(parent: int) -> Callable[[Sequence[int]], None]:
    def verify(_numbers: Sequence[int]) -> None:
        assert os.getpid() == parent, "a copy speaks in its parent's name"

    return verify


def stream_of(dataset: tuple[Layout, DatasetIndex], **settings: Any) -> ShardStream:
    layout, index = dataset
    paths = {number: layout.shards("d") / shard.file for number, shard in enumerate(index.file.shards)}
    verify = of_parent_only(os.getpid())
    settings = {"ensure_verified": verify, "on_batch": lambda: verify([]), **settings}
    return ShardStream(index, paths, split="train", seed=7, batch_size=4, **settings)


def nothing(_numbers: Sequence[int]) -> None:
    """Every shard is there."""


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def is_tensor(batch: dict[str, Any]) -> bool:
    return all(type(value) is torch.Tensor for value in batch.values())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_loader_gives_the_sequence_of_the_stream(workers: int, dataset: tuple[Layout, DatasetIndex]) -> None:
    expected = stream_of(dataset)
    stream = stream_of(dataset)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    for (epoch, _), _ in zip(zip(stream.epochs(2), expected.epochs(2), strict=True), range(2), strict=False):
        batches = list(loader)
        assert all(map(is_tensor, batches))
        assert ids(batches) == ids(expected), f"epoch {epoch}"


@pytest.mark.parametrize("is_driven", [True, False])
def test_workers_that_stay_go_on_to_the_next_epoch(is_driven: bool, dataset: tuple[Layout, DatasetIndex]) -> None:
    stream, expected = stream_of(dataset), stream_of(dataset)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    found = [ids(loader) for _ in (stream.epochs(2) if is_driven else range(2))]
    assert found == [ids(expected) for _ in range(2)]


@pytest.mark.parametrize("taken_after", range(7))
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_states_of_all_workers_together_go_on_with_the_next_batch(
    num_workers: int, taken_after: int, dataset: tuple[Layout, DatasetIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As StatefulDataLoader does it: a worker's copy tells its state after each batch, and its successor takes it."""

    def as_worker(number: int) -> None:
        info = worker.WorkerInfo(id=number, num_workers=num_workers, seed=0, dataset=copies[0])
        monkeypatch.setattr(worker, "_worker_info", info)

    copies = [stream_of(dataset) for _ in range(num_workers)]
    running: list[Any] = []
    for number, one in enumerate(copies):
        as_worker(number)
        running.append(iter(one))
        if number < taken_after:
            next(running[-1])
    for at in range(num_workers, taken_after):
        if at < 6:
            as_worker(at % num_workers)
            next(running[at % num_workers])
    rest: dict[int, list[int]] = {}
    for number, one in enumerate(copies):
        as_worker(number)
        resumed = stream_of(dataset)
        resumed.load_state_dict(one.state_dict())
        for turn, batch in enumerate(resumed):
            done_before = len([at for at in range(min(taken_after, 6)) if at % num_workers == number])
            rest[number + (done_before + turn) * num_workers] = batch["id"].tolist()
    monkeypatch.undo()
    assert [rest[at] for at in sorted(rest)] == ids(stream_of(dataset))[taken_after:]
    assert sorted(rest) == list(range(min(taken_after, 6), 6))


def test_a_copy_in_another_process_verifies_by_itself(dataset: tuple[Layout, DatasetIndex]) -> None:
    layout, index = dataset
    small_datasets.flip(layout.shards("d") / index.file.shards[1].file)
    loader = DataLoader(stream_of(dataset), batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match=r"shard-00001\.data"):
        taken(loader)


def test_a_copy_cannot_have_shards_fetched_and_says_what_can(dataset: tuple[Layout, DatasetIndex]) -> None:
    stream = stream_of(dataset, is_fetched=True, ensure_verified=nothing, on_batch=lambda: None)
    first = next(iter(stream))
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="fork")
    sent = pickle.loads(pickle.dumps(copy.copy(stream)))  # noqa: S301 - our own bytes; as to a worker that is spawned
    reads: tuple[Callable[[], object], ...] = (lambda: taken(loader), lambda: list(sent))
    for read in reads:
        with pytest.raises(NotSupported, match=r"'d' lies on another host.*fetched.*ctx\.stream\(\.\.\., workers=N\)"):
            read()
    alone = DataLoader(stream, batch_size=None, num_workers=0)
    assert ids([first, *alone]) == ids(stream_of(dataset))


def test_a_copy_has_the_position_and_leaves_the_original_alone(dataset: tuple[Layout, DatasetIndex]) -> None:
    stream = stream_of(dataset, on_batch=lambda: None)
    first = next(iter(stream))["id"].tolist()
    copied = pickle.loads(pickle.dumps(copy.copy(stream)))  # noqa: S301 - our own bytes
    whole = ids(stream_of(dataset))
    assert [first, *ids(copied)] == whole
    assert [first, *ids(stream)] == whole
