"""The story of events on a console, each line with its time; as JSON lines where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.story import STYLES, Line, Story
from railbus.cli.texts import one_line
from railbus_shared import clock

if TYPE_CHECKING:
    from rich.console import Console

_TIME_OF_DAY: Final = slice(11, 19)


class Teller:
    """Writes lines. With `begins_at` each carries the seconds since then, else its time of day in UTC."""

    def __init__(
        self, console: Console, *, begins_at: str = "", names_job: bool = False, metrics_s: float = 2.0
    ) -> None:
        self._console = console
        self._begin_ns = clock.parse_rfc3339(begins_at) if begins_at else None
        self._story = Story(metrics_s=metrics_s, names_job=names_job)

    def tell(self, event: Mapping[str, object]) -> None:
        """Write the line of an event, if it is worth one."""
        line = self._story.tell(event)
        if line is None:
            return
        self.say(line, time=str(event.get("time", "")))

    def say(self, line: Line, *, time: str = "") -> None:
        """Write a line of the caller's own, of now if no time is given."""
        when = one_line(self._when(time or clock.now()))
        if not self._console.is_terminal:
            click.echo(f"{when}  {line.text}", file=self._console.file)
            return
        from rich.text import Text

        style = STYLES[line.tone]
        self._console.print(Text.assemble((when, "dim"), " ", (line.symbol, style or "cyan"), " ", (line.text, style)))

    def _when(self, time: str) -> str:
        if self._begin_ns is None:
            return time[_TIME_OF_DAY] if self._console.is_terminal else time
        try:
            passed_s = (clock.parse_rfc3339(time) - self._begin_ns) / clock.NS_PER_S
        except ValueError:
            return " " * 8
        return f"{passed_s:7.2f}s"


def print_event(event: Mapping[str, object]) -> None:
    """One JSON line on stdout."""
    import orjson

    click.echo(orjson.dumps(event).decode())
