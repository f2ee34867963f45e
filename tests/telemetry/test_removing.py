"""Which days of the log go, and that a day goes whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import pytest

from railbus_shared import clock, wire
from railbus_shared.layout import Layout
from railbus_shared.log_reader import read_events, tail_events
from railbus_shared.metrics import Metrics
from railbus_telemetry import removing
from railbus_telemetry.lines import DAY_NS, batch
from railbus_telemetry.removing import Day, Rules
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries
from railbus_telemetry.upkeep import SteadyClock, Upkeep
from until import until

TODAY = date(2026, 11, 23)
NOON_NS = clock.parse_rfc3339("2026-11-23T12:00:00Z")


def lines(number: int, *, at_ns: int) -> list[Run]:
    event = {"id": f"p-{number}", "type": "a.b", "time": clock.rfc3339(at_ns), "producer": "p", "number": number,
             "source": "test", "host": "h", "data": {}}  # fmt: skip
    return batch([(1, "s", wire.encode(event))], incarnation="4f", telemetry="t")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def series(layout: Layout) -> LogSeries:
    """Events 0 to 28 of as many days before today, all closed but today's."""
    writer = LogSeries(layout, rotation="daily", incarnation="4f", now_ns=lambda: NOON_NS)
    for ago in range(28, -1, -1):
        if ago == 0:
            writer.close_all()
        writer.append(lines(ago + 1, at_ns=NOON_NS - ago * DAY_NS))
    return writer


def numbers(layout: Layout) -> list[int]:
    """How many days ago events were, oldest first."""
    return [int(str(event["number"])) - 1 for event in read_events(layout)]


DAYS = [Day(TODAY - timedelta(days=ago), 100) for ago in range(9, -2, -1)]


@pytest.mark.parametrize(
    ("rules", "open_days_ago", "gone_days_ago"),
    [
        (Rules(None, None), (), []),
        (Rules(7, None), (), [9, 8]),
        (Rules(1, None), (), [9, 8, 7, 6, 5, 4, 3, 2]),
        (Rules(7, None), (9,), [8]),
        (Rules(None, 1100), (), []),
        (Rules(None, 1099), (), [9]),
        (Rules(None, 850), (9, 7), [8, 6, 5]),
        (Rules(None, 1), (), [9, 8, 7, 6, 5, 4, 3, 2, 1]),
        (Rules(8, 900), (), [9, 8]),
    ],
)
def test_days_go_by_age_or_size_but_never_one_that_is_written_to(
    rules: Rules, open_days_ago: tuple[int, ...], gone_days_ago: list[int]
) -> None:
    open_days = {TODAY - timedelta(days=ago) for ago in open_days_ago}
    gone = removing.outdated(DAYS, today=TODAY, rules=rules, open_days=open_days)
    assert [(TODAY - one.day.day).days for one in gone] == gone_days_ago
    assert {one.reason for one in gone} <= {"age" if rules.days else "size", "size" if rules.total_bytes else "age"}


def test_a_day_that_goes_takes_its_empty_month_with_it(layout: Layout, series: LogSeries) -> None:
    last_of_october = [date(2026, 10, day) for day in range(26, 32)]
    for day in last_of_october:
        aside = series.set_aside(day)
        assert aside is not None
        assert (aside / "trainer.log.jsonl.gz").exists()
        assert not layout.day(day).exists()
    assert not (layout.logs / "2026/10").exists()
    assert numbers(layout) == list(range(22, -1, -1))
    assert removing.sweep(layout) == 6
    assert sorted(path.name for path in layout.logs.iterdir()) == [".seen.json", "2026"]


def test_an_open_day_is_not_set_aside_and_a_late_event_makes_a_day_anew(layout: Layout, series: LogSeries) -> None:
    assert series.set_aside(TODAY) is None
    long_ago = TODAY - timedelta(days=20)
    assert series.set_aside(long_ago) is not None
    series.append(lines(100, at_ns=NOON_NS - 20 * DAY_NS))
    assert series.set_aside(long_ago) is None
    series.close_all()
    assert 99 in numbers(layout)
    assert series.set_aside(long_ago) is not None
    assert 99 not in numbers(layout)


