"""Batches out of every payload: fixed and variable lengths, from one shard and from many."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import payloads
from railbus_runner.packed import Packed
from railbus_runner.stream import ShardStream
from railbus_shared.contracts.artifacts import Column, DatasetSchema, PayloadFormat, Split
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import EpochOrder
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout

SIZES = (10, 7, 1, 12)
TOTAL = sum(SIZES)
VARIABLE = {"words", "items.of", "pairs"}


def stream_of(folder: Path, index: DatasetIndex, **settings: Any) -> ShardStream:
    paths = {number: folder / "shards" / shard.file for number, shard in enumerate(index.file.shards)}
    return ShardStream(index, paths, split="all", seed=3, ensure_verified=lambda _: None, **settings)


def sample(name: str, number: int) -> Any:
    """What `payloads.write` put there, shard by shard."""
    for first, size in zip(np.cumsum((0, *SIZES)).tolist(), SIZES, strict=False):
        if number < first + size:
            return payloads.samples(first, size)[name][number - first]
    raise AssertionError(f"there is no sample {number}")


def check(batch: dict[str, Any], numbers: list[int]) -> None:
    """The batch holds these samples, in this order, in all its columns."""
    for name, column in batch.items():
        assert isinstance(column, Packed) == (name in VARIABLE)
        assert len(column) == len(numbers)
        for found, number in zip(column, numbers, strict=True):
            bits = found.view(torch.uint16) if found.dtype is torch.bfloat16 else found
            assert np.array_equal(bits.numpy(), sample(name, number))


@pytest.mark.parametrize("payload", get_args(PayloadFormat))
@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_payload_gives_the_samples_in_order(
    payload: PayloadFormat, batch_size: int, shuffle: bool, tmp_path: Path
) -> None:
    index = payloads.write(tmp_path / "d", payload, sizes=SIZES)
    order = EpochOrder(TOTAL, 3, 0, shuffle=shuffle).positions(0, TOTAL).tolist()
    for at, batch in enumerate(stream_of(tmp_path / "d", index, batch_size=batch_size, shuffle=shuffle)):
        assert batch.keys() == index.schema.columns.keys()
        check(batch, order[at * batch_size : (at + 1) * batch_size])


@pytest.mark.parametrize("payload", ["columns", "parquet"])
def test_large_batches_out_of_many_shards_are_in_order(payload: PayloadFormat, tmp_path: Path) -> None:
    ids, random = np.arange(3000), np.random.default_rng(7)
    offsets = np.concatenate([[0], np.cumsum(random.integers(150, 400, 3000))])
    rows, items = ids[:, None] + np.zeros(128, np.int64), random.integers(0, 256, offsets[-1], dtype=np.uint8)
    columns = {
        "row": Column(dtype="int64", shape=(128,)),
        "items": Column(dtype="uint8", shape=(), variable_length=True),
    }
    schema = DatasetSchema(name="d", payload=payload, columns=columns, splits={"all": Split(first=0, samples=3000)})
    index = write_dataset(
        Layout(tmp_path), schema, [{"row": rows, "items": Ragged(items, offsets)}], shard_bytes=700_000
    )
    assert len(index.file.shards) > 3
    order = EpochOrder(3000, 3, 0).positions(0, 3000)
    for at, batch in enumerate(stream_of(tmp_path / "datasets" / "d", index, batch_size=1100)):
        numbers = order[at * 1100 : (at + 1) * 1100]
        assert at == 2 or batch["row"].nbytes > 1 << 20, "the test needs batches that are large"
        assert np.array_equal(batch["row"].numpy(), rows[numbers])
        expected = [items[offsets[n] : offsets[n + 1]] for n in numbers.tolist()]
        assert np.array_equal(batch["items"].values.numpy(), np.concatenate(expected))
        assert batch["items"].lengths.tolist() == list(map(len, expected))


def test_ranks_without_a_share_of_the_last_batch_get_an_empty_one(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "columns", sizes=SIZES)
    for rank in range(7):
        *_, last = stream_of(tmp_path / "d", index, batch_size=7, shuffle=False, rank=rank, world_size=7)
        check(last, [28 + (rank == 6)] if rank in {3, 6} else [])


@pytest.mark.parametrize("sizes", [(3000,), (1700, 1300)])
def test_batches_of_variable_length_that_are_kept_stay_as_they_were(sizes: tuple[int, ...], tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "columns", sizes=sizes)
    order = EpochOrder(3000, 3, 0).positions(0, 3000).tolist()
    held = [payloads.samples(first, size)["pairs"] for first, size in zip((0, sizes[0]), sizes, strict=False)]
    kept = [batch["pairs"] for batch in stream_of(tmp_path / "d", index, batch_size=1000)]
    assert all(one.values.nbytes > 128 << 10 for one in kept), "the test needs batches that are large"
    for at, batch in enumerate(kept):
        numbers = order[at * 1000 : (at + 1) * 1000]
        expected = [held[number >= sizes[0]][number - sizes[0] * (number >= sizes[0])] for number in numbers]
        assert np.array_equal(batch.values.numpy(), np.concatenate(expected))
        assert batch.lengths.tolist() == list(map(len, expected))


def test_a_split_of_several_runs_and_ranges_of_it_are_read_in_order(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "columns", sizes=SIZES)
    stream = stream_of(tmp_path / "d", index, batch_size=4, shuffle=False, ranges=[(25, 27), (8, 12)])
    assert stream.num_batches == 2
    first, second = stream
    check(first, [8, 9, 10, 11])
    check(second, [25, 26])
