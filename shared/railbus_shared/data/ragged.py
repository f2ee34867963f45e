"""`Ragged`: a column of variable length as two arrays, never as a list of objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Ragged:
    """Samples of different lengths, back to back: sample i is `values[offsets[i]:offsets[i + 1]]`."""

    values: npt.NDArray[Any]
    """All items (items, *shape)."""
    offsets: npt.NDArray[np.int64]
    """Where each sample begins, and where the last one ends (samples + 1,); not decreasing."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        """One sample's items, as a view. Raises IndexError for a row that is not there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.values[self.offsets[row] : self.offsets[row + 1]]
