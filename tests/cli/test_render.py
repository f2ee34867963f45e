"""Tables and figures, for people and for programs."""

from __future__ import annotations

import io
import os
import pty

import click
import pytest
from rich.console import Console

from cluster_for_tests import active
from railbus.cli.jobs import where_or_why
from railbus.cli.render import Cell, Column, ago, duration, humane, is_plain, plain_table, show, show_pairs, size, until
from railbus_shared import clock

_COLUMNS = (Column("JOB"), Column("STATE", "state"), Column("SIZE", "bytes"), Column("WHEN", "time"))
_ROWS: list[list[Cell]] = [
    ["j-4f09ac-17", "running", 1_234_567, clock.rfc3339(0)],
    ["j-1", "queued", None, clock.rfc3339(10**12)],
]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (1_234_567, "1.2 MB"), (5 * 10**15, "5000 TB")],
)
def test_sizes_are_short(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (0.44, "0.4s"),
        (12.3, "12s"),
        (60, "1m"),
        (185, "3m 5s"),
        (7200, "2h"),
        (7830, "2h 10m"),
        (90_000, "1d 1h"),
    ],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("passed_s", "text"), [(-5, "just now"), (0.2, "just now"), (130, "2m 10s ago")])
def test_times_are_told_from_now(passed_s: float, text: str) -> None:
    assert ago(clock.rfc3339(10**18), now_ns=10**18 + int(passed_s * 1e9)) == text


@pytest.mark.parametrize(("left_s", "text"), [(-5, "now"), (0.2, "now"), (130, "in 2m 10s"), (7200, "in 2h")])
def test_times_to_come_are_told_from_now(left_s: float, text: str) -> None:
    assert until(clock.rfc3339(10**18 + int(left_s * 1e9)), now_ns=10**18) == text


def test_programs_get_everything_in_full() -> None:
    lines = plain_table(_COLUMNS, _ROWS).splitlines()
    assert lines[0].split() == ["JOB", "STATE", "SIZE", "WHEN"]
    assert lines[1].split() == ["j-4f09ac-17", "running", "1234567", "1970-01-01T00:00:00.000000000Z"]
    assert lines[2].split() == ["j-1", "queued", "-", "1970-01-01T00:16:40.000000000Z"]
    assert len({line.index(word) for line, word in zip(lines, ["STATE", "running", "queued"], strict=True)}) == 1


def test_people_get_a_table_that_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), record=True, width=80, force_terminal=True)
    long: list[list[Cell]] = [["j-4f09ac-17", "running", 1_234_567, clock.rfc3339(0)] for _ in range(3)]
    show(_COLUMNS, long, console=console)
    text = console.export_text()
    assert "1.2 MB" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_long_values_of_pairs_go_on_below_their_beginning_on_a_terminal_and_stay_whole_for_programs() -> None:
    value = " ".join(["word"] * 30)
    terminal, pipe = io.StringIO(), io.StringIO()
    show_pairs({"why": value}, console=Console(file=terminal, width=80, force_terminal=True))
    show_pairs({"why": value}, console=Console(file=pipe, width=80))
    first, below = click.unstyle(terminal.getvalue()).splitlines()
    assert (first[:9], below[:9], " ".join((first[5:], below[5:]))) == ("why  word", "     word", value)
    assert max(len(first), len(below)) <= 80
    assert pipe.getvalue() == f"why  {value}\n"


def test_what_is_brief_stays_on_one_line_of_a_terminal_and_whole_for_programs() -> None:
    columns, row = (Column("JOB", "id"), Column("WHY", "brief")), ["j-1", "waits for a device " * 8]
    terminal, pipe = io.StringIO(), io.StringIO()
    show(columns, [row], console=Console(file=terminal, width=40, force_terminal=True, no_color=True))
    show(columns, [row], console=Console(file=pipe, width=40))
    assert len(terminal.getvalue().splitlines()) == 2
    assert "…" in terminal.getvalue()
    assert str(row[1]).strip() in pipe.getvalue()


@pytest.mark.parametrize(
    ("environ", "plain"),
    [
        ({}, False),
        ({"NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, True),
        ({"CI": "true"}, True),
        ({"NO_COLOR": ""}, False),
    ],
)
def test_a_terminal_is_plain_only_where_it_is_asked_for(environ: dict[str, str], plain: bool) -> None:
    main_end, terminal_end = pty.openpty()
    with os.fdopen(terminal_end, "w") as terminal:
        assert is_plain(terminal, environ) is plain
    os.close(main_end)


def test_a_pipe_is_always_plain() -> None:
    assert is_plain(io.StringIO(), {})


@pytest.mark.parametrize("kind", ["text", "number", "bytes", "time", "state", "hash"])
def test_what_is_not_there_is_a_dash(kind: str) -> None:
    assert humane(None, kind, now_ns=0) == "–"  # type: ignore[arg-type]


def test_a_job_that_stands_still_says_why_instead_of_where() -> None:
    trains = active("j-1", "a-cpu0")
    assert where_or_why(trains) == "a-cpu0"
    assert where_or_why(trains.changed(reason="paused for storage: no space left")).startswith("paused for storage")
