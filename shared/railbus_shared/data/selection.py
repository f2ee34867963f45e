"""`Selection`: some of a dataset's samples, as ranges: a split in several runs, a limit, a filter, every tenth.

A selection is a set. Its samples stand in the order of the dataset, each once, in whatever order the ranges were given.
It is kept as pieces that do not overlap, and for each piece which residues of the sample's number, divided by one
period, are in it; plain ranges have period 1. So sets that repeat, and what is left without them, cost no more memory
than ranges do, and places become samples by arithmetic.

Letters: P pieces, K the period, N places.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import numpy.typing as npt

from railbus_shared.data.bijection import Positions

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnySplit

_LARGEST_PERIOD: Final = 1 << 16
_LARGEST_TABLE: Final = 1 << 20
"""Pieces times period: some 16 MiB."""

_Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Selection:
    """Samples by number; made by `of` and `of_split`, and from each other."""

    firsts: Positions
    """Where each piece begins (P,), ascending."""
    stops: Positions
    """Where each piece ends (P,); not beyond the beginning of the next."""
    marks: _Marks
    """Which residues of each piece are selected (P, K)."""

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int]]) -> Self:
        """The samples first..stop-1 of each run; they may overlap. Raises ValueError for a run that is none."""
        sorted_runs = sorted(runs)
        for first, stop in sorted_runs:
            if not 0 <= first <= stop:
                raise ValueError(f"the run {first} to {stop} is none: expected 0 <= first <= stop")
        bounds = np.array(sorted_runs, dtype=np.int64).reshape(-1, 2)
        bounds = bounds[bounds[:, 0] < bounds[:, 1]]
        reached: Positions = np.maximum.accumulate(bounds[:, 1])
        begins = np.ones(len(bounds), dtype=np.bool_)
        begins[1:] = bounds[1:, 0] > reached[:-1]
        ends = np.roll(begins, -1)  # where the next one begins; the last one's turn is the first one's, which is True
        return cls(bounds[begins, 0], reached[ends], np.ones((int(begins.sum()), 1), dtype=np.bool_))

    @classmethod
    def of_split(cls, split: AnySplit) -> Self:
        """The samples of a split, in however many runs."""
        return cls.of((run.first, run.first + run.samples) for run in split.runs)

    @cached_property
    def num_samples(self) -> int:
        return int(self._before[-1])

    @cached_property
    def key(self) -> str:
        """What tells it from others: selections of one key have the same samples, and so do the same plain ranges."""
        parts = (self.firsts.astype("<i8"), self.stops.astype("<i8"), self.marks.astype("u1"))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def samples(self, places: Positions) -> Positions:
        """The samples at places (N,) of the selection, int64 (N,). Raises ValueError for a place that is not there."""
        if places.size and not 0 <= places.min() <= places.max() < self.num_samples:
            raise ValueError(f"places {places.min()} to {places.max()} asked for, of {self.num_samples}")
        if self._is_one_run:
            return places + self.firsts
        pieces = np.searchsorted(self._before, places, side="right") - 1
        counted = places - self._before[pieces] + self._counted(self.firsts, np.arange(len(self.firsts)))[pieces]
        turns, rests = np.divmod(counted, self._per_period[pieces])
        found: Positions = turns * self.period + self._residues[pieces, rests]
        return found

    def places(self, samples: Positions) -> Positions:
        """How many of the selected samples come before each of these (N,): its own place, if it is one; int64 (N,)."""
        if not self.num_samples:
            return np.zeros_like(samples)
        pieces = np.maximum(np.searchsorted(self.firsts, samples, side="right") - 1, 0)
        ends = np.clip(samples, self.firsts[pieces], self.stops[pieces])
        return self._before[pieces] + self._counted(ends, pieces) - self._counted(self.firsts[pieces], pieces)

    def intersection(self, other: Selection) -> Selection:
        """The samples of both."""
        return self._combined(other, np.logical_and)

    def exclude(self, other: Selection) -> Selection:
        """The samples of this one that the other has not."""
        return self._combined(other, np.greater)

    def every(self, step: int, *, offset: int = 0) -> Selection:
        """The samples whose number leaves `offset` when divided by `step`.

        It goes by the sample's number, not its place, so what is chosen stays chosen when other samples come or go.
        Raises ValueError for a step that is too large, or an offset that no number leaves.
        """
        if not 0 <= offset < step <= _LARGEST_PERIOD:
            raise ValueError(f"every {step} from {offset} is none: expected 0 <= offset < step <= {_LARGEST_PERIOD}")
        marks = np.zeros((1, step), dtype=np.bool_)
        marks[0, offset] = True
        end = int(self.stops[-1]) if self.num_samples else 0
        return self.intersection(Selection(np.zeros(1, dtype=np.int64), np.array([end]), marks))

    def slice(self, start: int, stop: int) -> Selection:
        """Those at the places start..stop-1, as far as there are any. Raises ValueError for places that are none."""
        if not 0 <= start <= stop:
            raise ValueError(f"the places {start} to {stop} are none: expected 0 <= start <= stop")
        start, stop = min(start, self.num_samples), min(stop, self.num_samples)
        if start == stop:
            return Selection.of([])
        return self.at([(start, stop)])

    def at(self, runs: Iterable[tuple[int, int]]) -> Selection:
        """Those at the places start..stop-1 of each run. Raises ValueError for a place that is not there."""
        wanted = Selection.of(runs)
        firsts, lasts = self.samples(wanted.firsts), self.samples(wanted.stops - 1)
        return self.intersection(Selection.of(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True)))

    @property
    def period(self) -> int:
        """After so many numbers the pattern of each piece begins again."""
        return int(self.marks.shape[1])

    @cached_property
    def _is_one_run(self) -> bool:
        return self.marks.shape == (1, 1)

    @cached_property
    def _sums(self) -> Positions:
        """Selected residues below each (P, K + 1)."""
        sums = np.zeros((len(self.firsts), self.period + 1), dtype=np.int64)
        np.cumsum(self.marks, axis=1, out=sums[:, 1:])
        return sums

    @cached_property
    def _per_period(self) -> Positions:
        return self._sums[:, -1]

    @cached_property
    def _residues(self) -> Positions:
        """The selected residues of each piece, ascending, before those that are not (P, K)."""
        return np.argsort(~self.marks, axis=1, kind="stable")

    @cached_property
    def _before(self) -> Positions:
        """Samples before each piece, and all (P + 1,)."""
        pieces = np.arange(len(self.firsts))
        counts = self._counted(self.stops, pieces) - self._counted(self.firsts, pieces)
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

    def _counted(self, numbers: Positions, pieces: Positions) -> Positions:
        """Numbers from 0 to below each of these that the pattern of its piece selects."""
        turns, rests = np.divmod(numbers, self.period)
        return turns * self._per_period[pieces] + self._sums[pieces, rests]

    def _combined(self, other: Selection, rule: np.ufunc) -> Selection:
        """What the rule makes of the marks of both, on every stretch that no piece of either begins or ends within."""
        period = math.lcm(self.period, other.period)
        bounds = _distinct(np.concatenate([self.firsts, self.stops, other.firsts, other.stops]))
        size = max(len(bounds) - 1, 0) * period
        if period > _LARGEST_PERIOD or size > _LARGEST_TABLE:
            raise ValueError(
                f"the selections repeat every {self.period} and {other.period} samples, together every {period} in "
                f"{len(bounds)} pieces: that is too much to keep; choose steps that divide each other"
            )
        marks = rule(self._marks_at(bounds[:-1], period), other._marks_at(bounds[:-1], period))
        return _normal(bounds[:-1], bounds[1:], marks)

    def _marks_at(self, numbers: Positions, period: int) -> _Marks:
        """The marks of the piece that each of these numbers lies in, none outside of pieces; repeated to a period."""
        marks = np.zeros((len(numbers), period), dtype=np.bool_)
        if len(self.firsts):
            pieces = np.searchsorted(self.firsts, numbers, side="right") - 1
            inside = (pieces >= 0) & (numbers < self.stops[pieces])
            marks[inside] = np.tile(self.marks[pieces[inside]], (1, period // self.period))
        return marks


def _distinct(values: Positions) -> Positions:
    """Ascending, each once; `np.unique` would load more of NumPy."""
    values = np.sort(values)
    is_new = np.ones(len(values), dtype=np.bool_)
    is_new[1:] = values[1:] > values[:-1]
    return values[is_new]


def _normal(firsts: Positions, stops: Positions, marks: _Marks) -> Selection:
    """A selection of pieces side by side: empty ones left out, neighbours alike joined, the period the shortest."""
    used = marks.any(axis=1)
    firsts, stops, marks = firsts[used], stops[used], _shortest(marks[used])
    begins = np.ones(len(firsts), dtype=np.bool_)
    begins[1:] = (firsts[1:] > stops[:-1]) | (marks[1:] != marks[:-1]).any(axis=1)
    return Selection(firsts[begins], stops[np.roll(begins, -1)], marks[begins])


def _shortest(marks: _Marks) -> _Marks:
    """The marks of the shortest period that says the same."""
    period = marks.shape[1]
    for shorter in range(1, period // 2 + 1):
        if period % shorter == 0 and (marks[:, shorter:] == marks[:, :-shorter]).all():
            return marks[:, :shorter]
    return marks
