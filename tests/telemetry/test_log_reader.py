"""Reading the logs tree: in order, each line once, filtered, whole as far as the files are."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from railbus_shared import clock, inflate, wire
from railbus_shared.contracts.logs import QueryEvents
from railbus_shared.layout import Layout
from railbus_shared.log_reader import query, read_events, tail_events
from railbus_telemetry import closing
from railbus_telemetry.lines import DAY_NS, batch
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries

NOON = "2026-11-23T12:00:00Z"
NOON_NS = clock.parse_rfc3339(NOON)


def lines(
    *numbers: int, at_ns: int = NOON_NS, kind: str = "train.metrics", job: str = "j-1", pad: int = 0
) -> list[Run]:
    events = [
        {"id": f"p-{n}", "type": kind, "time": clock.rfc3339(at_ns), "producer": "p", "number": n, "job": job,
         "source": "test", "host": "h", "data": {"pad": "x" * pad, "job": "j-9"}}
        for n in numbers
    ]  # fmt: skip
    return batch(((1, "s", wire.encode(event)) for event in events), incarnation="4f", telemetry="t")


def numbers(events: object) -> list[object]:
    return [event["number"] for event in events]  # type: ignore[attr-defined]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def writer(layout: Layout) -> LogSeries:
    return LogSeries(layout, rotation="daily", incarnation="4f", now_ns=lambda: NOON_NS)


@pytest.fixture
def days(layout: Layout, writer: LogSeries) -> Layout:
    """Three days: the oldest closed, the next closed twice, today closed and plain."""
    writer.append(lines(1, 2, at_ns=NOON_NS - 2 * DAY_NS))
    writer.append(lines(3, at_ns=NOON_NS - DAY_NS, kind="job.placed", job="j-2"))
    writer.close_all()
    writer.append(lines(4, at_ns=NOON_NS - DAY_NS, kind="job.ended"))
    writer.append(lines(5))
    writer.close_all()
    writer.append(lines(6, kind="jobless.seen", job="j-2"))
    return layout


def test_days_members_and_the_plain_file_come_oldest_first(days: Layout) -> None:
    assert numbers(read_events(days)) == [1, 2, 3, 4, 5, 6]


def test_a_tree_without_logs_has_no_events(layout: Layout) -> None:
    assert list(read_events(layout)) == []
    assert tail_events(layout, limit=3) == []


@pytest.mark.parametrize(
    ("job", "types", "since_ns", "until_ns", "expected"),
    [
        ("j-1", (), None, None, [1, 2, 4, 5]),
        ("j-9", (), None, None, []),
        (None, ("job.",), None, None, [3, 4]),
        (None, ("job",), None, None, [3, 4, 6]),
        (None, ("job.ended", "train"), None, None, [1, 2, 4, 5]),
        (None, ('"',), None, None, []),
        ("j-2", ("job.",), None, None, [3]),
        (None, (), NOON_NS - DAY_NS, None, [3, 4, 5, 6]),
        (None, (), NOON_NS - DAY_NS + 1, None, [5, 6]),
        (None, (), None, NOON_NS, [1, 2, 3, 4]),
        (None, (), NOON_NS - DAY_NS, NOON_NS, [3, 4]),
        (None, (), NOON_NS + DAY_NS, None, []),
    ],
)
def test_only_what_was_asked_for_is_read(
    days: Layout,
    job: str | None,
    types: tuple[str, ...],
    since_ns: int | None,
    until_ns: int | None,
    expected: list[int],
) -> None:
    found = read_events(days, job=job, types=types, since_ns=since_ns, until_ns=until_ns)
    assert numbers(found) == expected
    newest = tail_events(days, limit=2, job=job, types=types, since_ns=since_ns, until_ns=until_ns)
    assert numbers(newest) == expected[-2:]


@pytest.mark.parametrize("limit", range(1, 8))
def test_the_tail_is_the_newest_across_files_and_days(days: Layout, limit: int) -> None:
    assert numbers(tail_events(days, limit=limit)) == [1, 2, 3, 4, 5, 6][-limit:]


def test_lines_that_stand_in_both_files_are_read_once(layout: Layout, writer: LogSeries) -> None:
    writer.append(lines(1))
    writer.close_all()
    writer.append(lines(2, 3))
    plain = layout.logs / "2026/11/23/trainer.log.jsonl"
    data = plain.read_bytes()
    writer.close_all()
    plain.write_bytes(data)
    assert numbers(read_events(layout)) == [1, 2, 3]
    plain.write_bytes(data.replace(b'"number":3', b'"number":4'))
    assert numbers(read_events(layout)) == [1, 2, 3, 2, 4]


@pytest.mark.parametrize("cut_bytes", [1, 9, 40, 5000])
def test_a_torn_closed_file_is_read_as_far_as_it_goes(
    layout: Layout, writer: LogSeries, cut_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    writer.append(lines(1, 2))
    writer.close_all()
    closed = layout.logs / "2026/11/23/trainer.log.jsonl.gz"
    whole_bytes = closed.stat().st_size
    writer.append([line for n in range(3, 300) for line in lines(n, pad=n * 37 % 100)])
    writer.close_all()
    writer.append(lines(300))
    closed.write_bytes(closed.read_bytes()[: max(-cut_bytes, whole_bytes + 4 - closed.stat().st_size)])
    with caplog.at_level(logging.WARNING):
        found = numbers(read_events(layout))
    assert found == [*range(1, len(found)), 300]
    assert len(found) >= 3
    assert "torn" in caplog.text


def test_a_torn_plain_tail_is_left_out_and_noise_is_reported(
    layout: Layout, writer: LogSeries, caplog: pytest.LogCaptureFixture
) -> None:
    writer.append(lines(1))
    with (layout.logs / "2026/11/23/trainer.log.jsonl").open("ab") as file:
        file.write(b"noise\n" + lines(2)[0].data + lines(3)[0].data[:-9])
    with caplog.at_level(logging.WARNING):
        assert numbers(read_events(layout)) == [1, 2]
    assert "unreadable" in caplog.text


def test_a_reader_beside_a_busy_writer_sees_each_line_once(layout: Layout, writer: LogSeries) -> None:
    written, done = [0], threading.Event()

    def write() -> None:
        for number in range(1, 121):
            writer.append(lines(number))
            written[0] = number
            if number % 3 == 0:
                writer.close_all()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    rounds = 0
    while not done.is_set():
        least = written[0]
        found = numbers(read_events(layout))
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= least
        rounds += 1
    thread.join()
    assert rounds > 5


class Interruption:
    """Work that is done once, right before the next file of the log but so many is opened in this thread."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.work and event == "open" and "trainer.log.jsonl" in str(arguments[0]):
            self.work.pop()()


