"""Indexes of closed days: they say only what cannot be found, and without a good one all is read."""

from __future__ import annotations

import gzip
import itertools
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from railbus_shared import clock, inflate
from railbus_shared.day_log import DayLog
from railbus_shared.layout import CLOSED_LOG_NAME, LOG_INDEX_NAME, LOG_NAME, Layout
from railbus_shared.log_filter import Filter
from railbus_shared.log_index import MAX_STRETCHES, MAX_TYPES, DayIndex, Jobs, Stretch, hash_of
from railbus_shared.log_reader import read_events, tail_events
from railbus_telemetry import indexing

NOON_NS = clock.parse_rfc3339("2026-11-23T12:00:00Z")
HOUR_NS = 3600 * clock.NS_PER_S


def line(number: int, *, job: str = "j-1", kind: str = "train.metrics", at_ns: int = NOON_NS, **data: object) -> bytes:
    event = {"type": kind, "time": clock.rfc3339(at_ns), "producer": "p", "number": number, "job": job, "data": data}
    return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def folder(layout: Layout) -> Path:
    """A day of which each hour has lines of a job of its own, the last one's in the plain file."""
    folder = layout.logs / "2026/11/23"
    folder.mkdir(parents=True)
    hours = [b"".join(line(10 * hour + n, job=f"j-{hour}", kind=f"hour.n{hour}",
                           at_ns=NOON_NS + hour * HOUR_NS) for n in range(3)) for hour in range(6)]  # fmt: skip
    (folder / CLOSED_LOG_NAME).write_bytes(b"".join(map(gzip.compress, hours[:5])))
    (folder / LOG_NAME).write_bytes(hours[5])
    return folder


def numbers(events: object) -> list[object]:
    return [event["number"] for event in events]  # type: ignore[attr-defined]


