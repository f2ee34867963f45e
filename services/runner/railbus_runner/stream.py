"""`ShardStream`: batches of a split as torch tensors, gathered from mapped shards.

The order is a function of (seed, epoch, split, samples), the same for every world size that divides the batch size and
for any number of workers. A run goes on at the very next sample; `driving` tells what the state means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from railbus_runner.driving import BatchStream
from railbus_runner.gathering import Batch
from railbus_runner.lookahead import OnAhead, unheard
from railbus_runner.pipeline import Pipeline, Route, Transform
from railbus_runner.reading import Ranges, Reading, Shuffle, algorithm_of, window_of
from railbus_runner.shards import EnsureVerified
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Window

__all__ = ["Batch", "ShardStream"]


class ShardStream(BatchStream):
    """One split of a dataset, in batches; iterating gives what is left of the current epoch."""

    def __init__(  # noqa: PLR0913 - what a stream is made of
        self,
        index: DatasetIndex,
        shard_paths: Mapping[int, Path],
        *,
        split: str,
        batch_size: int,
        seed: int,
        shuffle: Shuffle = True,
        window: int | Window = 8,
        ranges: Ranges = (),
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        transform: Transform | None = None,
        workers: int = 0,
        is_fetched: bool = False,
        ensure_verified: EnsureVerified,
        on_batch: Callable[[], None] = lambda: None,
        on_ahead: OnAhead = unheard,
    ) -> None:
        """A stream at the beginning of epoch 0.

        Args:
            index: of the dataset.
            shard_paths: of every shard, by its number.
            split: its name.
            batch_size: samples of all ranks together.
            seed: of the shuffles.
            shuffle: all samples of the split (`global`, or True), those of a few shards at a time, or not at all.
            window: shards that are shuffled together where `shuffle` is `window`.
            ranges: samples of the split that alone are read.
            drop_last: leave out a last batch that is short.
            rank: which part of each batch is read here.
            world_size: how many parts there are.
            device: of the tensors; the CPU unless given.
            transform: what is made of a batch, before it goes to the device.
            workers: processes that gather and transform; none unless given.
            is_fetched: whether shards come from elsewhere and leave again; a copy in another process cannot have them.
            ensure_verified: called with the numbers of shards before any of them is read for the first time.
            on_batch: called before each batch.
            on_ahead: called with the shards that are needed next, and with those that were closed.

        Raises InvalidField for a setting that does not fit, NotFound for a split.
        """
        reading = Reading(
            index,
            split=split,
            batch_size=batch_size,
            seed=seed,
            algorithm=algorithm_of(shuffle),
            window=window_of(window),
            drop_last=drop_last,
            ranges=tuple((start, stop) for start, stop in ranges),
        )
        reading.check(world_size=world_size)
        route = Route(
            shard_paths,
            rank=rank,
            world_size=world_size,
            device=device or torch.device("cpu"),
            transform=transform,
            workers=workers,
            is_fetched=is_fetched,
            ensure_verified=ensure_verified,
            on_ahead=on_ahead,
        )
        super().__init__(reading, Pipeline(reading, route), on_batch=on_batch)

    @property
    def num_batches(self) -> int:
        """Global batches in an epoch."""
        return self._num_batches