@pytest.fixture(scope="module")
def interruption() -> Interruption:
    return Interruption()


@pytest.mark.parametrize("opened_before", [0, 1, 2])
@pytest.mark.parametrize("periods", [1, 2, 3])
def test_periods_that_close_while_a_day_is_opened_are_read_once(
    layout: Layout, writer: LogSeries, interruption: Interruption, opened_before: int, periods: int
) -> None:
    writer.append(lines(1))
    writer.close_all()
    writer.append(lines(2))

    def close_periods() -> None:
        interruption.work.clear()
        for number in range(3, 3 + periods):
            writer.close_all()
            writer.append(lines(number))

    interruption.work = [close_periods, *[lambda: None] * opened_before]
    found = numbers(read_events(layout))
    interruption.work = []
    assert found == [1, 2, *range(3, 1 + len(found))]


def test_a_plain_file_that_someone_has_linked_elsewhere_is_read_once_when_it_is_closed(
    layout: Layout, writer: LogSeries, interruption: Interruption
) -> None:
    writer.append(lines(1))
    plain = layout.logs / "2026/11/23/trainer.log.jsonl"
    plain.with_name("backup").hardlink_to(plain)

    def close_periods() -> None:
        for number in (2, 3):
            writer.close_all()
            writer.append(lines(number))

    interruption.work = [close_periods, *[lambda: None] * 2]
    found = numbers(read_events(layout))
    interruption.work = []
    assert found == [1, 2, 3]


def closing_while(writer: LogSeries, work: Callable[[], None]) -> None:
    """Close all, and in the midst of it do some work, once."""
    left = [work]
    writer.close_all(is_stopping=lambda: bool(left and left.pop()()))


STEPS = ("while it is staged", "when it has replaced the closed file", "when it is over")


@pytest.mark.parametrize("before", STEPS)
@pytest.mark.parametrize("opened_before", [0, 1, 2])
def test_a_day_is_opened_at_any_time_of_a_closing_and_read_once(
    layout: Layout, writer: LogSeries, interruption: Interruption, opened_before: int, before: str, tmp_path: Path
) -> None:
    """The closing goes on in another thread as far as a step, then the reader opens some files, then it is over."""
    writer.append(lines(1))
    writer.close_all()
    writer.append(lines(2))
    reached, goes_on = threading.Event(), threading.Event()
    replace = closing.replace

    def stop() -> None:
        reached.set()
        assert goes_on.wait(10)

    def stopping_replace(plain: Path) -> None:
        replace(plain)
        stop()

    def close() -> None:
        def work() -> None:
            writer.append(lines(3))
            if before == STEPS[0]:
                stop()

        closing_while(writer, work)
        if before == STEPS[2]:
            stop()

    closing_thread = threading.Thread(target=close)

    def finish() -> None:
        interruption.work.clear()
        goes_on.set()
        closing_thread.join()
        writer.append(lines(4))

    with pytest.MonkeyPatch.context() as patched:
        if before == STEPS[1]:
            patched.setattr(closing, "replace", stopping_replace)
        closing_thread.start()
        assert reached.wait(10)
        interruption.work = [finish, *[lambda: None] * opened_before]
        found = numbers(read_events(layout))
        interruption.work = []
        assert not closing_thread.is_alive()
    assert found in ([1, 2, 3], [1, 2, 3, 4])


