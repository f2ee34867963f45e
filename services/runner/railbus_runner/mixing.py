"""`open_mixture`: several datasets read as one, by weights, in batches like those of one.

What stands at a place of the mixture is decided by `railbus_shared.data.mixture`, and the order within a source is that
of its own stream with the same seed, epoch after epoch. Shards of all sources are numbered one source after the other,
so a batch is gathered in order as if they were one dataset's. Invariants:

- the global batches are the same for every world size that divides the batch size;
- epoch e + 1 of the mixture goes on where epoch e ended, in all sources;
- a batch has the columns that all sources have, and `source`: the number of each sample's source, as they were given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, get_args

import numpy as np
import torch

from railbus_runner.driving import BatchStream
from railbus_runner.gathering import Batch, Gatherer
from railbus_runner.opening import Dataset, open_dataset
from railbus_runner.pipeline import Transform
from railbus_runner.places import Part, Places
from railbus_runner.reading import Reading, Shuffle, algorithm_of, check_same, window_of
from railbus_runner.shards import HeldShards, OpenShards, VouchedShards
from railbus_runner.staging import Here, Staging, ToCuda
from railbus_runner.transforming import Wanted, Workers
from railbus_shared.data.mixture import ENDLESS, Mixture, Stop
from railbus_shared.data.order import Positions, Window, num_batches
from railbus_shared.data.readers import ShardReader
from railbus_shared.errors import InvalidField

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyColumn

SOURCE: Final = "source"
"""The column that tells where a sample comes from."""
_VERSION: Final = 1

AnySource = TypeVar("AnySource", bound=str | Path | Dataset)


def open_mixture(  # noqa: PLR0913 - what a stream is made of
    sources: Mapping[AnySource, float] | Sequence[tuple[AnySource, float]],
    *,
    split: str | None = None,
    batch_size: int,
    seed: int = 0,
    stop: Stop = "first",
    shuffle: Shuffle = True,
    window: int | Window = 8,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
    workers: int = 0,
) -> MixtureStream:
    """Batches from several datasets, in proportion to their weights.

    Args:
        sources: datasets, or what `open_dataset` opens, each with its weight; only the weights' proportions count.
        split: of every source; the one that a dataset was opened with unless given.
        batch_size: samples of all ranks together.
        seed: of the mixture, and of the shuffles.
        stop: an epoch ends when the `first` source has been read once, when every one has (`longest`), or `never`.
        shuffle: all samples of a source, those of a few shards at a time, or not at all; see `ShardStream`.
        window: shards of a source that are shuffled together where `shuffle` is `window`.
        rank: which part of each batch is read here.
        world_size: how many parts there are.
        device: of the tensors.
        transform: what is made of a batch, before it goes to the device.
        workers: processes that gather and transform, in the same order; `transform` must be importable then.

    Raises InvalidField for a setting that does not fit, or columns that do not; NotFound for a split; what
    `open_dataset` raises.
    """
    pairs = list(sources.items() if isinstance(sources, Mapping) else sources)
    datasets = [one if isinstance(one, Dataset) else open_dataset(one) for one, _ in pairs]
    readings = tuple(
        Reading(
            dataset.index,
            split=dataset.chosen(split),
            batch_size=batch_size,
            seed=seed,
            algorithm=algorithm_of(shuffle),
            window=window_of(window),
            drop_last=False,
            ranges=(),
        )
        for dataset in datasets
    )
    reading = MixedReading(readings, _mixture([weight for _, weight in pairs], readings, seed=seed, stop=stop))
    for one in readings:
        one.check(world_size=world_size)
    makes = MixedPipeline(
        reading,
        datasets,
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        transform=transform,
        workers=workers,
    )
    return MixtureStream(reading, makes)


@dataclass(frozen=True)
class MixedReading:
    """What is read of several datasets and in which order; a position belongs to it. There is at least one source."""

    sources: tuple[Reading, ...]
    mixture: Mixture

    @property
    def batch_size(self) -> int:
        """Samples of all ranks together."""
        return self.sources[0].batch_size

    @property
    def num_samples(self) -> int:
        """Places of an epoch."""
        return self.mixture.num_samples

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch."""
        return num_batches(self.num_samples, batch_size=self.batch_size, drop_last=False)

    @property
    def firsts(self) -> list[int]:
        """The number that the first shard of each source has among those of all."""
        return list(accumulate((len(one.index.shard_map.shards) for one in self.sources[:-1]), initial=0))

    def locate(self, epoch: int, start: int, stop: int) -> tuple[Positions, Positions]:
        """The shards, numbered over all sources, and the rows in them, at places `start` to `stop - 1` of an epoch."""
        before, firsts = epoch * self.num_samples, self.firsts
        numbers, rows = np.empty((2, stop - start), dtype=np.int64)
        for span in self.mixture.spans(before + start, before + stop):
            shards, within = self.sources[span.source].locate(span.epoch, span.start, span.stop)
            numbers[span.at], rows[span.at] = shards + firsts[span.source], within
        return numbers, rows

    def identity(self) -> dict[str, Any]:
        """What a position belongs to, in plain values."""
        of_sources = {
            f"sources.{number}.{name}": value
            for number, one in enumerate(self.sources)
            for name, value in one.identity().items()
        }
        shares: list[int] = self.mixture.counts.tolist()
        return {"version": _VERSION, "shares": shares, "stop": self.mixture.stop, **of_sources}

    def check_identity(self, state: Mapping[str, Any]) -> None:
        """Raises InvalidField, naming both values, if a position belongs to something else."""
        check_same(self.identity(), state)


