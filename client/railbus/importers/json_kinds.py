"""What a field of a JSON file is, found value by value, and its values as a column."""

from __future__ import annotations

from typing import Any, Final, Literal, cast

import numpy as np
import orjson

from railbus.importers.csv_files import MAX_CLASSES
from railbus.importers.source import Array, Options, Values, is_class, ragged, ragged_bytes
from railbus_shared.contracts.artifacts import Column, Dtype
from railbus_shared.errors import InvalidField

Sort = Literal["flag", "number", "text", "numbers", "json", "missing"]
_SAID: Final[dict[Sort, str]] = {
    "flag": "true or false", "number": "a number", "text": "a text", "numbers": "a list of numbers",
    "json": "a map or a list of other things", "missing": "nothing",
}  # fmt: skip
_WIDTH: Final[dict[Dtype, int]] = {"bool": 0, "int64": 1, "float32": 2}
"""A column takes the widest type that any of its numbers needs."""
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


class Kind:
    """One field."""

    def __init__(self, name: str, *, file: str, options: Options) -> None:
        self._name = name
        self._file = file
        self._forced = options.text_columns >= {name}
        self._fills = options.missing == "fill"
        self._lines: dict[Sort, int] = {}
        """Where each sort of value was met first."""
        self._dtype: Dtype = "bool"
        self._lengths: set[int] = set()
        self._inner: tuple[int, ...] | None = None
        self._is_nested_unevenly = False
        self._words: set[str] | None = set() if is_class(name.lower()) else None
        self._least, self._most = 0, -1
        self._sort: Sort = "json"

    def see_all(self, values: list[Any], *, lines: list[int]) -> None:
        """Look at values, many at once where all are numbers, texts or flat lists of numbers; raises as `see` does."""
        types = set(map(type, values))
        if types == {str}:
            self._see_sort("text", values, lines=lines)
            if self._words is not None:
                self._words.update(values)
                self._words = self._words if len(self._words) <= MAX_CLASSES else None
        elif types <= {int, float} and (arrays := _plain(values)):
            self._see_sort("number", values, lines=lines)
            self._widen_all(arrays)
        elif types == {list} and (arrays := _plain([item for value in values for item in value])):
            self._see_sort("numbers", values, lines=lines)
            self._widen_all(arrays)
            self._lengths.update(map(len, values))
            self._is_nested_unevenly |= self._inner not in {None, ()}
            self._inner = ()
        else:
            for value, line in zip(values, lines, strict=True):
                self.see(value, line=line)

    def _see_sort(self, sort: Sort, values: list[Any], *, lines: list[int]) -> None:
        """Values that are all of one sort."""
        if sort not in self._lines:
            self._lines[sort] = lines[0]
            self._check(sort, values[0], line=lines[0])

    def see(self, value: object, *, line: int) -> None:
        """Look at a value; raises InvalidField as soon as it does not go with those before it."""
        sort, array = _sorted(value)
        if array is not None:
            self._widen(array, line=line)
            if sort == "numbers":
                self._measure(array)
        elif isinstance(value, str) and self._words is not None:
            self._words.add(value)
            self._words = self._words if len(self._words) <= MAX_CLASSES else None
        if sort not in self._lines:
            self._lines[sort] = line
            self._check(sort, value, line=line)

    def _check(self, sort: Sort, value: object, *, line: int) -> None:
        others = self._lines.keys() - {sort} - ({"missing"} if self._fills else set())
        allowed = self._forced or (self._fills and sort == "missing") or {sort, *others} <= {"numbers", "json"}
        if others and not allowed:
            other = min(others, key=lambda one: self._lines[one])
            gap = "missing" in {sort, other}
            hint = f"mend the line, or keep the field as text with --text {self._name}"
            raise InvalidField(
                field=f"columns.{self._name}",
                value=value,
                problem=f"line {line} of {self._file!r} has {_SAID[sort]} here, "
                f"but line {self._lines[other]} {_SAID[other]}",
                hint="fill what is missing first, or with --missing fill" if gap else hint,
            )

    def _widen(self, array: Array, *, line: int) -> None:
        """Take note of the range of numbers."""
        kind = array.dtype.kind
        if kind == "u":
            raise InvalidField(
                field=f"columns.{self._name}",
                value=int(array.max()),
                problem=f"line {line} of {self._file!r} holds a whole number beyond 64 bits",
            )
        if kind == "f" and array.size and float(np.abs(array).max()) > _FLOAT32_MAX:
            raise InvalidField(
                field=f"columns.{self._name}",
                value=float(np.abs(array).max()),
                problem=f"line {line} of {self._file!r} holds a number beyond the range of float32",
                hint="scale it first",
            )
        if kind == "i" and array.size:
            self._least, self._most = min(self._least, int(array.min())), max(self._most, int(array.max()))
        if array.size:
            found: Dtype = "bool" if kind == "b" else "int64" if kind == "i" else "float32"
            self._dtype = found if _WIDTH[found] > _WIDTH[self._dtype] else self._dtype

    def _widen_all(self, arrays: list[Array]) -> None:
        """As `_widen`, for numbers that are none of them too large."""
        for array in arrays:
            self._widen(array, line=0)

    def _measure(self, array: Array) -> None:
        """Take note of the shape of a list."""
        self._lengths.add(len(array))
        if array.size:
            self._is_nested_unevenly |= self._inner not in {None, array.shape[1:]}
            self._inner = array.shape[1:]

    def settle(self) -> None:
        """Decide, once all values were seen."""
        sorts = self._lines.keys() - {"missing"}
        if self._forced:
            self._sort = "text" if sorts <= {"text"} else "json"
        elif sorts == {"numbers"} and not self._is_nested_unevenly:
            self._sort = "numbers"
        elif len(sorts) == 1 and sorts != {"numbers"}:
            self._sort = next(iter(sorts))
        else:
            self._sort = "json" if sorts else "text"

    @property
    def _has_gaps(self) -> bool:
        return "missing" in self._lines

    @property
    def _number(self) -> Dtype:
        """Dtype of numbers; where some are missing they must be able to be NaN."""
        is_scalar = self._sort in {"flag", "number"}
        return "float32" if self._has_gaps and is_scalar else self._dtype

    @property
    def _labels(self) -> list[str]:
        is_wanted = self._sort == "text" and not self._forced and not self._has_gaps
        return sorted(self._words or ()) if is_wanted else []

    @property
    def _is_fixed(self) -> bool:
        return len(self._lengths) == 1 and 0 not in self._lengths and not self._has_gaps

    def column(self) -> Column:
        """The column of the field."""
        if self._labels:
            return Column(dtype="int64", shape=(), num_classes=len(self._labels), labels=tuple(self._labels))
        if self._sort in {"text", "json"}:
            encoding = "utf-8" if self._sort == "text" else "json"
            return Column(dtype="uint8", shape=(), variable_length=True, encoding=encoding)
        if self._sort == "numbers":
            inner = self._inner or ()
            shape = (next(iter(self._lengths)), *inner) if self._is_fixed else inner
            return Column(dtype=self._dtype, shape=shape, variable_length=not self._is_fixed)
        classes = self._most + 1 if is_class(self._name.lower()) and self._least >= 0 else None
        return Column(dtype=self._number, shape=(), num_classes=classes if self._number == "int64" else None)

    def values(self, values: list[Any]) -> Values:
        """Values of the field as a column."""
        if self._labels:
            numbers = {word: number for number, word in enumerate(self._labels)}
            return np.fromiter((numbers[value] for value in values), np.int64, len(values))
        if self._sort == "text":
            return ragged_bytes([(value or "").encode() for value in values])
        if self._sort == "json":
            return ragged_bytes([orjson.dumps(value) for value in values])
        dtype = np.dtype(self._number)
        if self._sort != "numbers":
            return np.array([np.nan if value is None else value for value in values], dtype)
        if self._is_fixed:
            return np.array(values, dtype)
        empty = np.zeros((0, *(self._inner or ())), dtype)
        return ragged([np.array(value, dtype) if value else empty for value in values], empty=empty)


