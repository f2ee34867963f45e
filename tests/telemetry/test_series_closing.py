"""Lines that come while a period is being closed: they wait for nothing, have a file of their own, and are there once.

`meanwhile` does something in the midst of a closing, where that asks whether there is still time; it would wait for
ever if a closing kept appends waiting.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from railbus_shared import clock, files
from railbus_shared.layout import Layout
from railbus_shared.log_reader import read_events
from railbus_telemetry import closing
from railbus_telemetry.lines import DAY_NS
from railbus_telemetry.series import LogSeries
from written_logs import BEGUN, CLOSED, HOUR_NS, NOON_NS, PLAIN, lines, tree

Writer = Callable[[], LogSeries]


@pytest.fixture
def start(layout: Layout) -> Writer:
    """A writer as a start of the service makes it; an earlier one of the test is as good as killed."""
    return lambda: LogSeries(layout, rotation="hourly", incarnation="4f", now_ns=lambda: NOON_NS)


def numbers(layout: Layout) -> list[int]:
    return [int(str(event["number"])) for event in read_events(layout)]


def meanwhile(work: Callable[[], object]) -> Callable[[], bool]:
    left = [work]

    def is_stopping() -> bool:
        if left:
            left.pop()()
        return False

    return is_stopping


def failing(writer: LogSeries, monkeypatch: pytest.MonkeyPatch, *, work: Callable[[], object] = lambda: None) -> None:
    """A closing that fails where what was written is compared, after some work."""

    def _member_is(*_: object) -> bool:
        work()
        return False

    with monkeypatch.context() as patched:
        patched.setattr(closing, "_member_is", _member_is)
        with pytest.raises(OSError, match="reads back differently"):
            writer.close_all()


def test_what_comes_while_a_period_is_closed_stands_beside_it_and_takes_its_name(layout: Layout, start: Writer) -> None:
    writer = start()
    writer.append(lines(1))
    seen: list[object] = []

    def append() -> None:
        writer.append([*lines(1, 2), *lines(3, at_ns=NOON_NS - DAY_NS)])
        writer.append(lines(4))
        seen.extend([tree(layout), numbers(layout)])

    assert writer.close_all(is_stopping=meanwhile(append)) == [layout.logs / CLOSED]
    late = "2026/11/22/trainer.log.jsonl"
    assert seen == [{late: [3], PLAIN: [1], BEGUN: [2, 4]}, [3, 1, 2, 4]]
    assert tree(layout) == {late: [3], CLOSED: [1], PLAIN: [2, 4]}
    writer.append(lines(5))
    assert tree(layout)[PLAIN] == [2, 4, 5], "it is the same file, under another name"
    writer.close_all()
    assert tree(layout) == {f"{late}.gz": [3], CLOSED: [1, 2, 4, 5]}


def test_a_period_of_a_past_day_is_closed_while_more_of_that_day_comes(layout: Layout, start: Writer) -> None:
    writer = start()
    past_ns = NOON_NS - DAY_NS
    writer.append(lines(1, at_ns=past_ns))
    writer.close_all(is_stopping=meanwhile(lambda: writer.append([*lines(2, at_ns=past_ns), *lines(3)])))
    assert not writer.due(NOON_NS)
    assert writer.set_aside(min(writer.open_days)) is None
    later_ns = NOON_NS + 60 * clock.NS_PER_S
    assert writer.due(later_ns)
    writer.rotate(later_ns)
    assert tree(layout) == {"2026/11/22/trainer.log.jsonl.gz": [1, 2], PLAIN: [3]}


def test_a_day_that_is_being_closed_is_not_removed(layout: Layout, start: Writer) -> None:
    writer = start()
    writer.append(lines(1, at_ns=NOON_NS - DAY_NS))
    (day,) = writer.open_days
    tried: list[object] = []
    writer.close_all(is_stopping=meanwhile(lambda: tried.append((writer.open_days, writer.set_aside(day)))))
    assert tried == [(frozenset({day}), None)]
    assert writer.set_aside(day) is not None


def test_what_was_begun_beside_a_closing_that_failed_waits_for_it(
    layout: Layout, start: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start()
    writer.append(lines(1))
    failing(writer, monkeypatch, work=lambda: writer.append(lines(2)))
    assert tree(layout) == {PLAIN: [1], BEGUN: [2]}
    assert writer.due(NOON_NS)
    failing(writer, monkeypatch, work=lambda: writer.append(lines(3)))
    assert tree(layout) == {PLAIN: [1], BEGUN: [2, 3]}
    assert numbers(layout) == [1, 2, 3]
    assert writer.rotate(NOON_NS) == [layout.logs / CLOSED]
    assert tree(layout) == {CLOSED: [1], PLAIN: [2, 3]}
    assert not list(layout.logs.glob("*/*/*/.*.tmp"))


def test_a_file_that_could_not_be_closed_grows_no_more(
    layout: Layout, start: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start()
    writer.append(lines(1))
    failing(writer, monkeypatch)
    writer.append(lines(2))
    assert tree(layout) == {PLAIN: [1], BEGUN: [2]}
    writer.close_all()
    assert tree(layout) == {CLOSED: [1, 2]}


def test_both_that_wait_are_closed_one_after_the_other(
    layout: Layout, start: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = start()
    writer.append(lines(1))
    failing(writer, monkeypatch, work=lambda: writer.append(lines(2)))
    assert writer.rotate(NOON_NS + HOUR_NS) == [layout.logs / CLOSED]
    assert tree(layout) == {CLOSED: [1, 2]}


def test_a_disk_that_fails_when_the_closed_file_was_replaced_doubles_nothing(
    layout: Layout, start: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines stand in both then; what comes goes beside them, and the next closing only removes the plain file."""
    writer = start()
    writer.append(lines(1))

    def fsync_dir(path: Path) -> None:
        raise OSError(errno.EIO, "broken", str(path))

    fsync = files.fsync_dir
    with monkeypatch.context() as patched:
        patched.setattr(files, "fsync_dir", lambda path: fsync(path) if path == layout.logs else fsync_dir(path))
        with pytest.raises(OSError, match="broken"):
            writer.close_all()
    assert tree(layout) == {CLOSED: [1], PLAIN: [1]}
    writer.append(lines(1, 2))
    assert tree(layout) == {CLOSED: [1], PLAIN: [1], BEGUN: [2]}
    assert numbers(layout) == [1, 2]
    writer.rotate(NOON_NS)
    assert tree(layout) == {CLOSED: [1], PLAIN: [2]}


