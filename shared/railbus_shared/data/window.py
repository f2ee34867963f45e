"""`WindowOrder`: the shuffle for shards that come from far away; only few are needed at a time.

The shards that hold samples of the epoch are permuted, the permuted row is cut into windows, and the samples of each
window are permuted among themselves. So a trainer reads one window after the other, in an order that nobody could tell
from a random one within it, and a shard is needed in one window only. All permutations are keyed bijections: the tables
are over shards and windows, never over samples, and any place can be asked for by itself.

Letters: G shards that hold samples of the epoch, W windows, N places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, assert_never

import numpy as np

from railbus_shared.data.bijection import Bijection, Bijections, Positions
from railbus_shared.data.selection import Selection
from railbus_shared.data.shards import MOST_WALKED, ShardPlaces, Shards, by_first_need

_SALT_OF_SHARDS: Final = 1
_SALT_OF_WINDOWS: Final = 2
_TOGETHER: Final = 32
"""Windows whose first places are reckoned at once."""
_LOOKED_AT: Final = 16
"""Places a shard: so many nearly always meet all shards of a window; where they do not, more are looked at."""


@dataclass(frozen=True)
class Window:
    """How many shards are mixed with each other: as many as go into the limit, at least one.

    Raises ValueError for a limit below 1.
    """

    limit: int = 8
    unit: Literal["shards", "samples", "bytes"] = "shards"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"a window of {self.limit} {self.unit} is none: expected at least 1")

    def edges(self, places: ShardPlaces, shards: Shards, order: Positions) -> Positions:
        """Cuts the ordered shards into windows: the first of each, and where the last one ends (W + 1,).

        By count the windows are alike to within one shard. Raises ValueError for bytes of shards without sizes.
        """
        match self.unit:
            case "shards":
                num_windows = -(-len(order) // self.limit)
                return np.arange(num_windows + 1) * len(order) // max(num_windows, 1)
            case "samples":
                return _cut(places.counts[order], self.limit)
            case "bytes":
                if len(shards.sizes_bytes) != len(shards.bounds) - 1:
                    raise ValueError("a window of bytes needs the sizes of the shards: give them to Shards.of")
                return _cut(shards.sizes_bytes[places.numbers[order]], self.limit)
            case _:
                assert_never(self.unit)


def _cut(weights: Positions, limit: int) -> Positions:
    """Cuts a row as late as the limit allows."""
    ends = np.cumsum(weights)
    edges = [0]
    while edges[-1] < len(weights):
        before = int(ends[edges[-1] - 1]) if edges[-1] else 0
        edges.append(max(edges[-1] + 1, int(np.searchsorted(ends, before + limit, side="right"))))
    return np.array(edges, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class WindowOrder:
    """The selected samples in one epoch, shuffled window by window."""

    selection: Selection
    shards: Shards
    seed: int
    epoch: int
    window: Window

    @property
    def num_samples(self) -> int:
        return self.selection.num_samples

    def positions(self, start: int, stop: int) -> Positions:
        """Samples of the dataset at places start..stop-1, int64 (stop - start,); the cost is linear in their number.

        Raises ValueError for places that the epoch does not have.
        """
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"places {start} to {stop} asked for, of {self.num_samples}")
        mixed = self._mixed(np.arange(start, stop))
        slots = self._slots(mixed)
        return self.selection.samples(self._starts[slots] + mixed - self._ends[slots])

    def shards_from(self, place: int) -> Iterator[int]:
        """Numbers of the shards in the order in which they are first needed from a place on."""
        for first in range(self._window_of(place), len(self._edges) - 1, _TOGETHER):
            yield from self._needed(first, min(first + _TOGETHER, len(self._edges) - 1), place)

    def _needed(self, first: int, stop: int, place: int) -> Iterator[int]:
        """Shards of windows first..stop-1 in the order of first need, from a place on."""
        edges = self._edges[first : stop + 1]
        begins, ends = np.maximum(self._window_places[first:stop], place), self._window_places[first + 1 : stop + 1]
        widths = np.diff(edges) * _LOOKED_AT
        while True:
            looked_at = np.minimum(begins + widths, ends)
            places = [np.arange(*row) for row in zip(begins.tolist(), looked_at.tolist(), strict=True)]
            slots = self._slots(self._mixed(np.concatenate(places)))
            met = np.zeros(int(edges[-1] - edges[0]), dtype=np.bool_)
            met[slots - edges[0]] = True
            is_short = np.logical_or.reduceat(~met, edges[:-1] - edges[0]) & (looked_at < ends)
            if not (is_short & (widths < MOST_WALKED)).any():
                break
            widths = np.where(is_short, np.minimum(widths * 4, MOST_WALKED), widths)
        parts = np.split(slots, np.cumsum(looked_at - begins)[:-1])
        for window in np.flatnonzero(is_short).tolist():  # the others of a window that is too large to look through
            parts[window] = np.concatenate([parts[window], np.arange(edges[window], edges[window + 1])])
        yield from by_first_need(self._numbers[np.concatenate(parts)], known=set())

    def _mixed(self, places: Positions) -> Positions:
        """Places within the row of permuted shards, of places of the epoch."""
        windows = np.searchsorted(self._window_places, places, side="right") - 1
        begins = self._window_places[windows]
        return begins + self._within(places - begins, which=windows)

    def _slots(self, mixed: Positions) -> Positions:
        """Which of the permuted shards they lie in."""
        return np.searchsorted(self._ends, mixed, side="right") - 1

    def _window_of(self, place: int) -> int:
        return int(np.searchsorted(self._window_places, place, side="right")) - 1

    @cached_property
    def _places(self) -> ShardPlaces:
        return ShardPlaces.of(self.shards, self.selection)

    @cached_property
    def _order(self) -> Positions:
        size = len(self._places.numbers)
        return Bijection(size, self.seed, self.epoch, _SALT_OF_SHARDS)(np.arange(size))

    @cached_property
    def _numbers(self) -> Positions:
        """Of the permuted shards (G,)."""
        return self._places.numbers[self._order]

    @cached_property
    def _starts(self) -> Positions:
        """Where they begin in the selection (G,)."""
        return self._places.starts[self._order]

    @cached_property
    def _ends(self) -> Positions:
        """Where they begin in the row of permuted shards, and where it ends (G + 1,)."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._places.counts[self._order])])

    @cached_property
    def _edges(self) -> Positions:
        """The first permuted shard of each window, and their number (W + 1,)."""
        return self.window.edges(self._places, self.shards, self._order)

    @cached_property
    def _window_places(self) -> Positions:
        """Where each window begins in the epoch, and where the last one ends (W + 1,)."""
        return self._ends[self._edges]

    @cached_property
    def _within(self) -> Bijections:
        return Bijections(np.diff(self._window_places), self.seed, self.epoch, _SALT_OF_WINDOWS)
