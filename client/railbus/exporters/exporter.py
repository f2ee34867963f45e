"""What every exporter does: it writes samples, some at a time, into a file or folder that does not exist yet.

`railbus.exporting` gives it a hidden name to write to, and the final name only once it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from railbus.importers.source import Report
from railbus.reading_rows import Rows
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import InvalidField

FILE_ENCODINGS: Final = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "image": "img"}
"""Encodings of image files, and the suffix of such a file."""
TEXT_ENCODINGS: Final = frozenset({"utf-8", "json"})


def _no_report(_stage: str, _done: int, _total: int | None) -> None:
    """For callers that watch nothing."""


@dataclass(frozen=True)
class ExportOptions:
    """How a dataset is to be written."""

    shard_bytes: int = 64 << 20
    """Size that files aim at, in formats of several."""
    report: Report = field(default=_no_report, compare=False)


class Exporter(Protocol):
    """Writes samples to a path; a folder for formats of several files. Raises InvalidField for what does not fit."""

    def __call__(self, rows: Rows, target: Path, options: ExportOptions) -> None: ...


def refused(name: str, column: Column, *, to: str, others: Sequence[str]) -> InvalidField:
    """The error for a column that has no place in a format."""
    shown = f"{column.dtype}{list(column.shape)}{' of variable length' if column.variable_length else ''}"
    return InvalidField(
        field=f"columns.{name}",
        value=f"{shown} {column.encoding}".strip(),
        problem=f"a column that has no place in {to}",
        hint=f"export to {' or '.join(others)}",
    )


def is_text(column: Column) -> bool:
    """Whether samples of a column are texts."""
    return column.variable_length and column.dtype == "uint8" and column.encoding in TEXT_ENCODINGS


def is_file(column: Column) -> bool:
    """Whether samples of a column are image files."""
    return column.variable_length and column.dtype == "uint8" and column.encoding in FILE_ENCODINGS