class MixtureStream(BatchStream):
    """Several datasets in batches; iterating gives what is left of the current epoch."""

    def __init__(self, reading: MixedReading, pipeline: MixedPipeline) -> None:
        super().__init__(reading, pipeline, on_batch=lambda: None)
        self._is_endless = reading.num_samples == ENDLESS

    @property
    def num_batches(self) -> int | None:
        """Global batches in an epoch; None if it never ends."""
        return None if self._is_endless else self._num_batches

    def __len__(self) -> int:
        """Batches that iterating would give now. Raises TypeError if there is no end to them."""
        if self._is_endless:
            raise TypeError("a mixture that never stops has no length")
        return super().__len__()


class MixedPipeline:
    """Makes the batches of one rank, in the thread that asks for them or in worker processes."""

    def __init__(
        self,
        reading: MixedReading,
        datasets: Sequence[Dataset],
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        transform: Transform | None,
        workers: int,
    ) -> None:
        """Raises InvalidField for columns that do not fit each other, or a transform that workers cannot import."""
        self._reading, self._datasets = reading, datasets
        self._rank, self._world_size, self._transform = rank, world_size, transform
        self._places = Places(reading, rank=rank, world_size=world_size)
        is_cuda = device.type == "cuda"
        self._staging: Staging = ToCuda(device) if is_cuda else Here()
        columns = shared_columns([dataset.index.about.columns for dataset in datasets])
        firsts = reading.firsts
        self._vouched = Numbered([VouchedShards(ensure_verified=one.ensure_verified) for one in datasets], firsts)
        gathers = GathersMixed(datasets, firsts, columns, is_pinned=is_cuda and transform is None and not workers)
        self._workers = Workers(gathers, transform=transform, count=workers) if workers else None
        self._gathers = gathers

    def batches(self, epoch: int, numbers: range, *, epochs: int) -> Iterator[Any]:  # noqa: ARG002 - nothing is fetched ahead
        """Batches of an epoch by their numbers."""
        wanted = self._wanted(epoch, numbers)
        if self._workers is not None:
            return self._staging.staged(self._workers.batches(wanted))
        return self._staging.staged(map(self._made, wanted))

    def copied(self) -> MixedPipeline:
        """For another process, which verifies and opens shards by itself."""
        return MixedPipeline(
            self._reading,
            self._datasets,
            rank=self._rank,
            world_size=self._world_size,
            device=torch.device("cpu"),
            transform=self._transform,
            workers=0,
        )

    def _wanted(self, epoch: int, numbers: range) -> Iterator[Wanted]:
        for number in numbers:
            part = self._places.part(epoch, number)
            self._vouched.hold(shard for shard, _, _ in part.segments)
            yield Wanted(part, None)

    def _made(self, wanted: Wanted) -> Any:
        batch = self._gathers.gather(wanted)
        return batch if self._transform is None else self._transform(batch)


