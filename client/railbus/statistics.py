"""What the values of a dataset are like, reckoned in one pass: range, mean, spread, lengths, classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from railbus.importers.source import Array, Report, Values
from railbus.reading_rows import Rows, as_numbers, values_of
from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.ragged import Ragged

_MAX_CLASSES: Final = 100_000


@dataclass
class ColumnStatistics:
    """One column; numbers that are NaN are counted and else left out."""

    column: Column
    items: int = 0
    nans: int = 0
    least: float = math.inf
    most: float = -math.inf
    mean: float = 0.0
    _squares: float = 0.0
    """Sum of squared distances from the mean, kept by Chan's update: exact where a sum of squares is not."""
    shortest: int | None = None
    longest: int | None = None
    total_length: int = 0
    samples: int = 0
    classes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def std(self) -> float | None:
        """Of the whole, not of a sample."""
        return math.sqrt(self._squares / self.items) if self.items else None

    @property
    def mean_length(self) -> float | None:
        return self.total_length / self.samples if self.column.variable_length and self.samples else None

    def add(self, values: Values) -> None:
        """Take in some samples."""
        self.samples += len(values)
        if isinstance(values, Ragged):
            lengths = np.diff(values.offsets)
            self.total_length += int(lengths.sum())
            low, high = int(lengths.min()), int(lengths.max())
            self.shortest = low if self.shortest is None else min(self.shortest, low)
            self.longest = high if self.longest is None else max(self.longest, high)
        if not self.column.encoding or not self.column.variable_length:
            self._add_numbers(as_numbers(values_of(values), self.column))

    def _add_numbers(self, found: Array) -> None:
        if self.column.num_classes and self.column.num_classes <= _MAX_CLASSES and found.dtype.kind in "iu":
            counts = np.bincount(found.reshape(-1).astype(np.int64), minlength=self.column.num_classes)
            self.classes = counts if not self.classes.size else self.classes + counts
        numbers = found.reshape(-1).astype(np.float64)
        is_nan = np.isnan(numbers)
        if is_nan.any():
            self.nans += int(is_nan.sum())
            numbers = numbers[~is_nan]
        if not numbers.size:
            return
        self.least, self.most = min(self.least, float(numbers.min())), max(self.most, float(numbers.max()))
        with np.errstate(invalid="ignore", over="ignore"):  # infinities give NaN, which is what there is to say
            mean = float(numbers.mean())
            shift, total = mean - self.mean, self.items + numbers.size
            self._squares += float(np.square(numbers - mean).sum()) + shift * shift * self.items * numbers.size / total
            self.mean += shift * numbers.size / total
        self.items = total

    def to_map(self) -> dict[str, Any]:
        """For `--json`; JSON has no NaN and no infinity, which become null."""
        found: dict[str, Any] = {"samples": self.samples}
        if self.items or self.nans:
            numbers = {"min": self.least, "max": self.most, "mean": self.mean, "std": self.std}
            found |= {name: value if value is not None and math.isfinite(value) else None
                      for name, value in numbers.items()}  # fmt: skip
            found["nan"] = self.nans
        if self.column.variable_length:
            found["lengths"] = {"min": self.shortest, "max": self.longest, "mean": self.mean_length}
        if self.classes.size:
            names = self.column.labels or tuple(str(number) for number in range(len(self.classes)))
            found["classes"] = dict(zip(names, self.classes.tolist(), strict=True))
        return found


def statistics(rows: Rows, *, report: Report | None = None) -> dict[str, ColumnStatistics]:
    """Of every column; holds some samples at a time."""
    found = {name: ColumnStatistics(column) for name, column in rows.columns.items()}
    for chunk in rows.chunks(report=report):
        for name, values in chunk.items():
            found[name].add(values)
    return found
