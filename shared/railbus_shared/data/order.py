"""The order of samples as pure functions: the same on every machine, for every number of processes.

An epoch's order is a function of the selected samples, the seed, the epoch and the algorithm: `sequential` is the order
of the files, `global` shuffles all samples, `window` shuffles within a few shards at a time. Any place can be asked for
by itself at the same cost, so resuming costs nothing; no table over samples is kept. Batches are cut out of that order
first, and a batch is shared by ranks last, so every world size reads the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, Protocol, assert_never

import numpy as np

from railbus_shared.data.bijection import Positions, remembered
from railbus_shared.data.selection import Selection
from railbus_shared.data.shards import MOST_WALKED, ShardPlaces, Shards, by_first_need
from railbus_shared.data.window import Window, WindowOrder

__all__ = [
    "Algorithm",
    "EpochOrder",
    "Order",
    "Positions",
    "SelectedOrder",
    "Window",
    "epoch_order",
    "num_batches",
    "rank_range",
    "shards_ahead",
    "worker_batches",
]

Algorithm = Literal["sequential", "global", "window"]

_DEFAULT_WINDOW: Final = Window()
_WALKED: Final = 4096
"""Places looked at together for shards that a global shuffle needs next."""


class Order(Protocol):
    """The samples of an epoch, one after the other."""

    @property
    def num_samples(self) -> int: ...

    def positions(self, start: int, stop: int) -> Positions:
        """Samples of the dataset at places start..stop-1 of the epoch, int64 (stop - start,).

        Raises ValueError for places that the epoch does not have.
        """
        ...

    def shards_from(self, place: int) -> Iterator[int]:
        """Numbers of the shards in the order in which they are first needed from a place on, reckoned as they come."""
        ...


def epoch_order(
    algorithm: Algorithm,
    *,
    shards: Shards,
    selection: Selection,
    seed: int,
    epoch: int,
    window: Window = _DEFAULT_WINDOW,
) -> Order:
    """The order of the selected samples in one epoch; the window counts for that algorithm only.

    With all samples of a split in one run, `global` is `EpochOrder` from the split's first sample on.
    """
    match algorithm:
        case "sequential" | "global":
            order = EpochOrder(selection.num_samples, seed, epoch, shuffle=algorithm == "global")
            return SelectedOrder(order, selection, shards)
        case "window":
            return WindowOrder(selection, shards, seed, epoch, window)
        case _:
            assert_never(algorithm)


def shards_ahead(order: Order, place: int, *, limit: int | None = None) -> list[int]:
    """The shards that are needed from a place on, in the order of first need, at most `limit` of them.

    Exact for `sequential`. A shuffle, or each window of one, is looked through for 131,072 places; shards that none of
    them needs follow behind, and one that has been read whole may be among them.
    """
    return list(islice(order.shards_from(place), limit))


@dataclass(frozen=True)
class EpochOrder:
    """The order of `num_samples` samples in one epoch, counted from 0."""

    num_samples: int
    seed: int
    epoch: int
    shuffle: bool = True

    def positions(self, start: int, stop: int) -> Positions:
        """Samples at places start..stop-1 of the epoch, int64 (stop - start,).

        Cost is linear in their number, with some 0.02 ms a call on top when shuffled: ask for thousands at once.
        Raises ValueError for places that the epoch does not have.
        """
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"places {start} to {stop} asked for, of {self.num_samples}")
        places = np.arange(start, stop, dtype=np.int64)
        return remembered(self.num_samples, self.seed, self.epoch)(places) if self.shuffle else places


@dataclass(frozen=True, eq=False)
class SelectedOrder:
    """Selected samples of a dataset: all shuffled together, or in the order of the files."""

    order: EpochOrder
    selection: Selection
    shards: Shards

    @property
    def num_samples(self) -> int:
        return self.order.num_samples

    def positions(self, start: int, stop: int) -> Positions:
        """See `Order`."""
        return self.selection.samples(self.order.positions(start, stop))

    def shards_from(self, place: int) -> Iterator[int]:
        """See `shards_ahead`."""
        places = ShardPlaces.of(self.shards, self.selection)
        if self.order.shuffle:
            yield from self._shuffled_from(place, places)
        else:
            yield from places.numbers[places.starts + places.counts > place].tolist()

    def _shuffled_from(self, place: int, places: ShardPlaces) -> Iterator[int]:
        known: set[int] = set()
        end = min(place + MOST_WALKED, self.num_samples)
        for start in range(place, end, _WALKED):
            if len(known) == len(places.numbers):
                return
            samples = self.positions(start, min(start + _WALKED, end))
            yield from by_first_need(self.shards.numbers_of(samples), known=known)
        if end < self.num_samples:
            yield from (number for number in places.numbers.tolist() if number not in known)


def num_batches(num_samples: int, *, batch_size: int, drop_last: bool) -> int:
    """Global batches in an epoch."""
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def rank_range(batch: int, *, num_samples: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Places start..stop-1 of the epoch that a rank reads in a global batch of `batch_size` samples.

    The ranks' parts side by side are the global batch, for every world size that divides it. A last batch that is
    short is split as evenly as it goes, so a rank's part of it may be empty.
    Raises ValueError if `world_size` does not divide `batch_size`, or there is no such rank or batch.
    Source: the global order comes first and is cut by rank last, as in mosaicml/streaming partition/orig.py.
    """
    if batch_size % world_size:
        raise ValueError(f"world_size {world_size} does not divide batch_size {batch_size}")
    if not (0 <= rank < world_size and 0 <= batch * batch_size < num_samples):
        raise ValueError(f"no part of batch {batch} of {num_samples} samples for rank {rank} of {world_size}")
    first = batch * batch_size
    size = min(batch_size, num_samples - first)
    return first + size * rank // world_size, first + size * (rank + 1) // world_size


def worker_batches(start: int, stop: int, *, worker: int, num_workers: int) -> range:
    """Which of the global batches start..stop-1 a worker of a rank makes.

    Taking one from each worker in turn, beginning with worker 0, gives them in order, for every number of workers; it
    is what torch's DataLoader does. Raises ValueError for a worker that is not there.
    """
    if not 0 <= worker < num_workers:
        raise ValueError(f"there is no worker {worker} of {num_workers}")
    return range(start + worker, stop, num_workers)
