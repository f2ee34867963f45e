"""Files of arrays: `.npz` and `.csv`, read whole. Every fault names its file, and its line or array."""

from __future__ import annotations

import csv
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from railbus_shared.errors import InvalidField, shorten

Arrays = dict[str, npt.NDArray[Any]]

_WHOLE: Final = re.compile(r"[+-]?[0-9]+\Z")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")


def read_npz(path: Path) -> Arrays:
    """The arrays of an `.npz` file, in this machine's byte order; never unpickles."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise _unreadable(path, "it holds one array", hint="save it with numpy.savez(file, name=array)")
            return {name: _native(found[name]) for name in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError) as exc:
        raise _unreadable(path, str(exc), hint="save plain arrays with numpy.savez") from exc


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_csv(path: Path) -> Arrays:
    """Columns of numbers under the names in the first line: int64 where all are whole, else float32.

    Empty lines are passed over. Raises InvalidField naming line and column for a cell that is no number.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = _header(path, rows)
            cells: list[list[int | float]] = [[] for _ in header]
            for row in rows:
                if row:
                    _add(path, row, rows.line_num, header=header, cells=cells)
        except (csv.Error, UnicodeDecodeError) as exc:
            raise _unreadable(path, f"line {rows.line_num + 1}: {exc}", hint="save it as UTF-8 text") from exc
    return {name: _typed(path, name, column) for name, column in zip(header, cells, strict=True)}


def _header(path: Path, rows: Iterator[list[str]]) -> list[str]:
    header = [cell.strip() for cell in next(rows, [])]
    if not header:
        raise _unreadable(path, "the first line is empty", hint="begin with a line of column names")
    if any(_NUMBER.match(cell) for cell in header):
        raise _unreadable(path, f"the first line holds numbers: {shorten(header)}", hint="begin with a line of names")
    if len(set(header)) != len(header):
        raise _unreadable(path, f"the first line names a column twice: {shorten(header)}")
    return header


def _add(path: Path, row: list[str], line: int, *, header: list[str], cells: list[list[int | float]]) -> None:
    if len(row) != len(header):
        raise _unreadable(path, f"line {line} has {len(row)} cells, but the first line {len(header)}")
    for name, column, text in zip(header, cells, row, strict=True):
        cell = text.strip()
        if _WHOLE.match(cell):
            column.append(int(cell))
        elif _NUMBER.match(cell):
            column.append(float(cell))
        else:
            raise InvalidField(
                field=f"columns.{name}",
                value=text,
                problem=f"line {line} of {path.name!r} holds no number here",
                hint="turn words into numbers and fill what is missing first",
            )


def _typed(path: Path, name: str, column: list[int | float]) -> npt.NDArray[Any]:
    limit: float = np.iinfo(np.int64).max
    if all(type(cell) is int for cell in column):
        if any(abs(cell) > limit for cell in column):
            raise _unreadable(path, f"column {name!r} holds whole numbers beyond 64 bits")
        return np.array(column, dtype=np.int64)
    limit = float(np.finfo(np.float32).max)
    if any(abs(cell) > limit for cell in column):
        raise _unreadable(path, f"column {name!r} holds numbers beyond the range of float32", hint="scale it first")
    return np.array(column, dtype=np.float64).astype(np.float32)


def _unreadable(path: Path, problem: str, *, hint: str = "") -> InvalidField:
    return InvalidField(field="source", value=path.name, problem=f"cannot be imported: {problem}", hint=hint)
