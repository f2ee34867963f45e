"""`.jsonl` and `.csv`: a line for each sample. JSON has no NaN: it is written as `null`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from railbus.exporters.exporter import ExportOptions, is_file, is_text, refused
from railbus.importers.source import Values, num_samples
from railbus.reading_rows import Rows, as_numbers
from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.ragged import Ragged
from railbus_shared.errors import InvalidField


def write_jsonl(rows: Rows, target: Path, options: ExportOptions) -> None:
    """Numbers, lists, texts; what is JSON stays as it is."""
    for name, column in rows.columns.items():
        if is_file(column):
            raise refused(name, column, to="JSON lines", others=["parquet", "webdataset", "mds"])
    with target.open("wb") as file:
        for row in _rows(rows, options, embeds_json=True):
            file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


def write_csv(rows: Rows, target: Path, options: ExportOptions) -> None:
    """Numbers and texts under a first line of names."""
    for name, column in rows.columns.items():
        if not is_text(column) and (column.variable_length or column.shape):
            raise refused(name, column, to="CSV", others=["jsonl", "parquet", "npz"])
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows.columns)
        writer.writerows(row.values() for row in _rows(rows, options, embeds_json=False))


def _rows(rows: Rows, options: ExportOptions, *, embeds_json: bool) -> Iterator[dict[str, Any]]:
    for chunk in rows.chunks(report=options.report):
        columns = {
            name: _values(name, rows.columns[name], values, embeds_json=embeds_json) for name, values in chunk.items()
        }
        for at in range(num_samples(chunk)):
            yield {name: values[at] for name, values in columns.items()}


def _values(name: str, column: Column, values: Values, *, embeds_json: bool) -> list[Any]:
    """Samples of a column as plain Python values."""
    if not isinstance(values, Ragged):
        plain: list[Any] = as_numbers(values, column).tolist()
        return [int(one) for one in plain] if column.dtype == "bool" and not embeds_json else plain
    if not is_text(column):
        return [as_numbers(values[row], column).tolist() for row in range(len(values))]
    found = [text_of(name, values[row].tobytes()) for row in range(len(values))]
    if column.encoding != "json" or not embeds_json:
        return found
    return [orjson.Fragment(one) for one in found]


def text_of(name: str, data: bytes) -> str:
    """A sample of a column of texts; raises InvalidField if it is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise InvalidField(field=f"columns.{name}", value=data[:40], problem=f"not the UTF-8 it says: {exc}") from exc
