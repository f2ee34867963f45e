"""Where the samples of every batch lie: the order of an epoch, cut by rank, as rows of shards.

The arithmetic is done for some thousand samples at once, for doing it batch by batch took longer than all the rest of a
batch. A part lists its rows shard by shard, so that each shard is asked once, and says how they get back into order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np

from railbus_shared.data.order import Positions, rank_range

_TOGETHER: Final = 4096
"""Samples whose places are reckoned together."""


Segment = tuple[int, int, int]
"""A shard, and which rows of a part lie in it: from the first to before the last. A plain tuple: many are made."""


class Part(NamedTuple):
    """One rank's share of a batch."""

    rows: Positions
    """Within their shards, shard by shard."""
    segments: tuple[Segment, ...]
    back: Positions | None
    """Which of `rows` is the first sample of the batch, the second, and so on; None if they are in order already."""


class Located(Protocol):
    """Samples in global batches, and where they lie."""

    @property
    def batch_size(self) -> int: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def num_batches(self) -> int: ...

    def locate(self, epoch: int, start: int, stop: int) -> tuple[Positions, Positions]:
        """The shards, and the rows in them, of what stands at places `start` to `stop - 1` of an epoch."""
        ...


@dataclass(frozen=True)
class _Block:
    """The parts of some batches in a row."""

    epoch: int
    first: int
    parts: list[Part]


class Places:
    """The parts of a rank; asked for in a row they cost a few microseconds each."""

    def __init__(self, reading: Located, *, rank: int, world_size: int) -> None:
        self._reading = reading
        self._rank, self._world_size = rank, world_size
        self._block = _Block(-1, 0, [])

    def part(self, epoch: int, batch: int) -> Part:
        """This rank's share of a global batch; without rows where a short last batch has none for it."""
        block = self._block
        if epoch != block.epoch or not 0 <= batch - block.first < len(block.parts):
            block = self._block = self._reckon(epoch, batch)
        return block.parts[batch - block.first]

    def _reckon(self, epoch: int, first: int) -> _Block:
        """The block that begins with a batch."""
        reading = self._reading
        count = min(max(1, _TOGETHER // reading.batch_size), reading.num_batches - first)
        ranges = [self._range(batch) for batch in range(first, first + count)]
        start = first * reading.batch_size
        numbers, rows = reading.locate(epoch, start, min(start + count * reading.batch_size, reading.num_samples))
        if self._world_size > 1:
            numbers, rows = (
                np.concatenate([each[begin - start : end - start] for begin, end in ranges]) for each in (numbers, rows)
            )
        cuts = np.zeros(count + 1, np.int64)
        np.cumsum([end - begin for begin, end in ranges], out=cuts[1:])
        return _Block(epoch, first, _parts(numbers, rows, cuts))

    def _range(self, batch: int) -> tuple[int, int]:
        return rank_range(
            batch,
            num_samples=self._reading.num_samples,
            batch_size=self._reading.batch_size,
            rank=self._rank,
            world_size=self._world_size,
        )


def _parts(numbers: Positions, rows: Positions, cuts: Positions) -> list[Part]:
    """Samples cut into batches at `cuts`, each sorted by shard."""
    bounds: list[int] = cuts.tolist()
    if not len(numbers) or numbers.min() == numbers.max():
        shard = int(numbers[0]) if len(numbers) else 0
        return [
            Part(rows[begin:end], ((shard, 0, end - begin),) if end > begin else (), None)
            for begin, end in itertools.pairwise(bounds)
        ]
    batches = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    keys = batches * (int(numbers.max()) + 1) + numbers
    order = np.argsort(keys, kind="stable")
    places = np.arange(len(order))
    back = np.empty_like(order)
    back[order] = places
    moved = set(batches[np.flatnonzero(order != places)].tolist())
    back -= cuts[batches]
    numbers, rows, keys = numbers[order], rows[order], keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    segments = _segments(numbers[starts].tolist(), starts.tolist(), bounds)
    return [
        Part(rows[begin:end], segments[batch], back[begin:end] if batch in moved else None)
        for batch, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]


def _segments(shards: list[int], starts: list[int], bounds: list[int]) -> list[tuple[Segment, ...]]:
    """The segments of each batch, counted from where it begins; each ends where the next one of all begins."""
    found: list[list[Segment]] = [[] for _ in bounds[:-1]]
    ends = [*starts[1:], bounds[-1]]
    batch = 0
    for shard, start, end in zip(shards, starts, ends, strict=True):
        while start >= bounds[batch + 1]:
            batch += 1
        found[batch].append((shard, start - bounds[batch], end - bounds[batch]))
    return [tuple(segments) for segments in found]
