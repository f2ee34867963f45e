"""The logs tree on a real disk: days, periods, duplicates, restarts, damage and a full disk."""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus_shared import clock
from railbus_shared.errors import StorageFull
from railbus_shared.layout import LOG_NAME, Layout
from railbus_telemetry import appending, closing
from railbus_telemetry.lines import DAY_NS
from railbus_telemetry.periods import Rotation
from written_logs import CLOSED, HOUR_NS, NOON_NS, PLAIN, Clock, lines, new, numbers_in, run, series, tree


def test_appended_lines_stand_in_the_plain_file_of_their_day(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    assert new(writer.append(lines(1, 2))) == 2
    assert new(writer.append(lines(3))) == 1
    assert new(writer.append([])) == 0
    assert tree(layout) == {PLAIN: [1, 2, 3]}


def test_what_comes_twice_is_written_once(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    assert new(writer.append(lines(1, 2, 1))) == 2
    assert new(writer.append([*lines(2, 3), *lines(2, producer="p-2")])) == 2
    assert tree(layout) == {PLAIN: [1, 2, 3, 2]}


def test_more_lines_than_one_call_can_write_are_written_in_their_order(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    numbers = list(range(1, 2 * os.sysconf("SC_IOV_MAX") + 100))
    assert new(writer.append(lines(*numbers))) == len(numbers)
    assert tree(layout) == {PLAIN: numbers}


def test_closing_makes_a_day_that_zcat_reads_and_the_standard_library_too(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    for number in (1, 2, 3):
        writer.append(lines(number, pad=100_000))
        assert [str(path.relative_to(layout.logs)) for path in writer.close_all()] == [CLOSED]
    assert writer.close_all() == []
    assert tree(layout) == {CLOSED: [1, 2, 3]}
    with gzip.open(layout.logs / CLOSED) as file:
        assert len(file.read().splitlines()) == 3


@pytest.mark.parametrize(
    ("rotation", "later_ns", "is_due"),
    [
        ("hourly", 0, False),
        ("hourly", HOUR_NS - 1, False),
        ("hourly", HOUR_NS, True),
        ("hourly", -1, True),
        ("hourly", 24 * HOUR_NS, True),
        ("daily", HOUR_NS, False),
        ("daily", 12 * HOUR_NS - 1, False),
        ("daily", 12 * HOUR_NS, True),
        ("daily", -13 * HOUR_NS, True),
    ],
)
def test_a_period_is_due_once_the_clock_has_left_it(
    layout: Layout, now: Clock, rotation: Rotation, later_ns: int, is_due: bool
) -> None:
    writer = series(layout, now, rotation)
    writer.append(lines(1))
    now.ns += later_ns
    assert writer.due(now.ns) is is_due
    assert len(writer.rotate(now.ns)) == is_due
    assert tree(layout) == ({CLOSED: [1]} if is_due else {PLAIN: [1]})
    assert not writer.due(now.ns)


def test_a_day_of_hours_is_one_file_of_many_members(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    for hour in range(6):
        writer.append(lines(hour + 1, at_ns=now.ns))
        now.ns += HOUR_NS
        writer.rotate(now.ns)
    assert tree(layout) == {CLOSED: [1, 2, 3, 4, 5, 6]}
    assert (layout.logs / CLOSED).read_bytes().count(b"\x1f\x8b\x08") >= 6


@pytest.mark.parametrize(
    ("days", "folder"),
    [
        (0, "2026/11/23"),
        (1, "2026/11/24"),
        (2, "2026/11/23"),
        (400, "2026/11/23"),
        (-1, "2026/11/22"),
        (-30, "2026/10/24"),
        (-31, "2026/11/23"),
        (-20_000, "2026/11/23"),
    ],
)
def test_the_time_of_an_event_decides_its_day_unless_it_cannot_be_right(
    layout: Layout, now: Clock, days: int, folder: str
) -> None:
    series(layout, now).append(lines(1, at_ns=NOON_NS + days * DAY_NS))
    assert tree(layout) == {f"{folder}/trainer.log.jsonl": [1]}


def test_late_events_join_their_own_day_after_a_minute(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append([*lines(1), *lines(2, at_ns=NOON_NS - DAY_NS)])
    now.ns += 59 * clock.NS_PER_S
    assert not writer.due(now.ns)
    now.ns += clock.NS_PER_S
    assert [path.parent.name for path in writer.rotate(now.ns)] == ["22"]
    writer.append(lines(3, at_ns=NOON_NS - DAY_NS))
    now.ns += 60 * clock.NS_PER_S
    writer.rotate(now.ns)
    assert tree(layout) == {"2026/11/22/trainer.log.jsonl.gz": [2, 3], PLAIN: [1]}


def test_a_clock_that_jumps_by_weeks_forgets_nothing_that_was_written(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append(lines(1))
    now.ns += 40 * DAY_NS
    writer.rotate(now.ns)
    assert new(writer.append(lines(1, 2))) == 1
    writer.forget_idle(now.ns)  # as once the clock has been steady for long
    writer.forget_idle(now.ns + 9 * DAY_NS)
    assert new(writer.append(lines(1))) == 1


def test_few_files_are_open_however_many_days_arrive(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    late = [line for day in range(20) for line in lines(day + 1, at_ns=NOON_NS - day * DAY_NS)]
    for some in (late, late, lines(99)):
        writer.append(some)
        assert writer._plain.num_open <= appending.MAX_OPEN
    assert sum(len(numbers) for numbers in tree(layout).values()) == 21
    assert len(writer.close_all()) == 20


def test_a_plain_file_that_someone_removed_does_not_swallow_lines(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append(lines(1))
    (layout.logs / PLAIN).unlink()
    writer.append(lines(2))
    assert tree(layout) == {PLAIN: [2]}


def test_a_plain_file_that_someone_moved_away_gets_no_more_lines(
    layout: Layout, now: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    writer = series(layout, now)
    writer.append(lines(1))
    layout.logs.rename(layout.root / "moved")
    writer.append(lines(2))
    assert tree(layout) == {PLAIN: [2]}
    assert numbers_in(layout.root / "moved" / PLAIN) == [1]
    assert "moved away" in caplog.text


def test_a_plain_file_that_is_gone_when_its_period_closes_stops_nothing(
    layout: Layout, now: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    writer = series(layout, now)
    writer.append([*lines(1), *lines(2, at_ns=NOON_NS - DAY_NS)])
    (layout.logs / PLAIN).unlink()
    assert len(writer.close_all()) == 1
    writer.append(lines(3))
    writer.close_all()
    assert tree(layout) == {"2026/11/22/trainer.log.jsonl.gz": [2], CLOSED: [3]}
    assert "gone before it was closed" in caplog.text


# --- no space --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Layout]:
    """A disk of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    root = tmp_path / "disk"
    root.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", root)
    try:
        yield Layout(root)
    finally:
        run("umount", "--lazy", root)


@pytest.mark.root
def test_on_a_full_disk_an_append_fails_whole_and_a_later_one_works(small_disk: Layout, now: Clock) -> None:
    writer = series(small_disk, now)
    ballast = small_disk.root / "ballast"
    ballast.write_bytes(b"x" * 500_000)
    writer.append(lines(1))
    before = (small_disk.logs / PLAIN).stat().st_size
    with pytest.raises(StorageFull):
        writer.append([*lines(2, at_ns=NOON_NS - DAY_NS), *lines(*range(3, 13), pad=60_000)])
    assert (small_disk.logs / PLAIN).stat().st_size == before
    assert tree(small_disk) == {PLAIN: [1]}
    ballast.unlink()
    assert new(writer.append([*lines(2, at_ns=NOON_NS - DAY_NS), *lines(*range(3, 13), pad=60_000)])) == 11
    assert tree(small_disk) == {"2026/11/22/trainer.log.jsonl": [2], PLAIN: [1, *range(3, 13)]}


class _Patience:
    """Is over after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_closing_that_has_no_time_leaves_the_period_as_it_was(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append(lines(1, 2, pad=100))
    [closed] = writer.close_all()
    before = closed.read_bytes()
    writer.append(lines(3))
    plain = closed.with_name(LOG_NAME)
    for looks in range(4):  # copying, compressing, comparing what was closed, comparing what was added
        with pytest.raises(closing.LeftOpen):
            writer.close_all(is_stopping=_Patience(looks))
        now.ns += HOUR_NS
        with pytest.raises(closing.LeftOpen):
            writer.rotate(now.ns, is_stopping=_Patience(looks))
        assert closed.read_bytes() == before
        assert numbers_in(plain) == [3]
        assert not list(closed.parent.glob(".*"))
        assert writer.due(now.ns)
        assert new(writer.append(lines(4 + looks))) == 1
    after = series(layout, now)
    assert new(after.append(lines(*range(1, 8)))) == 0
    assert after.close_all(is_stopping=_Patience(2 * 4)) == [closed]
    assert numbers_in(closed) == list(range(1, 8))


@pytest.mark.root
def test_on_a_full_disk_a_period_stays_plain_until_there_is_space(small_disk: Layout, now: Clock) -> None:
    writer = series(small_disk, now)
    writer.append(lines(1))
    ballast = small_disk.root / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    now.ns += HOUR_NS
    with pytest.raises(StorageFull):
        writer.rotate(now.ns)
    assert not writer.due(now.ns)
    assert tree(small_disk)[PLAIN] == [1]
    ballast.unlink()
    now.ns += 31 * clock.NS_PER_S
    assert writer.due(now.ns)
    writer.rotate(now.ns)
    assert tree(small_disk) == {CLOSED: [1]}


def _append_within(layout: Layout, now: Clock, limit_bytes: int) -> int:
    """In a child: 0 if an append that would pass the limit fails whole and a smaller one works."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = series(layout, now)
    writer.append(lines(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        writer.append(lines(*range(2, 20), pad=1000))
    except StorageFull:
        return 0 if new(writer.append(lines(2))) == 1 else 1
    return 2


def test_a_write_that_stops_half_way_is_taken_back(layout: Layout, now: Clock) -> None:
    child = os.fork()
    if child == 0:
        code = 3
        try:
            code = _append_within(layout, now, 5000)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tree(layout) == {PLAIN: [1, 2]}