class GathersMixed:
    """`Gathers` from all sources; their shards have been verified."""

    def __init__(
        self, datasets: Sequence[Dataset], firsts: Sequence[int], columns: Mapping[str, AnyColumn], *, is_pinned: bool
    ) -> None:
        self._sources = [(dataset.index, dataset.paths) for dataset in datasets]
        self._firsts, self._columns, self._is_pinned = firsts, columns, is_pinned

    def gather(self, wanted: Wanted) -> Batch:
        return {**self._gatherer.gather(wanted.part), SOURCE: self._source_of(wanted.part)}

    @cached_property
    def _gatherer(self) -> Gatherer:
        shards = [OpenShards(index, paths, ensure_verified=lambda _: None) for index, paths in self._sources]
        return Gatherer(self._columns, _MixedShards(shards, self._firsts), is_pinned=self._is_pinned)

    def _source_of(self, part: Part) -> torch.Tensor:
        sources = np.empty(len(part.rows), dtype=np.int64)
        for shard, begin, end in part.segments:
            sources[begin:end] = bisect_right(self._firsts, shard) - 1
        return torch.from_numpy(sources if part.back is None else sources[part.back])


AnyShards = TypeVar("AnyShards", bound=HeldShards)


class Numbered(Generic[AnyShards]):
    """The shards of all sources, numbered one source after the other; none is let go of again."""

    def __init__(self, sources: Sequence[AnyShards], firsts: Sequence[int]) -> None:
        self._sources = sources
        self._firsts = firsts
        self._held: set[int] = set()

    def hold(self, numbers: Iterable[int]) -> list[int]:
        """Have shards held that are not yet; those. Raises what keeps one from being read."""
        new = sorted({*numbers} - self._held)
        for number in new:
            shards, within = self.place(number)
            shards.hold([within])
            self._held.add(number)
        return new

    def place(self, number: int) -> tuple[AnyShards, int]:
        """The shards of a source, and the number of one among them."""
        source = bisect_right(self._firsts, number) - 1
        return self._sources[source], number - self._firsts[source]


class _MixedShards:
    """`Readable` shards of all sources."""

    def __init__(self, sources: Sequence[OpenShards], firsts: Sequence[int]) -> None:
        self._shards = Numbered(sources, firsts)
        self.readers: dict[int, ShardReader] = {}

    def hold(self, numbers: Iterable[int]) -> None:
        for number in self._shards.hold(numbers):
            shards, within = self._shards.place(number)
            self.readers[number] = shards.readers[within]


def shared_columns(sources: Sequence[Mapping[str, AnyColumn]]) -> dict[str, AnyColumn]:
    """The columns that every source has, in the order of the first.

    Raises InvalidField for one that differs in dtype, shape or kind of length, if there is none, and if one is called
    what the column of sources is.
    """
    first = sources[0]
    shared = {name: column for name, column in first.items() if all(name in columns for columns in sources)}
    for name, column in shared.items():
        for number, columns in enumerate(sources):
            if _kind(columns[name]) != _kind(column):
                raise InvalidField(
                    field=f"columns.{name}",
                    value=_kind(columns[name]),
                    problem=f"source {number} has it so, and source 0 as {_kind(column)}",
                    hint="convert or rename the column in one of the datasets",
                )
    if not shared or SOURCE in shared:
        raise InvalidField(
            field="columns",
            value=sorted(shared),
            problem=f"a mixture needs a column that all sources have, and gives {SOURCE!r} itself",
            hint="rename columns of the datasets",
        )
    return shared


def _kind(column: AnyColumn) -> str:
    shape = f"{column.dtype} {list(column.shape)}"
    return f"{shape} of variable length" if column.variable_length else shape


def _mixture(weights: Sequence[float], readings: Sequence[Reading], *, seed: int, stop: Stop) -> Mixture:
    if stop not in get_args(Stop):
        raise InvalidField(
            field="stop", value=stop, problem="no such end", hint=f"use one of {', '.join(get_args(Stop))}"
        )
    try:
        return Mixture.of(weights, sizes=[one.num_samples for one in readings], seed=seed, stop=stop)
    except ValueError as exc:
        raise InvalidField(
            field="sources", value=list(weights), problem=str(exc), hint="give each source a weight above 0"
        ) from exc
