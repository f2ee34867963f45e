"""`.jsonl`: one JSON map a line. A first pass finds what each field is over the whole file, a second one reads it.

Numbers are int64 where all are whole, else float32. Texts are UTF-8 of variable length. Lists of numbers have a fixed
shape where all are alike, and a variable length where they are not. What is no plain value (maps, lists of words) is
kept as JSON. A field that mixes kinds is refused with its line, unless `--text` names it; then it is kept as JSON, or
as text where it is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import orjson

from railbus.importers.json_kinds import Kind
from railbus.importers.lines import lines
from railbus.importers.source import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Chunk,
    Options,
    Outline,
    check_text_columns,
    column_names,
    unreadable,
)

_SHOWN: Final = 80


class JsonLines:
    """A file of JSON maps."""

    def __init__(self, path: Path, options: Options) -> None:
        """Reads the whole file once. Raises InvalidField naming line and field of what does not fit."""
        self._path = path
        self._options = options
        self._kinds: dict[str, Kind] = {}
        samples = 0
        for numbers, rows in self._blocks("looking"):
            self._see_block(numbers, rows, is_first=samples == 0)
            samples += len(rows)
        if not self._kinds:
            raise unreadable(path.name, "it holds no rows with fields", hint="give one JSON map a line")
        self._names = column_names(self._kinds)
        check_text_columns(options, self._kinds, file=path.name)
        for kind in self._kinds.values():
            kind.settle()
        size = path.stat().st_size // samples
        columns = {name: self._kinds[key].column() for key, name in self._names.items()}
        self.outline = Outline(columns=columns, samples=samples, sample_bytes=size)

    def _see_block(self, numbers: list[int], rows: list[Mapping[str, Any]], *, is_first: bool) -> None:
        if is_first:
            self._see(numbers[0], rows[0], is_first=True)
        start = int(is_first)
        if all(row.keys() == self._kinds.keys() for row in rows):
            for key, kind in self._kinds.items():
                kind.see_all([row[key] for row in rows[start:]], lines=numbers[start:])
        else:
            for number, row in zip(numbers[start:], rows[start:], strict=True):
                self._see(number, row, is_first=False)

    def _see(self, number: int, row: Mapping[str, object], *, is_first: bool) -> None:
        for key in row:
            if key not in self._kinds:
                self._kinds[key] = Kind(key, file=self._path.name, options=self._options)
                if not is_first:
                    self._kinds[key].see(None, line=number - 1)
        for key, kind in self._kinds.items():
            kind.see(row.get(key), line=number)

    def chunks(self) -> Iterator[Chunk]:
        for _, rows in self._blocks("reading"):
            yield self._chunk(rows)

    def _chunk(self, rows: list[Mapping[str, Any]]) -> Chunk:
        return {name: self._kinds[key].values([row.get(key) for row in rows]) for key, name in self._names.items()}

    def _blocks(self, stage: str) -> Iterator[tuple[list[int], list[Mapping[str, Any]]]]:
        """Some maps at a time, with their line numbers; empty lines are passed over."""
        numbers: list[int] = []
        rows: list[Mapping[str, Any]] = []
        size = 0
        for number, line in enumerate(lines(self._path, report=self._options.report, stage=stage), 1):
            if not line.strip():
                continue
            numbers.append(number)
            rows.append(self._row(number, line))
            size += len(line)
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield numbers, rows
                numbers, rows, size = [], [], 0
        if rows:
            yield numbers, rows

    def _row(self, number: int, line: str) -> Mapping[str, Any]:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            problem = f"line {number} is not valid JSON: {exc}: {line[:_SHOWN]!r}"
            raise unreadable(self._path.name, problem) from exc
        if not isinstance(row, dict):
            raise unreadable(self._path.name, f"line {number} is no map: {line[:_SHOWN]!r}")
        return cast("Mapping[str, Any]", row)
