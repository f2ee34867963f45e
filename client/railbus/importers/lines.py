"""Lines of a text file, each of bounded length, with faults that name file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from railbus.importers.source import Report, unreadable

MAX_LINE_BYTES: Final = 64 << 20
"""A longer line is taken for a file of another kind: it would have to be held in memory."""
_REPORT_LINES: Final = 4096
_BOM: Final = b"\xef\xbb\xbf"


def lines(path: Path, *, report: Report, stage: str) -> Iterator[str]:
    """Lines as they stand, with their ends; raises InvalidField for one that is too long or not UTF-8."""
    size = path.stat().st_size
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise unreadable(path.name, f"line {number} is longer than {MAX_LINE_BYTES} bytes")
            if number == 1:
                line = line.removeprefix(_BOM)
            try:
                yield line.decode()
            except UnicodeDecodeError as exc:
                raise unreadable(path.name, f"line {number}: {exc}", hint="save it as UTF-8 text") from exc
            if number % _REPORT_LINES == 0:
                report(stage, file.tell(), size)
        report(stage, size, size)
