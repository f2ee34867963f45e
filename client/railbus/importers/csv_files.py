"""`.csv`: a first pass over the whole file finds what each column is, a second one reads it.

A column in which every cell is a number is one of numbers: int64 where all are whole, else float32. One in which no
cell is a number is text. A mixture is more often a fault than a wish, so it is refused with its line, unless `--text`
names the column. Words in a column named like classes are classes. Every fault names file, line and column.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from railbus.importers.lines import lines
from railbus.importers.source import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Array,
    Chunk,
    Options,
    Outline,
    Values,
    check_text_columns,
    column_names,
    is_class,
    ragged_bytes,
    unreadable,
)
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import InvalidField, shorten

MAX_CLASSES: Final = 1000
"""More different words than this are text, whatever their column is called."""
_MAX_CELL: Final = 16 << 20
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")
_WHOLE_CELLS: Final = re.compile(r"(?:[ \t]*[+-]?[0-9]+[ \t]*\n)*\Z")
_NUMBER_CELLS: Final = re.compile(
    r"(?:[ \t]*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[ \t]*\n)*\Z"
)  # one match for thousands of cells costs a tenth of a match for each
_INT64: Final = np.iinfo(np.int64)
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


class CsvFile:
    """A file of cells under a first line of names."""

    def __init__(self, path: Path, options: Options) -> None:
        """Reads the whole file once. Raises InvalidField naming line and column of what does not fit."""
        self._path = path
        self._options = options
        header = self._header()
        names = list(column_names(header).values())
        check_text_columns(options, names, file=path.name)
        self._kinds = [_Kind(name, forced=options.text_columns >= {name}, options=options) for name in names]
        samples = 0
        for first, rows in self._blocks("looking"):
            for kind, cells in zip(self._kinds, zip(*rows, strict=True), strict=True):
                kind.see(cells, file=path.name, lines=first)
            samples += len(rows)
        if samples == 0:
            raise InvalidField(
                field="source",
                value=dict.fromkeys(names, 0),
                problem=f"the columns of {path.name!r} must have one length, and not 0",
            )
        for kind in self._kinds:
            kind.settle(path.name)
        size = path.stat().st_size // samples
        columns = {kind.name: kind.column() for kind in self._kinds}
        self.outline = Outline(columns=columns, samples=samples, sample_bytes=size)

    def chunks(self) -> Iterator[Chunk]:
        for _, rows in self._blocks("reading"):
            columns = zip(self._kinds, zip(*rows, strict=True), strict=True)
            yield {kind.name: kind.values(cells) for kind, cells in columns}

    def _rows(self, stage: str) -> Iterator[tuple[int, list[str]]]:
        """Rows with their line numbers, the first line of names among them; empty lines are passed over."""
        rows = csv.reader(lines(self._path, report=self._options.report, stage=stage), strict=True)
        with _long_cells():
            try:
                for row in rows:
                    if row or rows.line_num == 1:
                        yield rows.line_num, row
            except csv.Error as exc:
                raise unreadable(
                    self._path.name, f"line {rows.line_num + 1}: {exc}", hint="save it as UTF-8 text"
                ) from exc

    def _header(self) -> list[str]:
        header = [cell.strip() for cell in next(self._rows("looking"), (1, []))[1]]
        if not header:
            raise unreadable(self._path.name, "the first line is empty", hint="begin with a line of column names")
        if any(_NUMBER.match(cell) for cell in header):
            problem = f"the first line holds numbers: {shorten(header)}"
            raise unreadable(self._path.name, problem, hint="begin with a line of names")
        if len(set(header)) != len(header):
            raise unreadable(self._path.name, f"the first line names a column twice: {shorten(header)}")
        return header

    def _blocks(self, stage: str) -> Iterator[tuple[list[int], list[list[str]]]]:
        """Some rows at a time, with their line numbers."""
        found = self._rows(stage)
        width = len(next(found)[1])
        numbers: list[int] = []
        rows: list[list[str]] = []
        size = 0
        for number, row in found:
            if len(row) != width:
                problem = f"line {number} has {len(row)} cells, but the first line {width}"
                raise unreadable(self._path.name, problem)
            numbers.append(number)
            rows.append(row)
            size += sum(map(len, row))
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield numbers, rows
                numbers, rows, size = [], [], 0
        if rows:
            yield numbers, rows


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Cells of up to 16 MiB; the reader's own limit is 128 KiB, for the whole process."""
    before = csv.field_size_limit(_MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _Kind:
    """What a column is, found cell by cell."""

    def __init__(self, name: str, *, forced: bool, options: Options) -> None:
        self.name = name
        self._forced = forced
        self._fills = options.missing == "fill"
        self._number_line: int | None = None
        self._word_line: int | None = None
        self._is_whole = True
        self._empty: tuple[int, str] | None = None
        self._words: set[str] | None = set() if is_class(name) else None
        self._least, self._most = _INT64.max, _INT64.min

    def see(self, cells: tuple[str, ...], *, file: str, lines: list[int]) -> None:
        """Look at some cells; raises InvalidField as soon as they cannot be one column."""
        if self._words is not None:
            self._words.update(cells)
            self._words = self._words if len(self._words) <= MAX_CLASSES else None
        if self._forced:
            return
        joined = "\n".join(cells) + "\n"
        is_plain = joined.count("\n") == len(cells)  # else a cell of two lines would pass for two cells
        if is_plain and (_WHOLE_CELLS.match(joined) or _NUMBER_CELLS.match(joined)):
            self._number_line = self._number_line or lines[0]
            self._add_numbers(cells, is_whole=_WHOLE_CELLS.match(joined) is not None, file=file)
        else:
            for cell, line in zip(cells, lines, strict=True):
                self._see_one(cell, line, file=file)
        if self._number_line and self._word_line:
            self._refuse(self._word, self._word_line, file=file)
        if self._number_line and self._empty and not self._fills:
            self._refuse(self._empty[1], self._empty[0], file=file)

    _word = ""

    def _see_one(self, cell: str, line: int, *, file: str) -> None:
        if _NUMBER.match(cell.strip()):
            self._number_line = self._number_line or line
            self._add_numbers((cell,), is_whole=bool(re.fullmatch(r"[+-]?[0-9]+", cell.strip())), file=file)
        elif cell.strip().lower() in {"", "nan"}:
            self._empty = self._empty or (line, cell)
        elif self._word_line is None:
            self._word_line, self._word = line, cell

    def _add_numbers(self, cells: tuple[str, ...], *, is_whole: bool, file: str) -> None:
        if is_whole and self._is_whole:
            numbers = [int(cell) for cell in cells]
            self._least, self._most = min(self._least, *numbers), max(self._most, *numbers)
            if not _INT64.min <= self._least <= self._most <= _INT64.max:
                raise unreadable(file, f"column {self.name!r} holds whole numbers beyond 64 bits")
            return
        self._is_whole = False
        if max(abs(float(cell)) for cell in cells) > _FLOAT32_MAX:
            problem = f"column {self.name!r} holds numbers beyond the range of float32"
            raise unreadable(file, problem, hint="scale it first")

    def _refuse(self, cell: str, line: int, *, file: str) -> None:
        what = f"line {line} of {file!r} holds no number here"
        what += f", but line {self._number_line} does" if self._number_line else ", and no line does"
        hint = f"mend the cell, or take the column as text with --text {self.name}"
        if cell.strip().lower() in {"", "nan"}:
            hint = "fill what is missing first, or let it become NaN with --missing fill"
        raise InvalidField(field=f"columns.{self.name}", value=cell, problem=what, hint=hint)

    @property
    def _is_text(self) -> bool:
        return self._forced or self._number_line is None

    @property
    def _labels(self) -> list[str]:
        return sorted(self._words or ()) if self._is_text and not self._forced else []

    def settle(self, file: str) -> None:
        """Raises InvalidField if all cells were seen, and there was nothing in them."""
        if self._empty and not (self._forced or self._fills or self._number_line or self._word_line):
            self._refuse(self._empty[1], self._empty[0], file=file)

    def column(self) -> Column:
        """The column, once all cells were seen."""
        if self._labels:
            return Column(dtype="int64", shape=(), num_classes=len(self._labels), labels=tuple(self._labels))
        if self._is_text:
            return Column(dtype="uint8", shape=(), variable_length=True, encoding="utf-8")
        if not self._is_whole or self._empty:
            return Column(dtype="float32", shape=())
        classes = self._most + 1 if is_class(self.name) and self._least >= 0 else None
        return Column(dtype="int64", shape=(), num_classes=classes)

    def values(self, cells: tuple[str, ...]) -> Values:
        """Cells of the column as what it is."""
        if self._labels:
            numbers = {word: number for number, word in enumerate(self._labels)}
            return np.fromiter((numbers[cell] for cell in cells), np.int64, len(cells))
        if self._is_text:
            return ragged_bytes([cell.encode() for cell in cells])
        if self._is_whole and not self._empty:
            return np.fromiter(map(int, cells), np.int64, len(cells))
        found: Array = np.fromiter((float(cell.strip() or "nan") for cell in cells), np.float64, len(cells))
        return found.astype(np.float32)
