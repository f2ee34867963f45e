"""`Shards`: a table of where the shards of a dataset begin; `ShardPlaces`: where they lie among selected samples.

Letters: S shards, G shards that hold selected samples, N places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from railbus_shared.data.bijection import Positions
from railbus_shared.data.selection import Selection

MOST_WALKED: Final = 1 << 17
"""Places that are looked at for the shards they need: enough to meet each of 10,000 of one size; a few milliseconds."""


@dataclass(frozen=True, eq=False)
class Shards:
    """How the samples of a dataset are spread over its shards."""

    bounds: Positions
    """The first sample of each shard, and where the last one ends (S + 1,)."""
    sizes_bytes: Positions
    """Of the files (S,)."""

    @classmethod
    def of(cls, samples: Iterable[int], *, sizes_bytes: Sequence[int] = ()) -> Self:
        """Shards of so many samples each, in order; without sizes none can be asked for."""
        counts = np.fromiter(samples, dtype=np.int64)
        bounds = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        return cls(bounds, np.array(sizes_bytes, dtype=np.int64))

    def numbers_of(self, samples: Positions) -> Positions:
        """The shard that each sample (N,) lies in, int64 (N,)."""
        return np.searchsorted(self.bounds, samples, side="right") - 1


@dataclass(frozen=True, eq=False)
class ShardPlaces:
    """The shards that hold selected samples, and which places of the selection each has."""

    numbers: Positions
    """Of the shards, ascending (G,)."""
    starts: Positions
    """Their first places (G,)."""
    counts: Positions
    """Their selected samples (G,), each at least one."""

    @classmethod
    def of(cls, shards: Shards, selection: Selection) -> Self:
        """Raises ValueError for a selection that reaches beyond the shards."""
        edges = selection.places(shards.bounds)
        if edges[-1] < selection.num_samples:
            raise ValueError(f"the selection has samples from {shards.bounds[-1]} on, where the dataset ends")
        counts = np.diff(edges)
        numbers = np.flatnonzero(counts)
        return cls(numbers, edges[numbers], counts[numbers])


def by_first_need(numbers: Positions, *, known: set[int]) -> Iterator[int]:
    """Shard numbers (N,) in the order in which they come first, without those known; they are known then."""
    first = np.full(int(numbers.max(initial=-1)) + 1, len(numbers))
    first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # the last one written stays, which is the first to come
    found = np.flatnonzero(first < len(numbers))
    for number in found[np.argsort(first[found])].tolist():
        if number not in known:
            known.add(number)
            yield number