class Told:
    """Records events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def __call__(self, what: str, /, *, day: str, bytes: int, reason: str) -> None:  # noqa: A002 - a name on the wire
        self.events.append((what, (day, bytes > 0, reason)))


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now_ns", lambda: NOON_NS)


@pytest.mark.usefixtures("present")
async def test_telemetry_removes_old_days_and_indexes_the_others(layout: Layout, series: LogSeries) -> None:
    told, metrics = Told(), Metrics("telemetry")
    (layout.logs / ".removed-2020-01-01").mkdir()
    upkeep = Upkeep(layout, Rules(25, None), tell=told, metrics=metrics, look_s=0.01)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(upkeep.run(series))
        await until(lambda: len(told.events) == 3 and len(list(layout.logs.rglob(".index"))) == 25)
        for closed in series.close_all():
            upkeep.note_closed(closed)
        await until(lambda: len(list(layout.logs.rglob(".index"))) == 26)
        task.cancel()
    assert told.events == [("logs.removed", (f"2026-10-{day}", True, "age")) for day in (26, 27, 28)]
    assert numbers(layout) == list(range(25, -1, -1))
    assert not list(layout.logs.glob(".removed-*"))
    count = metrics.registry.get_sample_value
    assert count("railbus_log_days_removed_total", {"reason": "age"}) == 3
    assert (count("railbus_log_tree_bytes") or 0) > 1000


@pytest.mark.usefixtures("present")
async def test_a_closed_file_that_cannot_be_read_costs_its_own_index_only(layout: Layout, series: LogSeries) -> None:
    broken = layout.day(TODAY - timedelta(days=20)) / "trainer.log.jsonl.gz"
    broken.unlink()
    broken.symlink_to(broken)
    upkeep = Upkeep(layout, Rules(None, None), tell=Told(), metrics=Metrics("telemetry"))
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(upkeep.run(series))
        await until(lambda: len(list(layout.logs.rglob(".index"))) == 27)
        task.cancel()


@pytest.mark.usefixtures("present")
async def test_what_is_closed_last_is_indexed_at_a_stop(layout: Layout, series: LogSeries) -> None:
    upkeep = Upkeep(layout, Rules(None, None), tell=Told(), metrics=Metrics("telemetry"))
    for closed in series.close_all():
        upkeep.note_closed(closed)
    await upkeep.finish()
    assert (layout.day(TODAY) / ".index").exists()


async def test_an_index_that_is_under_way_at_a_stop_is_left(layout: Layout) -> None:
    """Else its thread would hold up the end of the process for as long as the day takes."""
    writer = LogSeries(layout, rotation="daily", incarnation="4f", now_ns=lambda: NOON_NS)
    (line,) = lines(1, at_ns=NOON_NS)
    writer.append([line._replace(data=100_000 * line.data, num_lines=100_000)])
    (closed,) = writer.close_all()
    upkeep = Upkeep(layout, Rules(None, None), tell=Told(), metrics=Metrics("telemetry"))
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(upkeep.run(writer))
        await until(lambda: is_open(closed))
        task.cancel()
    await upkeep.finish()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert not (closed.parent / ".index").exists()


def is_open(path: Path) -> bool:
    """Whether this process holds a file open."""
    with contextlib.suppress(FileNotFoundError):
        return any(fd.resolve() == path for fd in Path("/proc/self/fd").iterdir())
    return False


def test_a_reader_meets_a_day_that_vanishes(layout: Layout, series: LogSeries) -> None:
    events = read_events(layout)
    assert next(events)["number"] == 29
    for ago in range(28, 20, -1):
        removing.set_aside(layout, TODAY - timedelta(days=ago))
    removing.sweep(layout)
    assert [int(str(event["number"])) - 1 for event in events] == list(range(20, -1, -1))
    assert len(tail_events(layout, limit=100)) == 21


def test_a_clock_that_jumps_removes_nothing_for_a_day() -> None:
    steady, hour_ns = SteadyClock(), 3600 * clock.NS_PER_S
    assert steady.is_steady(NOON_NS, boottime_s=0)
    assert steady.is_steady(NOON_NS + 2 * hour_ns, boottime_s=7200)
    assert not steady.is_steady(NOON_NS + 9000 * hour_ns, boottime_s=7260)
    assert not steady.is_steady(NOON_NS + 9001 * hour_ns, boottime_s=10_860)
    assert steady.is_steady(NOON_NS + 9025 * hour_ns, boottime_s=7260 + 90_000)


def instants(layout: Layout, instant: int) -> int:
    """How a child ended that removes two days and is killed right before its so-manieth change to the tree."""
    pid = os.fork()
    if pid == 0:
        left = instant

        def watch(event: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        for ago in (28, 23):
            removing.set_aside(layout, TODAY - timedelta(days=ago))
            removing.sweep(layout)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[Layout]:
    """Trees with days of two months, one after another."""

    def made() -> Iterator[Layout]:
        for number in range(100):
            layout = Layout(tmp_path / str(number))
            for ago in (28, 23, 22, 0):
                layout.day(TODAY - timedelta(days=ago)).mkdir(parents=True)
                for name in ("trainer.log.jsonl.gz", ".index"):
                    (layout.day(TODAY - timedelta(days=ago)) / name).write_bytes(b"x")
            yield layout

    return made()


def test_a_kill_while_a_day_goes_leaves_it_whole_or_not_at_all(trees: Iterator[Layout]) -> None:
    status, instant = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        layout, instant = next(trees), instant + 1
        status = instants(layout, instant)
        for day in layout.log_days():
            assert {path.name for path in layout.day(day).iterdir()} == {"trainer.log.jsonl.gz", ".index"}
        removing.sweep(layout)
        assert not list(layout.logs.glob(".*"))
    assert status == 0
    assert instant > 8