def _plain(items: list[Any]) -> list[Array]:
    """Whole numbers and floats, each as an array; nothing if there are other things, or one too large."""
    types = set(map(type, items))
    if not types <= {int, float}:
        return []
    arrays: list[Array] = []
    for one in types:
        array = np.array(items if len(types) == 1 else [item for item in items if type(item) is one])
        # A whole number beyond 64 bits makes floats or objects of them all.
        is_fit = array.dtype == np.int64 if one is int else float(np.abs(array).max()) <= _FLOAT32_MAX
        if not is_fit:
            return []
        arrays.append(array)
    return arrays


def _sorted(value: object) -> tuple[Sort, Array | None]:
    """What a value is, with its numbers."""
    if value is None:
        return "missing", None
    if isinstance(value, bool):
        return "flag", np.array(value)
    if isinstance(value, int | float):
        return "number", np.array(value)
    if isinstance(value, str):
        return "text", None
    if isinstance(value, list):
        return _listed(cast("list[object]", value))
    return "json", None


def _listed(value: list[object]) -> tuple[Sort, Array | None]:
    """Whether a list is one of numbers, or of lists of numbers that are all alike."""
    try:
        array = np.array(value) if value else np.zeros(0, np.bool_)
    except (ValueError, OverflowError):
        return "json", None
    return ("numbers", array) if array.dtype.kind in "biuf" else ("json", None)
