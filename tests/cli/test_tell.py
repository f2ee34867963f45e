"""How lines of a story stand on a terminal."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO

from rich.console import Console

from railbus.cli.event_lines import EventLines
from railbus.cli.story import Line
from railbus.cli.tell import Teller
from railbus_shared import clock

_YESTERDAY = clock.rfc3339(clock.now_ns() - timedelta(days=1) // timedelta(microseconds=1) * 1000)


def terminal(width: int = 80) -> Console:
    return Console(file=StringIO(), force_terminal=True, no_color=True, highlight=False, width=width)


def written(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return [line.replace("\x1b[2m", "").replace("\x1b[0m", "") for line in console.file.getvalue().splitlines()]


def test_a_day_is_named_where_it_is_not_today_and_where_it_changes() -> None:
    console, now = terminal(), clock.now()
    teller = Teller(console)
    for time in (now, now, _YESTERDAY, _YESTERDAY, now):
        teller.say(Line("a"), time=time)
    today, yesterday = f"{now[11:19]} • a", f"{_YESTERDAY[11:19]} • a"
    days = [f"— {_YESTERDAY[:10]} —", yesterday, yesterday, f"— {now[:10]} —", today]
    assert written(console) == [today, today, *days]


def test_seconds_since_a_beginning_need_no_day() -> None:
    console = terminal()
    Teller(console, begins_at=_YESTERDAY).say(Line("a"), time=_YESTERDAY)
    assert written(console) == ["   0.00s • a"]


def test_events_as_they_are_have_their_day_as_well() -> None:
    console = terminal()
    EventLines(console).write({"type": "app.done", "time": _YESTERDAY, "host": "h"})
    assert [line.split()[:2] for line in written(console)] == [
        ["—", _YESTERDAY[:10]],
        [_YESTERDAY[11:23], "app.done"],
    ]


def test_a_long_line_goes_on_below_its_beginning() -> None:
    console, now = terminal(width=30), clock.now()
    Teller(console).say(Line("a text that is broken between words\n    | quoted"), time=now)
    assert [line.rstrip() for line in written(console)] == [
        f"{now[11:19]} • a text that is",
        "           broken between",
        "           words",
        "    | quoted",
    ]
