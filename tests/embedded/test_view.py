"""What `railbus up` shows, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from railbus.embedded.supervisor import ServiceEvent
from railbus.embedded.view import Joined, View, wants_colour


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "expected"),
    [
        (_Terminal(), {}, True),
        (_Terminal(), {"TERM": "xterm"}, True),
        (_Terminal(), {"NO_COLOR": ""}, True),
        (_Terminal(), {"NO_COLOR": "1"}, False),
        (_Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(stream: io.StringIO, environ: dict[str, str], expected: bool) -> None:
    assert wants_colour(stream, environ) is expected


def test_elsewhere_an_event_is_a_plain_line_and_there_is_no_status() -> None:
    out = io.StringIO()
    view = View(out, is_live=False)
    view.event(ServiceEvent("runner", "ready", "http://127.0.0.1:8703"))
    view.status("4/4 ready")
    view.event(ServiceEvent("nats-server", "stopped"))
    view.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d\d:\d\d:\d\d runner {9}ready http://127\.0\.0\.1:8703", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d nats-server {4}stopped", lines[1])


def _screen(written: str) -> list[str]:
    """What a terminal shows after these bytes, without colours."""
    lines = [""]
    for part in re.split(r"(\r\x1b\[2K|\n)", re.sub(r"\x1b\[\d+m", "", written)):
        if part == "\n":
            lines.append("")
        elif part.startswith("\r"):
            lines[-1] = ""
        else:
            lines[-1] += part
    return lines


def test_on_a_terminal_the_status_stays_below_the_events() -> None:
    out = _Terminal()
    view = View(out, is_live=True)
    view.status("1/4 ready")
    view.event(ServiceEvent("runner", "ready"))
    view.status("2/4 ready")
    view.event(ServiceEvent("runner", "ended"))
    screen = _screen(out.getvalue())
    assert [line[9:].split() for line in screen[:2]] == [["runner", "ready"], ["runner", "ended"]]
    assert screen[2:] == ["2/4 ready"]
    view.close()
    assert _screen(out.getvalue())[2:] == [""]


def test_the_same_status_is_not_written_twice() -> None:
    out = _Terminal()
    view = View(out, is_live=True)
    view.status("4/4 ready")
    written = out.getvalue()
    view.status("4/4 ready")
    assert out.getvalue() == written


def test_names_have_a_colour_each_and_trouble_is_red() -> None:
    out = _Terminal()
    view = View(out, is_live=True)
    view.event(ServiceEvent("runner", "ready"))
    view.event(ServiceEvent("telemetry", "ready"))
    view.event(ServiceEvent("runner", "ready"))
    view.event(ServiceEvent("runner", "ended"))
    first, second, third, trouble = re.findall(r"\x1b\[(\d+)m(?=\w)", out.getvalue())
    assert first == third != second
    assert trouble == "31"


def test_the_line_to_submit_a_job_can_be_pasted_even_with_a_space_in_the_path() -> None:
    out = io.StringIO()
    key = Path("/my root/keys/user.nk")
    View(out, is_live=False).first_screen(
        Joined(Path("/my root"), "nats://127.0.0.1:1", key, "railbus.jobs.submit", {})
    )
    line = next(line for line in out.getvalue().splitlines() if "nats --server" in line)
    assert line.strip().startswith(
        "nats --server nats://127.0.0.1:1 --nkey '/my root/keys/user.nk' pub railbus.jobs.submit '{"
    )


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8", closefd=False) as out:
        view = View(out, is_live=False)
        view.event(ServiceEvent("runner", "ready"))
        view.event(ServiceEvent("runner", "ended"))
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, write)  # what is buffered must go somewhere when it is closed
    os.close(write)
    os.close(nothing)