@pytest.fixture
def inflated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where each member begins that is inflated."""
    starts: list[int] = []
    original = inflate.Members._member

    def member(self: inflate.Members) -> Iterator[inflate.Piece]:
        starts.append(self.whole_end)
        return original(self)

    monkeypatch.setattr(inflate.Members, "_member", member)
    return starts


def starts_of(folder: Path) -> list[int]:
    index = DayIndex.load(folder)
    assert index is not None
    return [stretch.start for stretch in index.stretches]


@pytest.mark.parametrize(
    ("asked", "hours"),
    [
        ({"job": "j-2"}, [2]),
        ({"job": "j-5"}, []),
        ({"job": "j-none"}, []),
        ({"types": ["hour.n1", "hour.n4"]}, [1, 4]),
        ({"types": ["hour."]}, [0, 1, 2, 3, 4]),
        ({"types": ["hour.n9"]}, []),
        ({"since_ns": NOON_NS + 3 * HOUR_NS}, [3, 4]),
        ({"since_ns": NOON_NS + 3 * HOUR_NS + clock.NS_PER_S}, [4]),
        ({"until_ns": NOON_NS + HOUR_NS}, [0]),
        ({"since_ns": NOON_NS + HOUR_NS, "until_ns": NOON_NS + HOUR_NS + 1}, [1]),
        ({"job": "j-1", "types": ["hour.n1"], "since_ns": NOON_NS + 2 * HOUR_NS}, []),
    ],
)
def test_only_members_that_can_match_are_inflated(
    asked: dict[str, object], hours: list[int], layout: Layout, folder: Path, inflated: list[int]
) -> None:
    expected = numbers(read_events(layout, **asked))  # type: ignore[arg-type]
    assert indexing.update(folder)
    starts = starts_of(folder)
    inflated.clear()
    assert numbers(read_events(layout, **asked)) == expected  # type: ignore[arg-type]
    read = [start for start in starts if start in inflated]
    assert [starts.index(start) for start in read] == hours
    assert numbers(tail_events(layout, limit=100, **asked)) == expected  # type: ignore[arg-type]


def test_the_newest_are_found_without_reading_older_members(layout: Layout, folder: Path, inflated: list[int]) -> None:
    indexing.update(folder)
    inflated.clear()
    assert numbers(tail_events(layout, limit=4)) == [42, 50, 51, 52]
    assert inflated == starts_of(folder)[-1:]
    inflated.clear()
    assert numbers(tail_events(layout, limit=2)) == [51, 52]
    assert inflated == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "of another size", "of another file"])
def test_an_index_that_is_not_good_is_passed_over(damage: str, layout: Layout, folder: Path) -> None:
    indexing.update(folder)
    path, closed = folder / LOG_INDEX_NAME, folder / CLOSED_LOG_NAME
    data = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(data[:-3])
        case "flipped":
            path.write_bytes(data.replace(b'"start":0', b'"start":1'))
        case "of another size":
            closed.write_bytes(closed.read_bytes() + gzip.compress(line(99, job="j-new")))
        case _:
            members = [gzip.compress(b"".join(line(90 + n, job="j-new") for n in range(3)), mtime=at) for at in (0, 1)]
            closed.write_bytes((members[0] + bytes(closed.stat().st_size))[: closed.stat().st_size])
    assert not indexing.is_indexed(folder)
    expected = {"of another size": [99], "of another file": [90, 91, 92]}.get(damage, [])
    assert numbers(read_events(layout, job="j-new")) == expected
    assert indexing.update(folder)
    assert indexing.is_indexed(folder)
    assert numbers(read_events(layout, job="j-new")) == expected


def test_an_index_grows_with_its_file_and_reads_only_what_is_new(
    layout: Layout, folder: Path, inflated: list[int]
) -> None:
    indexing.update(folder)
    closed = folder / CLOSED_LOG_NAME
    size = closed.stat().st_size
    closed.write_bytes(closed.read_bytes() + gzip.compress(line(99, job="j-new")))
    inflated.clear()
    assert indexing.update(folder)
    assert inflated == [size]
    assert not indexing.update(folder)
    grown = (folder / LOG_INDEX_NAME).read_bytes()
    (folder / LOG_INDEX_NAME).unlink()
    indexing.update(folder)
    assert (folder / LOG_INDEX_NAME).read_bytes() == grown
    assert numbers(read_events(layout, job="j-new")) == [99]


def test_an_index_says_of_its_members_what_is_in_them(folder: Path) -> None:
    indexing.update(folder)
    index = DayIndex.load(folder)
    assert index is not None
    assert index == DayIndex.from_bytes(index.to_bytes())
    third = index.stretches[2]
    assert (third.lines, third.types) == (3, frozenset({"hour.n2"}))
    assert third.first_s == third.last_s == (NOON_NS + 2 * HOUR_NS) // clock.NS_PER_S
    assert third.plain_bytes == len(b"".join(line(20 + n, job="j-2", kind="hour.n2") for n in range(3)))


def test_a_line_in_two_members_is_found(layout: Layout, folder: Path) -> None:
    whole = line(1, job="j-cut") + line(2, job="j-cut")
    (folder / CLOSED_LOG_NAME).write_bytes(gzip.compress(whole[:-20]) + gzip.compress(whole[-20:] + line(3)))
    indexing.update(folder)
    assert numbers(read_events(layout, job="j-cut")) == [1, 2]
    assert numbers(tail_events(layout, limit=1, job="j-cut")) == [2]


def test_a_damaged_member_costs_its_lines_only(layout: Layout, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    indexing.update(folder)
    starts = starts_of(folder)
    closed = folder / CLOSED_LOG_NAME
    data = bytearray(closed.read_bytes())
    data[starts[1] + 12 : starts[1] + 30] = bytes(18)
    closed.write_bytes(data)
    for makes_index in (False, True):
        if makes_index:
            (folder / LOG_INDEX_NAME).unlink()
            indexing.update(folder)
        with caplog.at_level(logging.WARNING):
            found = numbers(read_events(layout))
        assert found[:3] == [0, 1, 2]
        assert found[-12:] == [20, 21, 22, 30, 31, 32, 40, 41, 42, 50, 51, 52]
        assert "damaged" in caplog.text
        assert numbers(tail_events(layout, limit=11)) == found[-11:]
        assert numbers(read_events(layout, job="j-4")) == [40, 41, 42]


def test_a_day_of_very_many_jobs_has_a_small_index_that_misses_none(folder: Path) -> None:
    chance = random.Random(3)
    members, number = [], itertools.count()
    for _ in range(100):
        jobs = [f"j-4f09ac-{chance.randrange(10**6)}" for _ in range(chance.choice([10, 700]))]
        members.append(jobs)
    data = [b"".join(line(next(number), job=job) for job in jobs) for jobs in members]
    (folder / CLOSED_LOG_NAME).write_bytes(b"".join(gzip.compress(one, 1) for one in data))
    indexing.update(folder)
    index = DayIndex.load(folder)
    assert index is not None
    assert len(index.stretches) == MAX_STRETCHES
    assert (folder / LOG_INDEX_NAME).stat().st_size < 1 << 20
    assert sum(stretch.lines for stretch in index.stretches) == sum(map(len, members))
    with DayLog.opened(folder) as log:
        for jobs in members[::9]:
            assert list(log.events(Filter(job=jobs[0])))
    absent = [hash_of(b"j-none-%d" % n) for n in range(2000)]
    held = sum(stretch.jobs.may_hold(one) for stretch in index.stretches for one in absent)
    assert held / len(absent) / len(index.stretches) < 0.001


def test_a_long_word_in_data_is_found_and_makes_no_long_index(layout: Layout, folder: Path) -> None:
    closed = folder / CLOSED_LOG_NAME
    closed.write_bytes(gzip.compress(line(1, kind="a." + "b" * 60, type="x" * 10**6)))
    indexing.update(folder)
    assert (folder / LOG_INDEX_NAME).stat().st_size < 1000
    for prefix in ("a.", "a." + "b" * 60, "a." + "b" * 61):
        assert len(list(read_events(layout, types=[prefix]))) == (len(prefix) <= 62)


def test_a_set_of_too_many_jobs_becomes_a_filter_that_misses_none() -> None:
    hashes = [hash_of(b"j-%d" % n) for n in range(20_000)]
    many, few = Jobs(hashes[:15_000]), Jobs(hashes[15_000:16_000])
    for jobs in (many | few, few | many, many | Jobs(hashes[15_000:])):
        assert not jobs.is_exact
        assert len(jobs.to_bytes()) == 16 * 1024
        again = Jobs.from_bytes(jobs.to_bytes(), is_exact=False)
        assert all(again.may_hold(one) for one in hashes[:16_000])
    assert few.is_exact
    assert all(Jobs.from_bytes(few.to_bytes(), is_exact=True).may_hold(one) for one in hashes[15_000:16_000])
    both = many | few
    held = sum(both.may_hold(hash_of(b"x-%d" % n)) for n in range(5000))
    assert held < 5000 * 0.05


@pytest.mark.parametrize("time", ["2026-11-23 12:00:00", "soon", "2026-13-23T12:00:00Z"])
def test_a_stretch_with_a_time_of_its_own_kind_is_never_passed_over_for_its_time(time: str, folder: Path) -> None:
    odd = orjson.dumps({"type": "a.b", "time": time}, option=orjson.OPT_APPEND_NEWLINE)
    (folder / CLOSED_LOG_NAME).write_bytes(gzip.compress(line(1) + odd))
    indexing.update(folder)
    index = DayIndex.load(folder)
    assert index is not None
    assert (index.stretches[0].first_s, index.stretches[0].last_s) == (None, None)


def test_a_stretch_of_too_many_types_is_never_passed_over_for_its_type() -> None:
    def stretch(*types: str) -> Stretch:
        return Stretch(0, 1, 1, 0, 0, frozenset(types), Jobs())

    def may_be_in(one: Stretch) -> bool:
        return Filter(types=("c.",)).may_be_in(one)

    half = [stretch(*(f"a.b{n}" for n in range(at, at + MAX_TYPES - 1))) for at in (0, MAX_TYPES)]
    assert not may_be_in(half[0])
    assert may_be_in(half[0].joined(half[1]))