def test_a_reader_beside_a_writer_and_a_closing_that_never_rest_sees_each_line_once(
    layout: Layout, writer: LogSeries
) -> None:
    written, done = [0], threading.Event()

    def write() -> None:
        for number in range(1, 401):
            writer.append(lines(number, pad=2000))
            written[0] = number
        done.set()

    def close() -> None:
        while not done.is_set():
            writer.close_all()

    threads = [threading.Thread(target=write), threading.Thread(target=close)]
    for thread in threads:
        thread.start()
    rounds = 0
    while not done.is_set():
        least = written[0]
        found = numbers(read_events(layout))
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= least
        newest = numbers(tail_events(layout, limit=50))
        assert newest == list(range(int(str(newest[0])), int(str(newest[-1])) + 1)) if newest else least == 0
        rounds += 1
    for thread in threads:
        thread.join()
    assert rounds > 5


async def test_pages_join_whatever_is_closed_between_them(layout: Layout, writer: LogSeries) -> None:
    """A place that was told of a line keeps it, also where that stood in a file that was begun beside a closing."""
    writer.append(lines(*range(1, 11)))
    writer.close_all()
    writer.append(lines(*range(11, 21)))
    pages: list[list[object]] = []
    places: list[str] = []

    async def read_page(before: str | None) -> str | None:
        answer = await query(layout, QueryEvents(limit=4, before=before))
        pages.insert(0, numbers(answer.events))
        places.append(answer.older or "")
        return answer.older

    first: list[str | None] = []

    def meanwhile() -> None:
        writer.append(lines(*range(21, 31)))
        first.append(asyncio.run(read_page(None)))
        first.append(asyncio.run(read_page(first[0])))

    await asyncio.to_thread(closing_while, writer, meanwhile)
    place = await read_page(first[1])
    writer.close_all()
    answer = await query(layout, QueryEvents(limit=1000, before=first[1]))
    assert numbers(answer.events) == list(range(1, 23)), "the same place, when its file was closed as well"
    while place:
        place = await read_page(place)
    assert [number for page in pages for number in page] == list(range(1, 31))
    assert sum("+" in place for place in places) == 2


async def test_a_query_gives_the_newest_and_says_what_it_left_out(days: Layout) -> None:
    answer = await query(days, QueryEvents(limit=2))
    assert (numbers(answer.events), answer.truncated) == ([5, 6], True)
    answer = await query(days, QueryEvents(limit=6, since=NOON))
    assert (numbers(answer.events), answer.truncated) == ([5, 6], False)


@pytest.mark.parametrize("encoding", list(wire.Encoding))
async def test_an_answer_fits_into_a_message_whatever_its_events_hold(
    layout: Layout, writer: LogSeries, encoding: wire.Encoding
) -> None:
    writer.append(lines(*range(1, 101), pad=20_000))
    answer = await query(layout, QueryEvents(limit=1000))
    assert answer.truncated
    assert numbers(answer.events)[-1] == 100
    assert 300_000 < len(wire.encode(answer.to_map(), encoding=encoding)) <= wire.MAX_BYTES


def nested(depth: int) -> list[object]:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "data",
    [
        {name: [255] * 57_000 for name in "abcd"},
        {"x": [[] for _ in range(60_000)]},
        {"x": [0.5] * 52_000},
        {"x": nested(28)},
    ],
    ids=["long as JSON", "many lists", "long as msgpack", "deep"],
)
async def test_no_event_of_anybody_makes_an_answer_impossible(
    layout: Layout, writer: LogSeries, data: dict[str, object]
) -> None:
    event = {"id": "p", "type": "app.x", "time": NOON, "producer": "p", "source": "test", "host": "h"}
    messages = [wire.encode({**event, "number": n, "data": data if n in (2, 3) else {}}) for n in range(1, 5)]
    runs = batch(((1, "s", m) for m in messages), incarnation="4f", telemetry="t")
    assert not any(run.code for run in runs)
    writer.append(runs)
    pages: list[object] = []
    before: str | None = None
    while not pages or before:
        answer = await query(layout, QueryEvents(limit=1000, before=before))
        for encoding in wire.Encoding:
            wire.encode(answer.to_map(), encoding=encoding)
        pages, before = [*numbers(answer.events), *pages], answer.older
    assert pages == [1, 2, 3, 4]


def test_a_member_that_inflates_to_much_is_read_in_small_chunks(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"\0" * (64 << 20)) + gzip.compress(b"end"))
    with path.open("rb") as file:
        members = inflate.Members(file)
        sizes = [len(chunk) for chunk in members.chunks()]
    assert max(sizes) <= inflate.CHUNK_BYTES
    assert sum(sizes) == (64 << 20) + 3
    assert (members.is_torn, members.whole_end) == (False, path.stat().st_size)
