"""How data looks: tables that are easy to read on a terminal, and plain columns for programs.

On a terminal numbers are made human ("2m ago", "1.2 MB") and words have colours. On a pipe, or with NO_COLOR, CI or
TERM=dumb, everything is said in full: RFC 3339 times, bytes, no colour, nothing cut.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TextIO

import click

from railbus_shared import clock

if TYPE_CHECKING:
    from rich.console import Console

    from railbus_shared.contracts.jobs import JobRecord

Kind = Literal["text", "brief", "id", "number", "bytes", "time", "until", "state", "hash"]
Cell = str | int | float | None

STATE_STYLES: Final[Mapping[str, str]] = {
    "queued": "yellow",
    "placed": "cyan",
    "running": "blue",
    "checkpointing": "blue",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "magenta",
    "held": "yellow",
    "cordoned": "red",
    "free": "green",
    "leased": "blue",
    "reclaiming": "yellow",
    "draining": "yellow",
    "unhealthy": "red",
    "ok": "green",
    "valid": "green",
    "warn": "yellow",
    "fail": "red",
    "damaged": "red",
    "proven": "green",
    "unknown": "yellow",
    "broken": "red",
}
_PLAIN_SETTINGS: Final = ("NO_COLOR", "CI")
_HASH_SHOWN: Final = 12
_GAP: Final = 2
"""Between two columns of a table."""
_LEAST: Final = 16
"""Width of a cell that is cut, however narrow the terminal."""


@dataclass(frozen=True)
class Column:
    """A column and what its cells are."""

    title: str
    kind: Kind = "text"
    """Where the terminal is narrow, text is folded, what is brief is cut, and all else stays as it is."""


def is_plain(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written there is for a program, or for a terminal that can do nothing."""
    return not stream.isatty() or environ.get("TERM") == "dumb" or any(environ.get(name) for name in _PLAIN_SETTINGS)


def show(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], *, console: Console) -> None:
    """A table: drawn on a terminal, plain columns elsewhere."""
    if not console.is_terminal:
        click.echo(plain_table(columns, rows), file=console.file)
        return
    from rich.table import Table
    from rich.text import Text

    now_ns = clock.now_ns()
    texts = [
        [humane(cell, column.kind, now_ns=now_ns) for cell, column in zip(row, columns, strict=True)] for row in rows
    ]
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold dim")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.kind in {"number", "bytes"} else "left",
            overflow="fold",
            no_wrap=column.kind != "text",
        )
    for row_texts in _cut(columns, texts, width=console.width):
        cells = zip(row_texts, columns, strict=True)
        table.add_row(*(Text(text, style=_style(text, column.kind)) for text, column in cells))
    console.print(table)


def _cut(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, width: int) -> Iterator[list[str]]:
    """The rows with what is brief cut to what the other columns leave of the width."""
    longest = [max(map(len, texts)) for texts in zip([column.title for column in columns], *rows, strict=True)]
    is_brief = [column.kind == "brief" for column in columns]
    taken = sum(length + _GAP for length, brief in zip(longest, is_brief, strict=True) if not brief)
    left = max(_LEAST, width - taken)
    for row in rows:
        yield [
            f"{text[: left - 1]}…" if brief and len(text) > left else text
            for text, brief in zip(row, is_brief, strict=True)
        ]


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> str:
    """The table as aligned text: two spaces between columns, nothing shortened, `-` for what is not there."""
    lines = [[column.title for column in columns], *([_full(cell) for cell in row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def say(text: str, *, console: Console) -> None:
    """A sentence, broken between words where the terminal is narrow."""
    if not console.is_terminal:
        click.echo(text, file=console.file)
        return
    from rich.text import Text

    console.print(Text(text))


def show_pairs(pairs: Mapping[str, Cell], *, console: Console) -> None:
    """Names and values, one a line; on a terminal a long value goes on below its beginning."""
    width = max(len(name) for name in pairs)
    for name, value in pairs.items():
        if not console.is_terminal:
            click.echo(f"{name.ljust(width)}  {_full(value)}", file=console.file)
            continue
        left = max(_LEAST, console.width - width - _GAP)
        lines = textwrap.wrap(_full(value), left, break_long_words=False, break_on_hyphens=False) or [""]
        below = "\n" + " " * (width + _GAP)
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {below.join(lines)}", file=console.file)


def to_console(stream: TextIO | None = None) -> Console:
    """A console for stdout, or for the stream that is given; plain where it has to be."""
    import sys

    from rich.console import Console

    target = stream or sys.stdout
    plain = is_plain(target)
    return Console(file=target, force_terminal=not plain, no_color=plain, highlight=False, soft_wrap=plain)


def humane(value: Cell, kind: Kind, *, now_ns: int) -> str:
    """A value for people."""
    if value is None or value == "":
        return "–"
    if kind == "bytes" and isinstance(value, int):
        return size(value)
    if kind in {"time", "until"} and isinstance(value, str):
        return ago(value, now_ns=now_ns) if kind == "time" else until(value, now_ns=now_ns)
    if kind == "hash" and isinstance(value, str):
        return f"{value[:_HASH_SHOWN]}…"
    if kind == "number" and isinstance(value, int):
        return f"{value:,}"
    return _full(value)


def size(num_bytes: int) -> str:
    """Bytes in decimal units: `1.2 MB`."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def ago(time: str, *, now_ns: int) -> str:
    """How long ago a time was: `2m ago`; `just now` for the last second and the future."""
    passed_s = (now_ns - clock.parse_rfc3339(time)) / clock.NS_PER_S
    return "just now" if passed_s < 1 else f"{duration(round(passed_s))} ago"


def until(time: str, *, now_ns: int) -> str:
    """How far ahead a time is: `in 2m`; `now` for the next second and the past."""
    left_s = (clock.parse_rfc3339(time) - now_ns) / clock.NS_PER_S
    return "now" if left_s < 1 else f"in {duration(round(left_s))}"


def duration(seconds: float) -> str:
    """A length of time in at most two units: `0.4s`, `12s`, `3m 5s`, `2h 10m`, `4d 1h`; tenths only of a float."""
    if seconds < 10 and isinstance(seconds, float):
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit_s, unit, rest_s, rest in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit_s:
            less = whole % unit_s // rest_s
            return f"{whole // unit_s}{unit} {less}{rest}" if less else f"{whole // unit_s}{unit}"
    return f"{whole}s"


def print_json(value: object) -> None:
    """One JSON document on stdout: indented on a terminal, one line elsewhere."""
    import sys

    import orjson

    indent = 0 if is_plain(sys.stdout) else orjson.OPT_INDENT_2
    click.echo(orjson.dumps(value, option=indent).decode())


def shown_state(record: JobRecord) -> str:
    """A job's state in one word, where what a person did to it is the better one."""
    return "held" if record.state == "queued" and record.held_by else record.state


def _full(value: Cell) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _style(text: str, kind: Kind) -> str:
    if kind == "state":
        return STATE_STYLES.get(text, "")
    return "dim" if kind in {"time", "until", "hash"} else ""
