"""A disk that fails at any call, or loses power at any: what was acknowledged is there, once."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disk_faults import Durable, FailsAt, Watch, watched
from railbus_shared import clock, wire
from railbus_shared.errors import StorageFull
from railbus_shared.layout import CLOSED_LOG_NAME, LOG_NAME, Layout
from railbus_shared.log_reader import read_events
from railbus_telemetry.lines import DAY_NS, batch
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries

NOON_NS = clock.parse_rfc3339("2026-11-23T12:00:00Z")


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: what is told apart here is calls, and there are thousands of flushes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def lines(*numbers: int) -> list[Run]:
    """Every fourth is of the day before."""
    events = [
        {"id": f"p-{n}", "type": "a.b", "time": clock.rfc3339(NOON_NS - DAY_NS * (n % 4 == 0)), "producer": "p",
         "number": n, "source": "test", "host": "h", "data": {}}
        for n in numbers
    ]  # fmt: skip
    return batch(((1, "s", wire.encode(event)) for event in events), incarnation="4f", telemetry="t")


def started(layout: Layout) -> LogSeries:
    return LogSeries(layout, rotation="hourly", incarnation="4f", now_ns=lambda: NOON_NS)


def numbers(layout: Layout) -> collections.Counter[int]:
    return collections.Counter(int(str(event["number"])) for event in read_events(layout))


class Story:
    """Lines are written, periods closed while more come, and writers started anew; what fails is done again."""

    def __init__(self, layout: Layout, watch: Watch, *, restarts: bool = False) -> None:
        self.layout = layout
        self._watch = watch
        self.acknowledged: set[int] = set()
        self.failed = 0
        self._restarts = restarts
        self._next = 1

    def run(self) -> None:
        writer = self._again(lambda: started(self.layout))
        writer = self._write(writer, 5)
        writer = self._close(writer)
        writer = self._write(writer, 2)
        writer = self._again(lambda: started(self.layout))
        self._write(writer, 4)

    def _write(self, writer: LogSeries, count: int, *, is_closing: bool = False) -> LogSeries:
        some = range(max(1, self._next - 2), self._next + count)
        while True:
            try:
                writer.append(lines(*some))
            except (StorageFull, OSError):
                writer = self._after_a_failure(writer, is_closing=is_closing)
            else:
                self.acknowledged.update(some)
                self._next += count
                return writer

    def _close(self, writer: LogSeries) -> LogSeries:
        work = [lambda: self._write(writer, 3, is_closing=True)]
        while True:
            try:
                writer.close_all(is_stopping=lambda: bool(work and not work.pop()()))
            except (StorageFull, OSError):
                work.clear()
                writer = self._after_a_failure(writer)
            else:
                return writer

    def _after_a_failure(self, writer: LogSeries, *, is_closing: bool = False) -> LogSeries:
        self.failed += 1
        with self._watch.looking_away():
            self.judge(numbers(self.layout))
        return self._again(lambda: started(self.layout)) if self._restarts and not is_closing else writer

    def _again(self, work: Callable[[], LogSeries]) -> LogSeries:
        while True:
            try:
                return work()
            except (StorageFull, OSError):
                self.failed += 1

    def judge(self, found: collections.Counter[int]) -> None:
        assert not self.acknowledged - set(found), "missing"
        assert not [number for number, count in found.items() if count > 1], "twice"


@pytest.mark.timeout(120)  # a hundred stories, one for each call, on a machine that may be busy
@pytest.mark.parametrize(("times", "restarts"), [(1, True), (3, False)])
def test_a_disk_that_fails_at_any_call_loses_and_doubles_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, times: int, restarts: bool
) -> None:
    number = failed = 0
    while failed or number == 0:
        number += 1 if restarts else 2
        watch = FailsAt(number, times=times)
        story = Story(Layout(folder / str(number)), watch, restarts=restarts)
        with watched(story.layout.root, watch, monkeypatch):
            story.run()
        failed = story.failed
        story.judge(numbers(story.layout))
        started(story.layout).close_all()
        story.judge(numbers(story.layout))
        assert [path.name for path in story.layout.logs.rglob("trainer*")] == ["trainer.log.jsonl.gz"] * 2
    assert number > 60


@pytest.mark.timeout(120)  # three starts for each call, on a machine that may be busy
def test_power_that_is_lost_at_any_call_loses_and_doubles_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(folder / "learning")
    layout.root.mkdir()
    instants = 0

    def instant() -> None:
        nonlocal instants
        instants += 1
        for tree in durable.left(folder / str(instants)):
            started(Layout(tree))
            story.judge(numbers(Layout(tree)))

    durable = Durable(layout.root, instant)
    story = Story(layout, durable)
    with watched(layout.root, durable, monkeypatch):
        story.run()
    durable.close()
    assert instants > 60


def test_what_a_killed_writer_had_written_and_not_flushed_is_flushed_before_it_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start takes it for seen, so nobody writes it again when it comes again."""
    layout = Layout(folder / "learning")
    started(layout).append(lines(1, 2, 3))
    durable = Durable(layout.root, lambda: None)
    with watched(layout.root, durable, monkeypatch):
        assert started(layout).append(lines(1, 2, 3)) == []
    durable.close()
    for tree in durable.left(folder / "left"):
        assert sorted(numbers(Layout(tree))) == [1, 2, 3]


def test_a_day_that_cannot_be_closed_holds_up_no_other(folder: Path) -> None:
    layout = Layout(folder)
    told: list[Path] = []
    writer = LogSeries(layout, rotation="hourly", incarnation="4f", now_ns=lambda: NOON_NS, on_closed=told.append)
    writer.append(lines(1, 4))
    broken, today = sorted(layout.logs.glob("*/*/*"))
    (broken / CLOSED_LOG_NAME).mkdir()
    later_ns = NOON_NS + 3600 * clock.NS_PER_S
    with pytest.raises(IsADirectoryError):
        writer.rotate(later_ns)
    assert told == [today / CLOSED_LOG_NAME]
    assert (broken / LOG_NAME).exists()
    assert not writer.due(later_ns)
    assert writer.due(later_ns + 31 * clock.NS_PER_S)
    (broken / CLOSED_LOG_NAME).rmdir()
    assert writer.rotate(later_ns) == [broken / CLOSED_LOG_NAME]
    assert numbers(layout) == {1: 1, 4: 1}
