"""The torch face of the data: every sample once, exact resumption, any world size, batches that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small_datasets
from railbus_runner.buffers import TORCH_DTYPES
from railbus_runner.stream import ShardStream
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.index import ITEM_BYTES, DatasetIndex
from railbus_shared.data.order import EpochOrder
from railbus_shared.data.readers import numpy_dtype
from railbus_shared.data.writer import write_dataset
from railbus_shared.errors import InvalidField, NotFound, ShardCorrupt
from railbus_shared.layout import Layout


@dataclass
class Opened:
    """A dataset, and what its streams asked to be verified."""

    layout: Layout
    index: DatasetIndex
    asked: list[list[int]] = field(default_factory=list)

    def stream(self, split: str = "train", *, batch_size: int = 4, seed: int = 7, **more: Any) -> ShardStream:
        folder = self.layout.shards(self.index.schema.name)
        paths = {number: folder / shard.file for number, shard in enumerate(self.index.file.shards)}
        settings: dict[str, Any] = {"ensure_verified": lambda numbers: self.asked.append(list(numbers))} | more
        return ShardStream(self.index, paths, split=split, batch_size=batch_size, seed=seed, **settings)


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """30 samples in four shards: 23 of split `train`, 7 of `test`."""
    layout = Layout(tmp_path)
    return Opened(layout, small_datasets.write(layout, 30, num_shards=4, test=7))


def ids(batches: Sequence[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def in_batches(samples: Sequence[int], size: int) -> list[list[int]]:
    return [list(samples[at : at + size]) for at in range(0, len(samples), size)]


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 4, 9])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_sample_of_the_split_once_with_all_its_columns(
    num_shards: int, batch_size: int, shuffle: bool, tmp_path: Path
) -> None:
    layout = Layout(tmp_path)
    made = Opened(layout, small_datasets.write(layout, 30, num_shards=num_shards, test=7))
    batches = list(made.stream(batch_size=batch_size, shuffle=shuffle))
    assert sorted(number for batch in ids(batches) for number in batch) == list(range(23))
    held = small_datasets.arrays(30)
    for batch in batches:
        for name, tensor in batch.items():
            assert np.array_equal(tensor.numpy(), held[name][batch["id"].numpy()])


def test_a_split_holds_its_own_samples_only(opened: Opened) -> None:
    assert ids(list(opened.stream("test", shuffle=False))) == [[23, 24, 25, 26], [27, 28, 29]]


def test_the_order_is_that_of_the_seed_and_the_epoch(opened: Opened) -> None:
    stream = opened.stream(seed=5)
    for epoch in stream.epochs(3):
        expected = EpochOrder(23, 5, epoch).positions(0, 23).tolist()
        assert ids(list(stream)) == in_batches(expected, 4)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 4, 4, 4, 3]), (True, [4, 4, 4, 4, 4])])
def test_the_last_batch_is_short_or_left_out(drop_last: bool, sizes: list[int], opened: Opened) -> None:
    stream = opened.stream(drop_last=drop_last)
    assert len(stream) == stream.num_batches == len(sizes)
    assert [len(batch["id"]) for batch in stream] == sizes


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_becomes_the_one_of_torch_bit_by_bit(dtype: str, tmp_path: Path) -> None:
    column = Column.parse({"dtype": dtype, "shape": [3]})
    schema = DatasetSchema(name="d", columns={"a": column}, splits={"all": Split(first=0, samples=11)})
    bits = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 256, (11, 3, ITEM_BYTES[dtype]), np.uint8)
    layout = Layout(tmp_path)
    index = write_dataset(layout, schema, [{"a": bits.view(numpy_dtype(column))[..., 0]}], shard_bytes=100)
    batches = [batch["a"] for batch in Opened(layout, index).stream("all", shuffle=False)]
    assert {tensor.dtype for tensor in batches} == {TORCH_DTYPES[dtype]} == {getattr(torch, dtype)}
    assert b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in batches) == bits.tobytes()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_ranks_together_see_the_same_batches_for_every_world_size(
    world_size: int, drop_last: bool, opened: Opened
) -> None:
    def of_rank(rank: int, of: int) -> list[list[int]]:
        return ids(list(opened.stream(batch_size=12, rank=rank, world_size=of, drop_last=drop_last)))

    parts = [of_rank(rank, world_size) for rank in range(world_size)]
    together = [[number for part in batch for number in part] for batch in zip(*parts, strict=True)]
    assert together == of_rank(0, 1)


@pytest.mark.parametrize(
    ("settings", "field_name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": -4}, "batch_size"),
        ({"batch_size": 4, "world_size": 3}, "batch_size"),
        ({"batch_size": 24, "drop_last": True}, "batch_size"),
        ({"shuffle": "window", "window": 0}, "window"),
        ({"shuffle": "some"}, "shuffle"),
        ({"ranges": [(0, 24)]}, "ranges"),
        ({"ranges": [(5, 4)]}, "ranges"),
        ({"ranges": [(5, 5)]}, "ranges"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings: dict[str, Any], field_name: str, opened: Opened) -> None:
    with pytest.raises(InvalidField) as caught:
        opened.stream(**settings)
    assert caught.value.details["field"] == field_name


def test_a_split_that_does_not_exist_is_refused(opened: Opened) -> None:
    with pytest.raises(NotFound, match="it has test, train"):
        opened.stream("valid")


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_epochs_count_up_and_stop(opened: Opened) -> None:
    stream = opened.stream()
    assert [(epoch, len(list(stream))) for epoch in stream.epochs(3)] == [(0, 6), (1, 6), (2, 6)]
    assert (stream.epoch, list(stream.epochs(3))) == (3, [])
    assert list(stream.epochs(5)) == [3, 4]


def test_within_an_epoch_a_second_pass_is_empty(opened: Opened) -> None:
    stream = opened.stream()
    for _ in stream.epochs(2):
        assert [len(list(stream)), len(list(stream))] == [6, 0]


def test_an_epoch_that_is_left_early_is_followed_by_a_whole_one(opened: Opened) -> None:
    stream = opened.stream()
    assert [len(list(islice(stream, 2 if epoch == 0 else None))) for epoch in stream.epochs(2)] == [2, 6]


def test_without_epochs_every_whole_pass_is_one(opened: Opened) -> None:
    stream, expected = opened.stream(), opened.stream()
    for epoch in expected.epochs(3):
        assert len(stream) == 6
        assert ids(list(stream)) == ids(list(expected))
        assert stream.epoch == epoch


def test_a_pass_that_is_left_early_is_gone_on_with(opened: Opened) -> None:
    stream = opened.stream()
    found = ids(list(islice(stream, 2))) + ids(list(stream))
    assert found == ids(list(opened.stream()))


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("taken_after", range(19))
def test_after_any_batch_the_rest_is_what_an_unbroken_run_sees(
    taken_after: int, drop_last: bool, opened: Opened
) -> None:
    unbroken: list[tuple[int, list[int]]] = []
    state: dict[str, Any] = {}
    stream = opened.stream(drop_last=drop_last)
    for epoch in stream.epochs(3):
        for batch in stream:
            if len(unbroken) == taken_after:
                state = state or opened.stream(drop_last=drop_last).state_dict()
            unbroken.append((epoch, batch["id"].tolist()))
            if len(unbroken) == taken_after:
                state = stream.state_dict()
    state = state or stream.state_dict()
    resumed = opened.stream(drop_last=drop_last)
    resumed.load_state_dict(state)
    assert resumed.samples_seen == state["samples_seen"] == sum(len(batch) for _, batch in unbroken[:taken_after])
    rest = [(epoch, batch["id"].tolist()) for epoch in resumed.epochs(3) for batch in resumed]
    assert rest == unbroken[taken_after:]


def test_taken_after_the_last_batch_the_epoch_ends_again_without_batches(opened: Opened) -> None:
    stream = opened.stream()
    next(stream.epochs(2))
    list(stream)
    resumed = opened.stream()
    resumed.load_state_dict(stream.state_dict())
    assert [(epoch, len(list(resumed))) for epoch in resumed.epochs(2)] == [(0, 0), (1, 6)]


def test_taken_after_everything_there_is_nothing_left(opened: Opened) -> None:
    stream = opened.stream()
    for _ in stream.epochs(2):
        list(stream)
    resumed = opened.stream()
    resumed.load_state_dict(stream.state_dict())
    assert list(resumed.epochs(2)) == []


def test_a_state_goes_on_with_another_world_size(opened: Opened) -> None:
    whole = ids(list(opened.stream(batch_size=12)))
    stream = opened.stream(batch_size=12)
    list(islice(stream, 1))
    parts = []
    for rank in range(3):
        resumed = opened.stream(batch_size=12, rank=rank, world_size=3)
        resumed.load_state_dict(stream.state_dict())
        parts.append(ids(list(resumed)))
    assert [[number for part in batch for number in part] for batch in zip(*parts, strict=True)] == whole[1:]


def test_a_state_is_of_plain_values(opened: Opened, tmp_path: Path) -> None:
    stream = opened.stream()
    list(islice(stream, 2))
    state = stream.state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state
    assert state == {
        "version": 1, "dataset": "d", "dataset_version": 1, "index_sha256": opened.index.sha256, "split": "train",
        "ranges": [], "num_samples": 23, "seed": 7, "order": "global", "window": None, "batch_size": 4,
        "drop_last": False, "epoch": 0, "batches_done": 2, "samples_seen": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "other"),
        ("dataset_version", 2),
        ("index_sha256", "0" * 64),
        ("split", "test"),
        ("num_samples", 22),
        ("seed", 8),
        ("batch_size", 5),
        ("order", "sequential"),
        ("order", "window"),
        ("window", [8, "shards"]),
        ("ranges", [[0, 4]]),
        ("drop_last", True),
        ("version", 2),
        ("version", None),
        ("epoch", -1),
        ("epoch", "0"),
        ("epoch", None),
        ("batches_done", 7),
        ("batches_done", 1.5),
        ("batches_done", True),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(name: str, value: object, opened: Opened) -> None:
    stream = opened.stream()
    list(islice(stream, 2))
    before = stream.state_dict()
    with pytest.raises(InvalidField) as caught:
        stream.load_state_dict(before | {"epoch": 1} | {name: value})
    assert caught.value.details["field"] == f"stream.{name}"
    assert stream.state_dict() == before


# --- verification and orders -----------------------------------------------------------------------------------------


def test_each_shard_is_verified_once_before_its_first_read(opened: Opened) -> None:
    stream = opened.stream(shuffle=False)
    firsts = [shard.first_sample for shard in opened.index.file.shards]
    for number, _ in enumerate(stream):
        read = [shard for shard, first in enumerate(firsts) if first < min(23, 4 * number + 4)]
        assert sorted(shard for asked in opened.asked for shard in asked) == read
    before = list(opened.asked)
    assert before
    list(stream)
    assert opened.asked == before


def test_a_shard_that_is_refused_is_not_read(opened: Opened) -> None:
    def refuse(numbers: Sequence[int]) -> None:
        if 1 in numbers:
            raise ShardCorrupt(path="shard-00001.data", expected="a", actual="b")

    stream = opened.stream(shuffle=False, ensure_verified=refuse)
    assert ids(list(islice(stream, 2))) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ShardCorrupt):
        list(stream)
    assert stream.state_dict()["batches_done"] == 2


def test_orders_are_heeded_before_each_batch_and_not_one_too_many(opened: Opened) -> None:
    heeded: list[int] = []
    stream: ShardStream = opened.stream(on_batch=lambda: heeded.append(stream.state_dict()["batches_done"]))
    list(islice(stream, 3))
    assert heeded == [0, 1, 2]
    list(stream)
    assert heeded == [0, 1, 2, 3, 4, 5]


def test_an_order_to_stop_leaves_the_position_before_the_batch(opened: Opened) -> None:
    stream: ShardStream

    def stop() -> None:
        if stream.state_dict()["batches_done"] == 2:
            raise KeyboardInterrupt

    stream = opened.stream(on_batch=stop)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert stream.samples_seen == 8


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Batches of 32 are 256 KiB: large enough to be gathered into aligned buffers."""
    layout = Layout(tmp_path_factory.mktemp("large"))
    tokens = np.arange(320, dtype=np.int32)[:, None] * 10_000 + np.arange(2048, dtype=np.int32)
    columns = {"tokens": Column(dtype="int32", shape=(2048,))}
    schema = DatasetSchema(name="d", columns=columns, splits={"all": Split(first=0, samples=320)})
    return Opened(layout, write_dataset(layout, schema, [{"tokens": tokens}], shard_bytes=tokens.nbytes // 3))


def test_batches_that_are_kept_stay_as_they_were(large: Opened) -> None:
    stream = large.stream("all", batch_size=32)
    batches = list(stream)
    order = EpochOrder(320, 7, 0).positions(0, 320)
    for number, batch in enumerate(batches):
        expected = order[32 * number : 32 * number + 32, None] * 10_000 + np.arange(2048)
        assert np.array_equal(batch["tokens"].numpy(), expected)
    assert len({batch["tokens"].data_ptr() for batch in batches}) == 10


HOLDS: list[tuple[str, Callable[[torch.Tensor], object]]] = [
    ("a row", lambda tensor: tensor[3]),
    ("a view", lambda tensor: tensor.view(-1)[100:]),
    ("an array", lambda tensor: tensor.numpy()),
    ("a part of an array", lambda tensor: tensor.numpy()[1:, ::2]),
    ("another dtype", lambda tensor: tensor.view(torch.uint8)),
    ("the storage", lambda tensor: tensor.untyped_storage()),
    ("a detached alias", lambda tensor: tensor.detach()),
    ("dlpack", np.from_dlpack),
    ("a closure", lambda tensor: lambda: tensor),
]


@pytest.mark.parametrize("hold", [hold for _, hold in HOLDS], ids=[name for name, _ in HOLDS])
def test_whatever_is_held_of_a_batch_keeps_its_memory(hold: Callable[[torch.Tensor], object], large: Opened) -> None:
    stream = large.stream("all", batch_size=32)
    held, taken = [], set()
    for batch in stream:
        pointer = batch["tokens"].data_ptr()
        assert pointer not in taken
        taken.add(pointer)
        held.append(hold(batch["tokens"]))
    assert len(held) == 10


def test_a_batch_that_a_gradient_needs_keeps_its_memory(large: Opened) -> None:
    weight = torch.ones(2048, requires_grad=True)
    losses, expected = [], torch.zeros(2048)
    for batch in large.stream("all", batch_size=32):
        floats = batch["tokens"].view(torch.float32)
        expected += floats.sum(0)
        losses.append((floats * weight).sum())
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


def test_large_batches_begin_on_a_page(large: Opened) -> None:
    assert all(batch["tokens"].data_ptr() % 4096 == 0 for batch in large.stream("all", batch_size=32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_batches_are_the_same(large: Opened) -> None:
    here = large.stream("all", batch_size=32)
    there = large.stream("all", batch_size=32, device=torch.device("cuda"))
    for _ in range(20):
        pairs = [(one["tokens"].clone(), other["tokens"]) for one, other in zip(here, there, strict=True)]
        assert all(other.is_cuda and torch.equal(one, other.cpu()) for one, other in pairs)
