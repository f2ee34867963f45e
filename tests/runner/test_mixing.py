"""Mixtures as streams: the pure functions' order, the same for every rank, resumed at any batch."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import payloads
import railbus
import small_datasets
from railbus_runner.mixing import MixtureStream, open_mixture
from railbus_runner.opening import Dataset, open_dataset
from railbus_runner.packed import Packed
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Dtype, PayloadFormat, Split
from railbus_shared.data.mixture import Mixture, Stop
from railbus_shared.data.order import EpochOrder
from railbus_shared.data.writer import write_dataset
from railbus_shared.errors import DatasetNotFound, InvalidField, NotFound, ShardCorrupt
from railbus_shared.layout import Layout
from torch_loaders import end_workers

SIZES = {"a": 90, "b": 40, "c": 25}
WEIGHTS = {"a": 6, "b": 3, "c": 1}
SEED = 5


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Nothing is changed in it."""
    layout = Layout(tmp_path_factory.mktemp("sources"))
    for name, size in SIZES.items():
        small_datasets.write(layout, size, name=name, num_shards=3, test=5)
    return layout


def mixed(layout: Layout, *, batch_size: int = 12, **settings: Any) -> MixtureStream:
    sources = {layout.dataset(name): weight for name, weight in WEIGHTS.items()}
    return open_mixture(sources, **{"split": "train", "batch_size": batch_size, "seed": SEED, **settings})


def rows(batches: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """Source and number of each sample; that its other columns are that sample's is checked on the way."""
    found = []
    for batch in batches:
        assert set(batch) == {"x", "id", "flag", "source"}
        ids = batch["id"]
        assert torch.equal(batch["x"][:, 0, 0], ids * 10.0)
        assert torch.equal(batch["flag"], ids % 3 == 0)
        assert batch["source"].dtype is torch.int64
        found += list(zip(batch["source"].tolist(), ids.tolist(), strict=True))
    return found


def expected(start: int, stop: int, *, shuffle: bool = True) -> list[tuple[int, int]]:
    """By the pure functions alone."""
    sizes = [size - 5 for size in SIZES.values()]
    found = np.empty((stop - start, 2), dtype=np.int64)
    for span in Mixture.of(list(WEIGHTS.values()), sizes=sizes, seed=SEED).spans(start, stop):
        order = EpochOrder(sizes[span.source], SEED, span.epoch, shuffle=shuffle)
        found[span.at, 0], found[span.at, 1] = span.source, order.positions(span.start, span.stop)
    return [(source, number) for source, number in found.tolist()]


def hashed(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [
        hashlib.sha256(b"".join(batch[name].numpy().tobytes() for name in sorted(batch))).hexdigest()
        for batch in batches
    ]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 12, 5000])
def test_the_order_is_that_of_the_pure_functions_over_epochs(layout: Layout, batch_size: int, shuffle: bool) -> None:
    stream = mixed(layout, batch_size=batch_size, stop="longest", shuffle=shuffle)
    found = [row for _ in stream.epochs(3) for row in rows(stream)]
    assert found == expected(0, len(found), shuffle=shuffle)
    assert stream.samples_seen == len(found)
    assert len(found) % 3 == 0


def test_the_proportions_are_those_of_the_weights(layout: Layout) -> None:
    found = rows(islice(mixed(layout, stop="never", batch_size=500), 6))
    assert np.bincount([source for source, _ in found]).tolist() == [1800, 900, 300]


