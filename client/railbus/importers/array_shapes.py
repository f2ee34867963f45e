"""A column of arrays that come one by one: of one shape, or of a length that varies along the first axis."""

from __future__ import annotations

from typing import cast

import numpy as np

from railbus.importers.source import Array, Values, is_class, ragged
from railbus_shared.contracts.artifacts import Column, Dtype
from railbus_shared.data.index import ITEM_BYTES
from railbus_shared.errors import InvalidField


class ArrayShapes:
    """What the arrays of a column have in common."""

    def __init__(self, name: str, *, where: str) -> None:
        self._name = name
        self._where = where
        self._first: Array | None = None
        self._lengths: set[int] = set()
        self._least, self._most = 0, -1

    def see(self, array: Array, *, sample: str) -> None:
        """Look at one; raises InvalidField if it is not like those before it."""
        if array.dtype.name not in ITEM_BYTES:
            self._refuse(array, f"not a type of number, in sample {sample}")
        if self._first is None:
            self._first = array
        if (array.dtype, array.ndim, array.shape[1:]) != (
            self._first.dtype,
            self._first.ndim,
            self._first.shape[1:],
        ):
            self._refuse(array, f"sample {sample} has this, but the first {self._shown(self._first)}")
        self._lengths.add(len(array) if array.ndim else -1)
        if array.ndim == 0 and array.dtype.kind in "iu":
            self._least, self._most = min(self._least, int(array)), max(self._most, int(array))

    def _refuse(self, array: Array, problem: str) -> None:
        raise InvalidField(field=f"columns.{self._name}", value=self._shown(array), problem=problem)

    @staticmethod
    def _shown(array: Array) -> str:
        return f"{array.dtype}{list(array.shape)}"

    @property
    def _is_fixed(self) -> bool:
        return len(self._lengths) == 1 and 0 not in self._lengths

    def column(self) -> Column:
        """The column, once all were seen."""
        first = self._like
        dtype = cast("Dtype", first.dtype.name)
        if not self._is_fixed:
            return Column(dtype=dtype, shape=first.shape[1:], variable_length=True)
        classes = self._most + 1 if is_class(self._name) and self._most >= 0 == self._least else None
        return Column(dtype=dtype, shape=first.shape, num_classes=classes)

    @property
    def _like(self) -> Array:
        if self._first is None:
            raise InvalidField(field=f"columns.{self._name}", value=None, problem=f"{self._where} holds no samples")
        return self._first

    def values(self, arrays: list[Array]) -> Values:
        """Arrays as the column."""
        first = self._like
        return np.stack(arrays) if self._is_fixed else ragged(arrays, empty=first[:0])
