"""Tables of `railbus watch`: columns that give way in an order of their own where the screen is narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.text import Text

_GAP: Final = 1


@dataclass(frozen=True)
class Column:
    """A title, and on which side its cells stand."""

    title: str
    is_number: bool = False


@dataclass(frozen=True)
class Yielding:
    """A column that gives way where room is short, down to this width; at 0 it goes, with its title."""

    column: str
    least: int


def widths(natural: dict[str, int], order: Sequence[Yielding], *, room: int) -> dict[str, int]:
    """How wide each column is so that all fit into the room, as far as those that yield can see to it."""
    found = dict(natural)
    for one in order:
        over = _total(found) - room
        if over > 0:
            found[one.column] = max(one.least, min(found[one.column], found[one.column] - over))
    return found


def _total(found: dict[str, int]) -> int:
    shown = [width for width in found.values() if width]
    return sum(shown) + _GAP * max(len(shown) - 1, 0)


def natural_widths(columns: Sequence[Column], rows: Sequence[Sequence[Text]]) -> dict[str, int]:
    """How wide each column would like to be."""
    return {
        column.title: max([cell_len(column.title), *(row[at].cell_len for row in rows)])
        for at, column in enumerate(columns)
    }


def lines(columns: Sequence[Column], rows: Sequence[Sequence[Text]], fitted: dict[str, int]) -> list[Text]:
    """The titles, and a line for each row; cells that are too long are cut and say so."""
    titles = [Text(column.title, style="bold dim") for column in columns]
    return [_line(columns, row, fitted) for row in (titles, *rows)]


def _line(columns: Sequence[Column], row: Sequence[Text], fitted: dict[str, int]) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    shown = [(column, cell) for column, cell in zip(columns, row, strict=True) if fitted[column.title]]
    for at, (column, cell) in enumerate(shown):
        width = fitted[column.title]
        cut = cell.copy()
        cut.truncate(width, overflow="ellipsis")
        cut.align("right" if column.is_number else "left", width)
        line.append(" " * _GAP if at else "")
        line.append_text(cut)
    return line
