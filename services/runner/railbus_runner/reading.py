"""`Reading`: what is read of a dataset and in which order; the part of a stream that its position belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Algorithm, Order, Positions, Window, epoch_order, num_batches, shards_ahead
from railbus_shared.data.selection import Selection
from railbus_shared.data.shards import Shards
from railbus_shared.errors import InvalidField

Shuffle = bool | Literal["global", "window"]
"""True is `global`."""
Ranges = Sequence[tuple[int, int]]
"""Samples `start` to `stop - 1` of a split, counted from its beginning."""

_VERSION: Final = 1
_ORDERS: Final = 2
"""That are remembered: of this epoch and of the next."""


@dataclass(frozen=True)
class Reading:
    """Some samples of a split, in global batches, in an order that depends on seed and epoch alone."""

    index: DatasetIndex
    split: str
    batch_size: int
    """Samples of all ranks together."""
    seed: int
    algorithm: Algorithm
    window: Window
    """Of the algorithm `window`."""
    drop_last: bool
    ranges: tuple[tuple[int, int], ...]
    """Of the split; all of it if None are given."""
    _orders: dict[int, Order] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        """Of an epoch, those of a dropped batch included."""
        return self.selection.num_samples

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch."""
        return num_batches(self.num_samples, batch_size=self.batch_size, drop_last=self.drop_last)

    @cached_property
    def selection(self) -> Selection:
        """The samples that are read. Raises NotFound for the split, InvalidField for ranges outside of it."""
        split = Selection.of_split(self.index.split(self.split))
        try:
            selected = split.at(self.ranges) if self.ranges else split
        except ValueError as exc:
            raise _bad_ranges(self.ranges, str(exc)) from exc
        if not selected.num_samples:
            raise _bad_ranges(self.ranges, "they hold no sample")
        return selected

    def order(self, epoch: int) -> Order:
        """The samples of an epoch, one after the other."""
        if epoch not in self._orders:
            while len(self._orders) >= _ORDERS:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = epoch_order(
                self.algorithm,
                shards=self._shards,
                selection=self.selection,
                seed=self.seed,
                epoch=epoch,
                window=self.window,
            )
        return self._orders[epoch]

    def samples(self, epoch: int, start: int, stop: int) -> Positions:
        """Samples of the dataset at places `start` to `stop - 1` of an epoch."""
        return self.order(epoch).positions(start, stop)

    def locate(self, epoch: int, start: int, stop: int) -> tuple[Positions, Positions]:
        """The shards that these samples lie in, and their rows there."""
        return self.index.locate(self.samples(epoch, start, stop))

    def shards_ahead(self, epoch: int, batch: int, *, limit: int | None) -> list[int]:
        """The shards that are needed from a batch on, in the order of their first need."""
        return shards_ahead(self.order(epoch), min(batch * self.batch_size, self.num_samples), limit=limit)

    @cached_property
    def _shards(self) -> Shards:
        shards = self.index.shard_map.shards
        return Shards.of((shard.samples for shard in shards), sizes_bytes=[shard.bytes for shard in shards])

    def check(self, *, world_size: int) -> None:
        """Raises InvalidField for a batch that the ranks cannot share, or that leaves nothing; see `selection`."""
        samples = self.selection.num_samples
        if self.batch_size < 1 or self.batch_size % world_size:
            raise InvalidField(
                field="batch_size",
                value=self.batch_size,
                problem=f"not a positive multiple of the world size {world_size}",
                hint="batch_size counts the samples of all ranks together",
            )
        if self.drop_last and self.batch_size > samples:
            raise InvalidField(
                field="batch_size",
                value=self.batch_size,
                problem=f"there are {samples} samples, so dropping the last batch leaves none",
                hint="use a smaller batch, or keep the last one",
            )

    def identity(self) -> dict[str, Any]:
        """What a position belongs to, in plain values."""
        is_window = self.algorithm == "window"
        return {
            "version": _VERSION,
            "dataset": self.index.about.name,
            "dataset_version": self.index.shard_map.version,
            "index_sha256": self.index.sha256,
            "split": self.split,
            "ranges": [list(one) for one in self.ranges],
            "num_samples": self.num_samples,
            "seed": self.seed,
            "order": self.algorithm,
            "window": [self.window.limit, self.window.unit] if is_window else None,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
        }

    def check_identity(self, state: Mapping[str, Any]) -> None:
        """Raises InvalidField, naming both values, if a position belongs to something else."""
        check_same(self.identity(), state)


def check_same(identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises InvalidField, naming both values, if a position belongs to something else."""
    for name, value in identity.items():
        if name not in state or state[name] != value:
            raise InvalidField(
                field=f"stream.{name}",
                value=state.get(name),
                problem=f"the stream has {value!r}, so the position means nothing here",
                hint="resume with the dataset, seed and parameters that the checkpoint was made with",
            )


def algorithm_of(shuffle: Shuffle) -> Algorithm:
    """Raises InvalidField for a shuffle that is none."""
    if isinstance(shuffle, bool):
        return "global" if shuffle else "sequential"
    if shuffle not in {"global", "window"}:
        raise InvalidField(
            field="shuffle", value=shuffle, problem="no such shuffle", hint="use True, False, 'global' or 'window'"
        )
    return shuffle


def window_of(window: int | Window) -> Window:
    """So many shards, if it is a number. Raises InvalidField for a window that is none."""
    try:
        return Window(window) if isinstance(window, int) else window
    except ValueError as exc:
        raise InvalidField(
            field="window", value=str(window), problem=str(exc), hint="give the number of shards to shuffle together"
        ) from exc


def _bad_ranges(ranges: Ranges, problem: str) -> InvalidField:
    return InvalidField(
        field="ranges",
        value=str(ranges),
        problem=problem,
        hint="give pairs (start, stop) of samples of the split, counted from 0",
    )