@pytest.mark.parametrize("stop", ["first", "longest"])
def test_an_epoch_ends_when_the_first_or_every_source_has_been_read_once(layout: Layout, stop: Stop) -> None:
    stream = mixed(layout, stop=stop)
    found = rows(stream)
    read = [len({number for source, number in found if source == one}) for one in range(3)]
    whole = [read[one] == size - 5 for one, size in enumerate(SIZES.values())]
    assert (sum(whole) == 1) if stop == "first" else all(whole)
    assert stream.num_batches == -(-len(found) // 12)
    assert len(stream) == stream.num_batches


def test_a_mixture_that_never_stops_has_no_length_and_goes_on_from_far_away(layout: Layout) -> None:
    stream = mixed(layout, stop="never")
    assert stream.num_batches is None
    with pytest.raises(TypeError, match="never stops"):
        len(stream)
    stream.load_state_dict({**stream.state_dict(), "batches_done": 10**9})
    assert rows(islice(stream, 3)) == expected(12 * 10**9, 12 * 10**9 + 36)
    assert stream.epoch == 0


@pytest.mark.parametrize("stop", ["first", "longest", "never"])
def test_it_goes_on_at_the_very_next_sample_from_any_batch(layout: Layout, stop: Stop) -> None:
    def batches(stream: MixtureStream) -> Iterable[dict[str, Any]]:
        return (batch for _ in stream.epochs(2) for batch in stream)

    unbroken = hashed(islice(batches(mixed(layout, stop=stop)), 14))
    for done in range(0, 14, 1 if stop == "first" else 3):
        before, after = mixed(layout, stop=stop), mixed(layout, stop=stop)
        assert hashed(islice(batches(before), done)) == unbroken[:done]
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert hashed(islice(batches(after), 14 - done)) == unbroken[done:]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_read_the_global_batches_of_one(layout: Layout, world_size: int) -> None:
    whole = [batch for stream in [mixed(layout)] for _ in stream.epochs(2) for batch in stream]
    streams = [mixed(layout, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for _ in range(2)
        for parts in zip(*streams, strict=True)
    ]
    assert hashed(together) == hashed(whole)
    assert streams[0].state_dict() == streams[1].state_dict()


def test_a_position_is_that_of_every_world_size(layout: Layout) -> None:
    one = mixed(layout)
    next(iter(one))
    ranks = [mixed(layout, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
    assert [row for rank in ranks for row in rows(islice(rank, 1))] == expected(12, 24)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"seed": 6}, r"stream\.sources\.0\.seed"),
        ({"stop": "longest"}, r"stream\.stop"),
        ({"batch_size": 6}, r"stream\.sources\.0\.batch_size"),
        ({"split": "test"}, r"stream\.sources\.0\.split"),
    ],
)
def test_a_position_of_another_mixture_is_refused(layout: Layout, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        mixed(layout, **settings).load_state_dict(mixed(layout).state_dict())
    other = open_mixture([(layout.dataset("a"), 1)], split="train", batch_size=12, seed=SEED)
    with pytest.raises(InvalidField, match=r"stream\.shares"):
        other.load_state_dict(mixed(layout).state_dict())


def test_columns_of_variable_length_come_packed_from_shards_of_several_formats(tmp_path: Path) -> None:
    formats: dict[Path, PayloadFormat] = {tmp_path / "r": "raw", tmp_path / "c": "columns", tmp_path / "p": "parquet"}
    folders = list(formats)
    for folder, payload in formats.items():
        payloads.write(folder, payload)
    alone = [open_dataset(folder) for folder in folders]
    stream = open_mixture([(folder, 1) for folder in folders], split="all", batch_size=20, stop="longest")
    plain = open_mixture([(one, 1) for one in alone], split="all", batch_size=20, stop="longest", shuffle=False)
    assert [set(batch) for batch in islice(stream, 1)] == [{"words", "source"}]
    next_of = [0, 0, 0]
    for batch in plain:
        assert isinstance(batch["words"], Packed)
        for source, words in zip(batch["source"].tolist(), batch["words"], strict=True):
            assert torch.equal(words, alone[source][next_of[source] % 17]["words"])
            next_of[source] += 1
    assert min(next_of) >= 17


def write_one(layout: Layout, name: str, column: str, dtype: Dtype, shape: tuple[int, ...] = ()) -> Dataset:
    schema = DatasetSchema(
        name=name, columns={column: Column(dtype=dtype, shape=shape)}, splits={"train": Split(first=0, samples=4)}
    )
    write_dataset(layout, schema, [{column: np.zeros((4, *shape), dtype)}])
    return open_dataset(layout.dataset(name), split="train")


@pytest.mark.parametrize(
    ("column", "dtype", "shape", "problem"),
    [
        ("id", "int32", (), r"columns\.id.*int32 \[\].*source 1 .*int64 \[\]"),
        ("x", "float32", (3, 2), r"columns\.x.*float32 \[3, 2\].*float32 \[2, 3\]"),
        ("y", "int64", (), "needs a column that all sources have"),
    ],
)
def test_columns_that_do_not_fit_are_refused_and_both_are_named(
    layout: Layout, tmp_path: Path, column: str, dtype: Dtype, shape: tuple[int, ...], problem: str
) -> None:
    sources = [open_dataset(layout.dataset("a")), write_one(Layout(tmp_path), "other", column, dtype, shape)]
    with pytest.raises(InvalidField, match=problem):
        open_mixture([(one, 1) for one in sources], split="train", batch_size=4)


def test_a_column_that_is_called_source_is_refused(tmp_path: Path) -> None:
    other = write_one(Layout(tmp_path), "other", "source", "int64")
    with pytest.raises(InvalidField, match="gives 'source' itself"):
        open_mixture({other: 1}, batch_size=4)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"stop": "soon"}, "stop"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5, "world_size": 2}, "batch_size"),
        ({"shuffle": "much"}, "shuffle"),
        ({"split": None}, "split"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(layout: Layout, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField, match=f"field '{field}'"):
        mixed(layout, **settings)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2], [1, 1e-9]])
