"""Shards that lie behind make room for the next, whatever the clock says and however many epochs there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import small_datasets
from railbus_runner.stream import ShardStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.layout import Layout

SHARDS = 12


@dataclass
class Cache:
    """Of 12 shards of 5 samples it counts how many are held at once."""

    layout: Layout
    index: DatasetIndex
    held: set[int] = field(default_factory=set)
    most: int = 0

    def stream(self, **settings: Any) -> ShardStream:
        folder = self.layout.shards("d")
        paths = {number: folder / shard.file for number, shard in enumerate(self.index.file.shards)}
        settings = {"split": "train", "seed": 7, "batch_size": 5, **settings}
        return ShardStream(self.index, paths, ensure_verified=self.hold, on_ahead=self.let_go, **settings)

    def hold(self, numbers: Sequence[int]) -> None:
        self.held.update(numbers)
        self.most = max(self.most, len(self.held))

    def let_go(self, _ahead: Sequence[int], released: Sequence[int]) -> None:
        self.held.difference_update(released)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    layout = Layout(tmp_path)
    return Cache(layout, small_datasets.write(layout, 60, num_shards=SHARDS))


@pytest.mark.parametrize("shuffle", [False, "window"])
def test_a_shard_that_lies_behind_is_released_before_the_next_is_asked_for(shuffle: Any, cache: Cache) -> None:
    list(cache.stream(shuffle=shuffle, window=2))
    assert cache.most <= 4, "a batch may lie in two windows"


@pytest.mark.parametrize("shuffle", [False, "window"])
def test_a_later_epoch_keeps_no_shard_from_being_released_in_this_one(shuffle: Any, cache: Cache) -> None:
    stream = cache.stream(shuffle=shuffle, window=2)
    for _ in stream.epochs(3):
        list(stream)
    assert cache.most <= 4, "a batch may lie in two windows"


@pytest.mark.timeout(60)  # processes that import torch
def test_a_shard_is_held_until_no_worker_reads_it_any_more(cache: Cache) -> None:
    """Batches that are being made lie behind those that are asked for."""
    stream = cache.stream(shuffle=False, workers=1)
    for at, _ in enumerate(stream):
        assert set(range(at + 1, min(at + 3, SHARDS))) <= cache.held, f"batch {at}"
    assert cache.most <= 4
