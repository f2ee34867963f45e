"""`ShardStream`: batches of a split as torch tensors, gathered from mapped shards.

The order is a function of (seed, epoch, split, samples), the same for every world size that divides the batch size.
The state counts batches, so a run goes on at the very next sample: a state taken after the k-th batch of an epoch goes
on with batch k+1; one taken after the last batch goes on with that epoch's end, so that what follows an epoch in the
caller's loop runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from railbus_runner.gathering import Batch, Gatherer, Rows
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import EpochOrder, num_batches, rank_range
from railbus_shared.errors import InvalidField

_VERSION: Final = 1
_TOGETHER: Final = 4096
"""Samples whose places are reckoned together: doing it for each batch took 0.3 ms, more than all the rest of one."""


@dataclass(frozen=True)
class _Block:
    """Where some samples in a row of an epoch lie, from place `first` on."""

    epoch: int
    first: int
    where: Rows

    def cut(self, start: int, stop: int) -> Rows:
        begin, end = start - self.first, stop - self.first
        return Rows(self.where.numbers[begin:end], self.where.rows[begin:end])

    def holds(self, epoch: int, start: int, stop: int) -> bool:
        return epoch == self.epoch and self.first <= start and stop <= self.first + len(self.where.rows)


class ShardStream:
    """One split of a dataset, in batches; iterating gives what is left of the current epoch.

    Inside `epochs` the stream goes to the next epoch with it; otherwise a pass after a complete one is the next epoch.
    """

    def __init__(  # noqa: PLR0913 - what a stream is made of
        self,
        index: DatasetIndex,
        shard_paths: Mapping[int, Path],
        *,
        split: str,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        ensure_verified: Callable[[Sequence[int]], None],
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """A stream at the beginning of epoch 0.

        `ensure_verified` is called with the numbers of shards before any of them is read for the first time, and
        `on_batch` before each batch. Raises InvalidField for a batch size that does not fit, NotFound for a split.
        """
        self._index = index
        self._split = index.split(split)
        _check_batch_size(batch_size, world_size=world_size, samples=self._split.samples, drop_last=drop_last)
        self._identity: dict[str, Any] = {
            "version": _VERSION,
            "index_sha256": index.sha256,
            "split": split,
            "num_samples": self._split.samples,
            "seed": seed,
            "batch_size": batch_size,
            "shuffle": shuffle,
            "drop_last": drop_last,
        }
        self._rank, self._world_size = rank, world_size
        self._on_batch = on_batch
        self._gatherer = Gatherer(
            index, shard_paths, device=device or torch.device("cpu"), ensure_verified=ensure_verified
        )
        self._block: _Block | None = None
        self._batches_done = 0
        self._is_driven = False  # by `epochs`
        self._is_spent = False  # an epoch has ended, and `epochs` will not go on to the next
        self.epoch = 0

    @property
    def num_batches(self) -> int:
        """Global batches in an epoch."""
        ident = self._identity
        return num_batches(self._split.samples, batch_size=ident["batch_size"], drop_last=ident["drop_last"])

    @property
    def samples_seen(self) -> int:
        """By all ranks together, over all epochs."""
        size: int = self._identity["batch_size"]
        per_epoch: int = min(self.num_batches * size, self._split.samples)
        return self.epoch * per_epoch + min(self._batches_done * size, self._split.samples)

    def epochs(self, count: int) -> Iterator[int]:
        """Numbers of the epochs up to `count`, from the current one on; the stream moves on with them.

        After a resume the first may have few batches left, or none.
        """
        self._is_driven, self._is_spent = True, False
        try:
            while self.epoch < count:
                yield self.epoch
                self._advance()
        finally:
            self._is_driven = False

    def __len__(self) -> int:
        """Batches that iterating would give now."""
        return self.num_batches - (0 if self._is_spent else self._batches_done)

    def __iter__(self) -> Iterator[Batch]:
        """What is left of the current epoch: a map from column to a tensor (batch, *shape) on the stream's device.

        A tensor is the caller's to keep. With several ranks the last batch may be empty on some of them.
        """
        if self._is_spent:
            self._advance()
        while self._batches_done < self.num_batches:
            self._on_batch()
            batch = self._gatherer.gather(self._located(self._batches_done))
            self._batches_done += 1
            yield batch
        self._is_spent = not self._is_driven

    def _advance(self) -> None:
        self.epoch += 1
        self._batches_done = 0
        self._is_spent = False

    def state_dict(self) -> dict[str, Any]:
        """The position and what it belongs to; plain values."""
        return {
            **self._identity,
            "epoch": self.epoch,
            "batches_done": self._batches_done,
            "samples_seen": self.samples_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; raises InvalidField if it is none, or belongs to another dataset, split, seed or batch."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InvalidField(
                    field=f"stream.{name}",
                    value=state.get(name),
                    problem=f"the stream has {value!r}, so the position means nothing here",
                    hint="resume with the dataset, seed and parameters that the checkpoint was made with",
                )
        epoch = _count(state, "epoch")
        self._batches_done = _count(state, "batches_done", limit=self.num_batches)
        self.epoch, self._is_spent = epoch, False

    def _located(self, batch: int) -> Rows:
        """Where this rank's samples of a global batch lie."""
        size: int = self._identity["batch_size"]
        start, stop = rank_range(
            batch,
            num_samples=self._split.samples,
            batch_size=size,
            rank=self._rank,
            world_size=self._world_size,
        )
        if self._block is None or not self._block.holds(self.epoch, start, stop):
            self._block = self._block_from(batch * size, max(size, _TOGETHER // size * size))
        return self._block.cut(start, stop)

    def _block_from(self, first: int, count: int) -> _Block:
        ident = self._identity
        order = EpochOrder(self._split.samples, ident["seed"], self.epoch, shuffle=ident["shuffle"])
        places = order.positions(first, min(first + count, self._split.samples))
        return _Block(self.epoch, first, Rows(*self._index.locate(self._split.first + places)))


def _count(state: Mapping[str, Any], name: str, *, limit: int | None = None) -> int:
    """A number of a state; raises InvalidField if it is none from 0 to `limit`."""
    value = state.get(name)
    if type(value) is not int or value < 0 or (limit is not None and value > limit):
        raise InvalidField(
            field=f"stream.{name}",
            value=value,
            problem="not a whole number from 0" + ("" if limit is None else f" to {limit}"),
            hint="the state is damaged: resume from an older checkpoint",
        )
    return value


def _check_batch_size(batch_size: int, *, world_size: int, samples: int, drop_last: bool) -> None:
    """Raises InvalidField for a batch that cannot be shared by the ranks, or that leaves nothing of the split."""
    if batch_size < 1 or batch_size % world_size:
        raise InvalidField(
            field="batch_size",
            value=batch_size,
            problem=f"not a positive multiple of the world size {world_size}",
            hint="batch_size counts the samples of all ranks together",
        )
    if drop_last and batch_size > samples:
        raise InvalidField(
            field="batch_size",
            value=batch_size,
            problem=f"the split has {samples} samples, so dropping the last batch leaves none",
            hint="use a smaller batch, or keep the last one",
        )
