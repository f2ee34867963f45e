"""Memory that batches are gathered into: given out again only when nobody holds it any more.

A tensor made of an array holds the array, and whatever views the tensor (a slice, an alias, an array of NumPy, a DLPack
capsule, a saved tensor of autograd) holds the tensor's storage. So the array's reference count tells: where only the
ring refers to it, nobody can see it change. There is nothing that a consumer must give back, or could forget to.

A consumer that holds one batch while it asks for the next makes a ring of two; one that holds more makes it longer.
What is held longer than the ring remembers stays its holder's and is not used again. For a CUDA device the memory is
pinned, and torch's own cache waits for the end of a copy before it gives pinned memory out again.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from railbus_shared.data.dtypes import ITEM_BYTES
from railbus_shared.data.readers import Array, numpy_dtype, page_aligned_empty

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyColumn

TORCH_DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in ITEM_BYTES}
_LARGE_BYTES: Final = 128 << 10
"""From here on it shows where a buffer begins, and whether its pages are new."""
_MOST: Final = 8
"""Buffers that a ring remembers."""
_LEAST_SPARE_FRAC: Final = 1 / 64
_MOST_SPARE_FRAC: Final = 1 / 4
_SOON: Final = 8
"""Batches."""


class Buffers(Protocol):
    """Where a column's batches get their memory."""

    def take(self, rows: int) -> tuple[torch.Tensor, Array]:
        """A tensor (rows, *shape) of the column's dtype, and the array that fills it."""
        ...


class Ring:
    """Page-aligned buffers of one column in ordinary memory, used again."""

    def __init__(self, column: AnyColumn) -> None:
        self._dtype = TORCH_DTYPES[column.dtype]
        self._array_dtype = numpy_dtype(column)
        self._shape = column.shape
        self._row_bytes = ITEM_BYTES[column.dtype] * math.prod(column.shape)
        self._spare = _Spare() if column.variable_length else None
        self._buffers: list[Array] = []

    def take(self, rows: int) -> tuple[torch.Tensor, Array]:
        if rows * self._row_bytes < _LARGE_BYTES:
            array: Array = np.empty((rows, *self._shape), self._array_dtype)
            return self._tensor(array), array
        buffer = self._unheld(rows)
        if self._spare is not None:
            self._spare.used()
        tensor = self._tensor(buffer)
        return (tensor, buffer) if len(buffer) == rows else (tensor[:rows], buffer[:rows])

    def _tensor(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if tensor.dtype is self._dtype else tensor.view(self._dtype)

    def _unheld(self, rows: int) -> Array:
        """A buffer of at least so many rows that nobody holds; of others like it one is kept for next time."""
        buffers = self._buffers
        free = [number for number in range(len(buffers)) if _references(buffers, number) == _UNHELD]
        for number in reversed(free[2:]):
            del buffers[number]
        for number in free[:2]:
            if len(buffers[number]) >= rows:
                return buffers[number]
        if free and self._spare is not None:
            self._spare.outgrown()
        self._buffers = [buffer for number, buffer in enumerate(buffers) if number not in free[:2]][1 - _MOST :]
        room = rows if self._spare is None else self._spare.added(rows)
        self._buffers.append(page_aligned_empty((room, *self._shape), self._array_dtype))
        return self._buffers[-1]


class _Spare:
    """How much larger than asked for a buffer of a variable length is made, so that a longer batch finds room in it.

    Lengths that only scatter pass the longest so far ever more rarely, so little suffices; and whatever a buffer has to
    spare, a trainer has in memory. Lengths that rise would soon want a new buffer again, and again: then it doubles.
    """

    def __init__(self) -> None:
        self._frac = _LEAST_SPARE_FRAC
        self._since = _SOON

    def used(self) -> None:
        """One more batch."""
        self._since += 1

    def outgrown(self) -> None:
        """A batch was longer than any buffer that was free."""
        factor = 2 if self._since < _SOON else 0.5
        self._frac = min(max(self._frac * factor, _LEAST_SPARE_FRAC), _MOST_SPARE_FRAC)
        self._since = 0

    def added(self, rows: int) -> int:
        """Rows of a new buffer."""
        return rows + int(rows * self._frac)


class Pinned:
    """Pinned memory of one column, for copies to a CUDA device that nobody waits for."""

    def __init__(self, column: AnyColumn) -> None:
        self._dtype = TORCH_DTYPES[column.dtype]
        self._shape = column.shape

    def take(self, rows: int) -> tuple[torch.Tensor, Array]:
        tensor = torch.empty((rows, *self._shape), dtype=self._dtype, pin_memory=True)
        return tensor, (tensor.view(torch.uint16) if self._dtype is torch.bfloat16 else tensor).numpy()


def _references(buffers: list[Any], number: int) -> int:
    return sys.getrefcount(buffers[number])


_UNHELD: Final = _references([object()], 0)
"""References that looking at a buffer sees where the ring alone has one."""
