"""What a stream says of the shards that it will read, and which it lets go of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import small_datasets
from railbus_runner import lookahead
from railbus_runner.reading import Reading
from railbus_runner.stream import ShardStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Window
from railbus_shared.layout import Layout

SHARDS = 12


@dataclass
class Watched:
    """A dataset of 12 shards of 5 samples, and what its streams said, in order."""

    layout: Layout
    index: DatasetIndex
    said: list[tuple[str, list[int]]] = field(default_factory=list)

    def stream(self, **settings: Any) -> ShardStream:
        folder = self.layout.shards("d")
        paths = {number: folder / shard.file for number, shard in enumerate(self.index.file.shards)}
        settings = {"split": "train", "seed": 7, "batch_size": 5, "on_ahead": self.on_ahead, **settings}
        return ShardStream(self.index, paths, ensure_verified=self.verify, **settings)

    def verify(self, numbers: Sequence[int]) -> None:
        self.said.append(("verify", list(numbers)))

    def on_ahead(self, ahead: Sequence[int], released: Sequence[int]) -> None:
        self.said.append(("ahead", list(ahead)))
        self.said.append(("released", list(released)))

    def all_of(self, kind: str) -> list[list[int]]:
        return [numbers for what, numbers in self.said if what == kind]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(lookahead, "_EVERY_S", 0.0)
    layout = Layout(tmp_path)
    return Watched(layout, small_datasets.write(layout, 60, num_shards=SHARDS))


def maps(layout: Layout) -> int:
    """How many shards of the dataset this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(layout.shards("d")) in line})


def test_the_shards_ahead_are_told_before_the_first_is_asked_for(watched: Watched) -> None:
    next(iter(watched.stream(shuffle=False)))
    assert watched.said == [("ahead", list(range(SHARDS))), ("released", []), ("verify", [0])]


@pytest.mark.parametrize("shuffle", [False, "window"])
def test_a_shard_that_lies_behind_is_closed_and_released_once(shuffle: Any, watched: Watched) -> None:
    stream = watched.stream(shuffle=shuffle, window=2)
    for at, _ in enumerate(stream):
        assert maps(watched.layout) <= 2, f"batch {at}"
    released = [number for numbers in watched.all_of("released") for number in numbers]
    assert len(released) == len(set(released)) >= SHARDS - 2
    verified = [number for numbers in watched.all_of("verify") for number in numbers]
    assert sorted(verified) == list(range(SHARDS)), "none is read again"
    for ahead, gone in zip(watched.all_of("ahead"), watched.all_of("released"), strict=True):
        assert not set(ahead) & set(gone)


def test_shards_are_asked_for_in_the_order_that_was_told(watched: Watched) -> None:
    list(watched.stream(shuffle="window", window=3))
    (told, *_), asked = watched.all_of("ahead"), watched.all_of("verify")
    flat = [number for numbers in asked for number in numbers]
    places = [told.index(number) for number in flat]
    assert max(abs(place - at) for at, place in enumerate(places)) <= 4, "but for those of one batch"


def test_a_global_shuffle_keeps_every_shard(watched: Watched) -> None:
    stream = watched.stream()
    for _ in stream.epochs(2):
        list(stream)
    assert watched.all_of("released") == [[] for _ in watched.all_of("released")]
    assert maps(watched.layout) == SHARDS


def test_near_the_end_of_an_epoch_the_next_ones_shards_are_told(watched: Watched) -> None:
    stream = watched.stream(shuffle="window", window=2, seed=3)
    order = [list(islice_shards(stream, epoch)) for epoch in range(2)]
    epochs = stream.epochs(2)
    next(epochs)
    list(stream)
    *_, last = watched.all_of("ahead")
    assert last[-SHARDS + 2 :] == [number for number in order[1] if number in last[-SHARDS + 2 :]]
    assert set(last) == set(range(SHARDS))
    next(epochs)
    list(stream)
    assert len(watched.all_of("ahead")[-1]) <= 2, "there is no third"


def islice_shards(stream: ShardStream, epoch: int) -> list[int]:
    reading = stream._reading
    assert isinstance(reading, Reading)
    return reading.shards_ahead(epoch, 0, limit=None)


def test_a_global_shuffle_tells_what_it_does_not_hold_yet_and_then_nothing(watched: Watched) -> None:
    stream = watched.stream(batch_size=1)
    for _ in stream.epochs(3):
        list(stream)
    held = set[int]()
    for kind, numbers in watched.said:
        assert not held & set(numbers)
        held.update(numbers if kind == "verify" else [])
    assert len(watched.all_of("ahead")) == SHARDS + 1
    assert watched.all_of("ahead")[-1] == []


def test_it_is_looked_at_about_once_a_second_and_for_each_new_shard(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookahead, "_EVERY_S", 0.2)
    looks: list[int] = []
    look = Reading.shards_ahead

    def counted(self: Reading, epoch: int, batch: int, *, limit: int | None) -> list[int]:
        looks.append(batch)
        return look(self, epoch, batch, limit=limit)

    monkeypatch.setattr(Reading, "shards_ahead", counted)
    began = time.monotonic()
    stream = watched.stream(shuffle=False, batch_size=1)
    for _ in stream:
        time.sleep(0.02)
    assert SHARDS <= len(looks) <= 2 + SHARDS + (time.monotonic() - began) / 0.2


def test_a_window_may_be_as_large_as_bytes_allow(watched: Watched) -> None:
    limit = 3 * watched.index.file.shards[0].bytes
    for _ in watched.stream(shuffle="window", window=Window(limit, "bytes")):
        assert maps(watched.layout) <= 3
