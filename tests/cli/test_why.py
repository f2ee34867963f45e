"""Why a job waits, as a person reads it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from railbus.cli.why import show_why
from railbus_shared import clock
from railbus_shared.contracts.waiting import Why

_SOON = clock.rfc3339(clock.now_ns() + 10_790 * clock.NS_PER_S)  # is in 2 h for an hour; tests may begin late
_LATER = clock.rfc3339(clock.now_ns() + 475_000 * clock.NS_PER_S)
_WHY = Why.parse(
    {
        "job": "j-4f09ac-17",
        "state": "queued",
        "headline": "resources",
        "text": "2 gpus with at least 40 GB are wanted on one host, and at most 1 is free",
        "place": 3,
        "ahead": ["j-4f09ac-12", "j-4f09ac-15"],
        "hosts": [
            {"host": "alpha", "word": "resources", "text": "1 of 4 is free, 2 are wanted", "fitting": 4, "free": 1},
            {"host": "beta", "word": "no_such_device", "text": "its gpus have 24 GB", "fitting": 0, "free": 0},
            {"host": "gamma", "word": "out_of_service", "text": "it is drained", "fitting": 8, "free": 0},
        ],
        "holders": [
            {"device": "alpha-gpu0", "holder": "j-4f09ac-9", "owner": "ana", "state": "running", "expected_end": _SOON},
            {"device": "alpha-gpu1", "holder": "sweep-with-a-long-name-2a238d-17", "owner": "ben", "state": "running"},
            {"device": "alpha-gpu2", "holder": "ana-4711-3f2a"},
        ],
        "expected_start": _LATER,
        "expected_basis": "time limits of 2 jobs",
    }
)


def _shown(why: Why, *, width: int | None = None) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, no_color=True, highlight=False)
    show_why(why, title="job j-4f09ac-17", console=console)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def test_the_headline_comes_first_and_everything_behind_it_is_told() -> None:
    lines = _shown(_WHY).splitlines()
    assert lines[0].startswith("job j-4f09ac-17: 2 gpus with at least 40 GB")
    assert lines[1].split() == ["why", "resources"]
    assert "3 in the queue, behind j-4f09ac-15, j-4f09ac-12" in lines[2]
    assert "(time limits of 2 jobs)" in lines[3]
    told = "\n".join(lines)
    for word in ("alpha", "its gpus have 24 GB", "it is drained", "alpha-gpu2", "by hand", "ben", _SOON):
        assert word in told


def test_a_terminal_of_80_columns_is_enough() -> None:
    shown = _shown(_WHY, width=80)
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "in 2h " in shown
    assert "in 5d " in shown


@pytest.mark.parametrize("empty", [{"hosts": (), "holders": ()}, {"place": None, "expected_start": None}])
def test_what_is_not_known_is_left_out(empty: dict[str, object]) -> None:
    shown = _shown(_WHY.changed(**empty))
    assert "None" not in shown
    assert shown.startswith("job j-4f09ac-17: ")


def test_a_start_that_nobody_can_tell_says_why_not() -> None:
    shown = _shown(_WHY.changed(expected_start=None, expected_basis="j-4f09ac-9 has no time limit"))
    assert "not known (j-4f09ac-9 has no time limit)" in shown


def test_many_holders_do_not_fill_the_screen() -> None:
    many = tuple(_WHY.holders[0].changed(device=f"alpha-gpu{number}") for number in range(60))
    assert len(_shown(_WHY.changed(holders=many)).splitlines()) < 40