@pytest.mark.parametrize("is_open", [True, False])
def test_a_start_finds_both_files_whatever_the_closing_had_come_to(
    layout: Layout, start: Writer, is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain file is not closed, or it is; what was begun has a torn tail."""
    writer = start()
    writer.append(lines(1))
    plain = (layout.logs / PLAIN).read_bytes()
    if is_open:
        failing(writer, monkeypatch, work=lambda: writer.append(lines(2)))
    else:
        writer.close_all(is_stopping=meanwhile(lambda: writer.append(lines(2))))
        (layout.logs / PLAIN).rename(layout.logs / BEGUN)
        (layout.logs / PLAIN).write_bytes(plain)
    with (layout.logs / BEGUN).open("ab") as file:
        file.write(b'{"v":1,"producer":"p","num')
    again = start()
    assert tree(layout) == ({PLAIN: [1], BEGUN: [2]} if is_open else {CLOSED: [1], PLAIN: [2]})
    assert again.due(NOON_NS) is is_open
    again.append(lines(1, 2, 3))
    assert numbers(layout) == [1, 2, 3]
    again.close_all()
    assert tree(layout) == {CLOSED: [1, 2, 3]}


@pytest.mark.parametrize("torn", [b"", b'{"v":1'])
def test_a_start_takes_a_file_that_was_begun_for_the_plain_one_where_that_is_gone_or_the_other_way(
    layout: Layout, start: Writer, torn: bytes
) -> None:
    start().append(lines(1))
    (layout.logs / PLAIN).rename(layout.logs / BEGUN)
    if torn:
        (layout.logs / PLAIN).write_bytes((layout.logs / BEGUN).read_bytes())
        (layout.logs / BEGUN).write_bytes(torn)
    again = start()
    assert tree(layout) == {PLAIN: [1]}
    again.append(lines(1, 2))
    assert tree(layout) == {PLAIN: [1, 2]}


@pytest.mark.parametrize("gone", [PLAIN, BEGUN])
def test_a_file_that_someone_removes_while_it_is_closed_stops_nothing(
    layout: Layout, start: Writer, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = start()
    writer.append(lines(1))

    def remove() -> None:
        writer.append(lines(2))
        (layout.logs / gone).unlink()

    with contextlib.suppress(FileNotFoundError):
        writer.close_all(is_stopping=meanwhile(remove))
    writer.append(lines(3))
    writer.close_all()
    writer.append(lines(4))
    assert tree(layout) == {CLOSED: [2, 3] if gone == PLAIN else [1, 3], PLAIN: [4]}