def test_weights_that_are_none_are_refused(layout: Layout, weights: list[float]) -> None:
    with pytest.raises(InvalidField, match="field 'sources'"):
        open_mixture([(layout.dataset("a"), weight) for weight in weights], split="train", batch_size=4)


def test_a_source_or_split_that_is_not_there_is_said_so(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound):
        open_mixture({tmp_path / "nothing": 1}, split="train", batch_size=4)
    with pytest.raises(NotFound, match="it has test, train"):
        mixed(layout, split="valid")


def test_a_damaged_shard_of_any_source_is_refused_before_it_is_read(layout: Layout, tmp_path: Path) -> None:
    index = small_datasets.write(Layout(tmp_path), 25, name="c", num_shards=3)
    small_datasets.flip(Layout(tmp_path).shards("c") / index.file.shards[1].file)
    stream = open_mixture(
        {layout.dataset("a"): 1, Layout(tmp_path).dataset("c"): 1}, split="train", batch_size=4, stop="longest"
    )
    with pytest.raises(ShardCorrupt, match=r"c/shards/shard-00001\.data"):
        list(stream)


def test_a_transform_gets_each_batch_whole(layout: Layout) -> None:
    stream = mixed(layout, transform=lambda batch: batch["source"].tolist())
    assert [one for batch in stream for one in batch] == [source for source, _ in rows(mixed(layout))]


def test_a_copy_goes_on_where_the_stream_stands(layout: Layout) -> None:
    dataset = open_dataset(layout.dataset("a"), split="train")
    dataset[0]
    stream = open_mixture([(dataset, 2), (dataset, 1)], batch_size=12, stop="longest")
    next(iter(stream))
    copy: MixtureStream = pickle.loads(pickle.dumps(stream))  # noqa: S301 - what was just made
    assert rows(copy) == rows(stream)


@pytest.mark.timeout(60)  # processes are started, on a busy machine
def test_the_loader_of_torch_gives_the_sequence_of_the_stream(layout: Layout) -> None:
    loader = DataLoader(mixed(layout), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert rows(loader) == rows(mixed(layout))


@pytest.fixture
def ends_workers() -> Iterator[None]:
    yield
    end_workers()


@pytest.mark.timeout(90)  # processes are started, on a busy machine
@pytest.mark.usefixtures("ends_workers")
def test_workers_keep_the_order_the_epochs_and_the_position(layout: Layout, tmp_path: Path) -> None:
    stream, alone = mixed(layout, workers=2), mixed(layout)
    assert hashed(islice(stream, 3)) == hashed(islice(alone, 3))
    assert stream.state_dict() == alone.state_dict()
    assert [hashed(stream), hashed(stream)] == [hashed(alone), hashed(alone)]
    copied = shutil.copytree(layout.root, tmp_path / "copied")
    small_datasets.flip(Layout(copied).shards("b") / "shard-00002.data")
    with pytest.raises(ShardCorrupt, match=r"b/shards/shard-00002\.data"):
        list(mixed(Layout(copied), workers=1))


def test_it_is_there_under_the_public_name() -> None:
    assert railbus.open_mixture is open_mixture
    assert railbus.MixtureStream is MixtureStream
