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


def _printed(text: str) -> dict[str, object]:
    return {"type": "job.output", "time": clock.now(), "job": "j-1", "data": {"line": text}}


def test_of_a_long_line_that_a_job_printed_a_few_rows_are_shown_and_the_rest_is_counted() -> None:
    console = terminal(width=40)
    teller = Teller(console, rows=3)
    for text in ("x" * 8192, "short"):
        teller.tell(_printed(text))
    rows = written(console)
    assert sum(row.count("x") for row in rows) == 3 * (40 - 11) - len("| ")
    assert " ".join(" ".join(rows).split()).count(f"… {8192 - 85:,} characters more") == 1
    assert (len(rows) < 8, rows[-1][9:], teller.num_cut) == (True, "· | short", 1)


def test_in_a_pipe_and_where_nobody_says_otherwise_a_line_is_whole() -> None:
    pipe = Console(file=StringIO(), width=40, soft_wrap=True)
    for console, rows in ((pipe, 3), (terminal(width=40), None)):
        teller = Teller(console, rows=rows)
        teller.tell(_printed("x" * 8192))
        assert (sum(row.count("x") for row in written(console)), teller.num_cut) == (8192, 0)


def test_a_failure_is_told_in_whole_however_long() -> None:
    console = terminal(width=40)
    error = {"code": "TASK_ERROR", "message": "y" * 1000}
    Teller(console, rows=3).tell({"type": "job.failed", "time": clock.now(), "job": "j-1", "data": {"error": error}})
    assert sum(row.count("y") for row in written(console)) == 1000
