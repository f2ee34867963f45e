"""Where shards end: the rule that spreads samples evenly while they stream by, decided without any I/O.

Shards end at the samples nearest to the multiples of the target, so that neither rounding nor large samples add up. One
is cut off as soon as one and a half targets follow it, so at the end one and a half to two and a half are left, which
are spread evenly over the last two or three. So every shard has 3/4 to 5/4 of the target, up to a sample; a dataset
below one and a half targets is one shard. With samples as large as shards the bounds are a half and four targets (256
MiB and 2 GiB for the usual 512 MiB), wherever the order of the samples leaves a way to keep them.

How samples come in chunks decides nothing: a cut depends on the samples before it, and on whether enough follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from railbus_shared.contracts.artifacts import Column, DatasetSchema
from railbus_shared.data.dtypes import ITEM_BYTES, sample_bytes

_OFFSET_BYTES: Final = 8
_PARQUET_LENGTH_BYTES: Final = 4


@dataclass(frozen=True)
class Boundary:
    """The last place between two samples that is not past a goal."""

    samples: int
    """Before it."""
    below: int
    """Bytes of them."""
    above: int
    """Bytes with one sample more."""


@dataclass(frozen=True)
class Cut:
    """The next shard: so many samples, and their bytes."""

    samples: int
    weight: int


@dataclass(frozen=True)
class Weights:
    """What samples add to the size of a shard's file."""

    fixed: int
    """Bytes of every sample."""
    item: Mapping[str, int]
    """Bytes of an item of each column of variable length."""

    @classmethod
    def of(cls, schema: DatasetSchema) -> Weights:
        """Of a dataset in its payload; exact but for what a header or a page adds."""
        fixed = [column for column in schema.columns.values() if not column.variable_length]
        varying = {name: column for name, column in schema.columns.items() if column.variable_length}
        match schema.payload:
            case "columns" | "npy":
                offsets = _OFFSET_BYTES * len(varying)
                return cls(
                    sum(map(sample_bytes, fixed)) + offsets,
                    {name: sample_bytes(column) for name, column in varying.items()},
                )
            case "raw":  # the offsets lie in another file
                return cls(0, {name: sample_bytes(column) for name, column in varying.items()})
            case "parquet":
                lengths = _PARQUET_LENGTH_BYTES * len(varying)
                return cls(
                    -(-sum(map(_parquet_bits, fixed)) // 8) + lengths,
                    {name: -(-_parquet_bits(column) // 8) for name, column in varying.items()},
                )


def _parquet_bits(column: Column) -> int:
    """Of one sample or item in Parquet, which has no whole numbers below 32 bits, but packs truth values."""
    if column.dtype == "bool":
        bits = 1
    elif column.dtype == "uint8" and column.variable_length and not column.shape:
        bits = 8
    elif column.dtype == "float16":
        bits = 16
    else:
        bits = max(32, 8 * ITEM_BYTES[column.dtype])
    return bits * math.prod(column.shape)


Find = Callable[[int], Boundary]
"""The boundary for a goal, in bytes from where the last shard ended; the goal is less than what is held."""


@dataclass(frozen=True)
class Spread:
    """The rule for one target."""

    target: int
    """Bytes that shards aim at."""

    def has_cut(self, held: int) -> bool:
        """Whether so many bytes from where the last shard ended are enough to know where the next one ends."""
        return held >= 2 * self.target

    def cut(self, find: Find, *, at: int) -> Cut:
        """The next shard.

        Args:
            find: looks among the samples that are held.
            at: bytes of all shards so far.
        """
        return self._nearest(find, (self._multiple(at) + 1) * self.target - at)

    def is_settled(self, weight: int, *, held: int) -> bool:
        """Whether a shard of this weight is cut off, with so much held from its beginning on."""
        return 2 * (held - weight) >= 3 * self.target

    def last_cuts(self, find: Find, *, held: int, samples: int) -> list[Cut]:
        """The shards of what is left at the end, as even as its samples allow.

        Args:
            find: looks among the samples that are left.
            held: bytes of the samples that are left.
            samples: how many are left.
        """
        most = min(samples, max(1, self._multiple(held)))
        for count in range(most, 0, -1):
            cuts = _even(find, count, held=held, samples=samples)
            if all(self.target <= 2 * cut.weight <= 8 * self.target for cut in cuts):
                return cuts
        return _even(find, most, held=held, samples=samples) if samples else []

    def _multiple(self, weight: int) -> int:
        """How many targets a weight is, rounded."""
        return (2 * weight + self.target) // (2 * self.target)

    def _nearest(self, find: Find, goal: int) -> Cut:
        """The boundary nearest to a goal, or the one beside it where that keeps within the bounds."""
        found = find(goal)
        lower, upper = Cut(found.samples, found.below), Cut(found.samples + 1, found.above)
        if lower.samples == 0:
            return upper
        if upper.weight > 4 * self.target:
            return lower
        return lower if goal - lower.weight <= upper.weight - goal and 2 * lower.weight >= self.target else upper


def _even(find: Find, count: int, *, held: int, samples: int) -> list[Cut]:
    """So many shards of even weight, or fewer where samples are too large."""
    ends = {samples: held}
    for part in range(1, count):
        found = find(goal := held * part // count)
        is_lower = found.samples > 0 and goal - found.below <= found.above - goal
        end, weight = (found.samples, found.below) if is_lower else (found.samples + 1, found.above)
        ends.setdefault(end, weight)
    cuts, first, before = [], 0, 0
    for end, weight in sorted(ends.items()):
        cuts.append(Cut(end - first, weight - before))
        first, before = end, weight
    return cuts
