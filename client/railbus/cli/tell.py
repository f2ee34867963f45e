"""The story of events on a console, each line with its time; as JSON lines where they are asked for.

A terminal is told the time of day, and the day where it is another one than that of the line before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.story import STYLES, Line, Story
from railbus.cli.texts import one_line, shortened
from railbus_shared import clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SAID_BY_JOBS: Final = frozenset({"job.output", "log.line"})
_HEAD: Final = 11
"""Width of what stands before it, once it is told."""
_LEAST: Final = 16
"""Width of what is told, however narrow the terminal."""
_DAY: Final = slice(0, 10)
_IS_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d")
_TIME_OF_DAY: Final = slice(11, 19)


class Days:
    """Says on a terminal which day the lines below are of; nothing of today, as long as no other day was."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._day = clock.now()[_DAY]

    def come_to(self, time: str) -> None:
        """Before a line of that time, if it is one."""
        if time[_DAY] != self._day and _IS_DAY.fullmatch(time[_DAY]):
            self._day = time[_DAY]
            self._console.print(f"— {self._day} —", style="dim", markup=False)


class Teller:
    """Writes lines. With `begins_at` each carries the seconds since then, else its time of day in UTC.

    On a terminal, of what a job has printed or logged about so many `rows` of each line.
    """

    def __init__(
        self,
        console: Console,
        *,
        begins_at: str = "",
        names_job: bool = False,
        metrics_s: float = 2.0,
        rows: int | None = None,
    ) -> None:
        self.num_cut = 0
        """Lines of which not all was written."""
        self._most = rows * max(_LEAST, console.width - _HEAD) if rows is not None and console.is_terminal else None
        self._console = console
        self._begin_ns = clock.parse_rfc3339(begins_at) if begins_at else None
        self._days = Days(console)
        self._begun = partial(Story, metrics_s=metrics_s, names_job=names_job)
        self._story = self._begun()

    def tell(self, event: Mapping[str, object]) -> None:
        """Write the line of an event, if it is worth one."""
        line = self._story.tell(event)
        if line is None:
            return
        if self._most is not None and event.get("type") in _SAID_BY_JOBS:
            whole, line = line, Line(shortened(line.text, self._most), line.tone)
            self.num_cut += line != whole
        self.say(line, time=str(event.get("time", "")))

    def lines_of(self, events: Iterable[Mapping[str, object]]) -> list[tuple[Line, str]]:
        """Lines of events and their times, as if none was told before; what is told next goes on from them."""
        self._story = self._begun()
        told = ((self._story.tell(event), str(event.get("time", ""))) for event in events)
        return [(line, time) for line, time in told if line is not None]

    def say(self, line: Line, *, time: str = "") -> None:
        """Write a line of the caller's own, of now if no time is given."""
        time = time or clock.now()
        when = one_line(self._when(time))
        if not self._console.is_terminal:
            click.echo(f"{when}  {line.text}", file=self._console.file)
            return
        from rich.text import Text

        if self._begin_ns is None:
            self._days.come_to(time)
        style = STYLES[line.tone]
        head = Text.assemble((when, "dim"), " ", (line.symbol, style or "cyan"), " ")
        self._console.print(_hanging(head, Text(line.text, style), self._console))

    def _when(self, time: str) -> str:
        if self._begin_ns is None:
            return time[_TIME_OF_DAY] if self._console.is_terminal else time
        try:
            passed_s = (clock.parse_rfc3339(time) - self._begin_ns) / clock.NS_PER_S
        except ValueError:
            return " " * 8
        return f"{passed_s:7.2f}s"


def _hanging(head: Text, text: Text, console: Console) -> Text:
    """A text that goes on below its beginning where the terminal is narrow; lines of its own begin at the margin."""
    from rich.text import Text

    first, *rest = text.split("\n", allow_blank=True)
    piece, *pieces = first.wrap(console, max(_LEAST, console.width - head.cell_len)) or [Text()]
    below = "\n" + " " * head.cell_len
    shown = Text.assemble(head, piece)
    for more in pieces:
        shown = Text.assemble(shown, below, more)
    for line in rest:
        shown = Text.assemble(shown, "\n", line)
    return shown


def print_event(event: Mapping[str, object]) -> None:
    """One JSON line on stdout."""
    import orjson

    click.echo(orjson.dumps(event).decode())
