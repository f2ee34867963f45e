"""`railbus logs --check`: what is missing, doubled or broken in real files, and what only seems so."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import tracemalloc
from collections.abc import Iterable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from commands import Done, railbus_here
from log_faults import cluster
from railbus.log_check import check
from railbus_shared.layout import BEGUN_LOG_NAME, CLOSED_LOG_NAME, LOG_NAME, Layout
from railbus_shared.log_filter import Filter
from servers import Server
from until import until

FIRST = date(2026, 11, 20)


def line(
    number: int, *, producer: str = "p", day: int = 0, job: str = "j-1", kind: str = "a.b", **data: object
) -> bytes:
    event = {"type": kind, "time": f"{FIRST + timedelta(days=day)}T12:00:{number % 60:02}.000000000Z", "job": job,
             "producer": producer, "number": number, "data": data}  # fmt: skip
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def lines(numbers: Iterable[int], *, producer: str = "p", day: int = 0, job: str = "j-1") -> bytes:
    return b"".join(line(number, producer=producer, day=day, job=job) for number in numbers)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def write(layout: Layout, *members: bytes, day: int = 0, plain: bytes = b"", begun: bytes = b"") -> Path:
    folder = layout.day(FIRST + timedelta(days=day))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {
        CLOSED_LOG_NAME: b"".join(map(gzip.compress, members)),
        LOG_NAME: plain,
        BEGUN_LOG_NAME: begun,
    }.items():
        if data:
            (folder / name).write_bytes(data)
    return folder


def checked(layout: Layout, *words: str, env: dict[str, str] | None = None) -> Done:
    return railbus_here("logs", "--check", *words, cwd=layout.root.parent, env=env)


def report(layout: Layout, *words: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    done = checked(layout, "--json", *words, env=env)
    return done.status, json.loads(done.out)


def faults(told: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {one["producer"]: (one["missing"], one["doubled"]) for one in told["found"]}


def test_a_whole_log_has_nothing_to_tell(layout: Layout) -> None:
    write(layout, lines(range(1, 50)), lines(range(50, 60)), plain=lines([60, 61]), begun=lines([62]))
    status, told = report(layout)
    assert (status, told["events"], told["producers"], told["days"]) == (0, 62, 1, 1)
    assert [told[name] for name in ("missing", "doubled", "broken", "out_of_line", "found")] == [0, 0, 0, 0, []]
    assert told["not_on_disk_yet"] is None
    done = checked(layout)
    assert done.status == 0
    assert "62 events of 1 producer on 1 day: none missing, none doubled, none broken" in done.out


def test_gaps_doubles_and_lines_out_of_line_are_told_of_each_producer(layout: Layout) -> None:
    write(layout, lines([1, 2, 5, 6]) + lines([1, 2, 3], producer="q"), lines([6, 9]))
    write(layout, lines([8, 13]) + lines([2, 3], producer="r"), day=1)
    status, told = report(layout)
    assert status == 6
    assert faults(told) == {"p": ([[3, 4], [7, 7], [10, 12]], [[6, 6]]), "r": ([[1, 1]], [])}
    assert (told["missing"], told["doubled"], told["out_of_line"]) == (7, 1, 1)
    done = checked(layout)
    assert done.status == 6
    assert "3-4, 7, 10-12" in done.out
    assert "7 missing, 1 doubled" in done.out


def test_late_lines_fill_what_seemed_a_gap(layout: Layout) -> None:
    write(layout, lines([1, 4]), lines([3, 2]))
    assert report(layout)[0] == 0
    assert report(layout)[1]["out_of_line"] == 2


def test_what_is_broken_is_told_by_file_and_place(layout: Layout) -> None:
    damaged = bytearray(gzip.compress(lines(range(3, 200))))
    damaged[len(damaged) // 2] ^= 0xFF
    first = gzip.compress(lines([1, 2]))
    folder = write(layout, plain=line(201) + b"noise\n" + b'{"number": 7}\n' + b"[]\n" + line(202) + b'{"torn')
    (folder / CLOSED_LOG_NAME).write_bytes(first + bytes(damaged) + gzip.compress(line(200)))
    (folder / f"{CLOSED_LOG_NAME}.damaged").write_bytes(b"x")
    status, told = report(layout)
    assert status == 6
    assert told["missing"] > 0
    (missing,) = [one["missing"] for one in told["found"]]
    assert missing[-1][1] == 199
    named = [(Path(one["file"]).name, one["at_byte"]) for one in told["files"]]
    begin = len(line(201))
    noise = [(LOG_NAME, begin + at) for at in (0, 6, 20)]
    assert named == [(f"{CLOSED_LOG_NAME}.damaged", None), (CLOSED_LOG_NAME, len(first)), *noise]
    assert "trainer.log.jsonl.gz" in checked(layout).out


def test_what_lies_before_the_range_or_before_what_is_kept_is_no_loss(layout: Layout) -> None:
    for day in range(5):
        write(layout, lines(range(10 * day + 1, 10 * day + 11), day=day), day=day)
    write(layout, lines(range(21, 26), day=2) + lines(range(27, 31), day=2), day=2)
    write(layout, lines(range(41, 49), day=4), day=4)
    since, until_ = str(FIRST + timedelta(days=2)), str(FIRST + timedelta(days=3))
    status, told = report(layout, "--since", since, "--until", until_)
    assert (status, told["days"], told["events"], faults(told)) == (6, 1, 9, {"p": ([[26, 26]], [])})
    assert report(layout, "--since", str(FIRST + timedelta(days=3)))[0] == 0
    for path in layout.day(FIRST).iterdir():
        path.unlink()
    layout.day(FIRST).rmdir()
    assert faults(report(layout)[1]) == {"p": ([[1, 10], [26, 26]], [])}
    write(layout, lines(range(41, 49), day=4) + line(49, kind="logs.removed", day=4), day=4)
    assert faults(report(layout)[1]) == {"p": ([[26, 26]], [])}


def test_numbers_at_the_edge_of_a_range_that_stand_on_the_next_day_are_not_missed(layout: Layout) -> None:
    write(layout, lines([1, 2, 4]))
    write(layout, lines([3, 5, 6], day=1), day=1)
    write(layout, lines([7, 9], day=2), day=2)
    assert report(layout, "--until", str(FIRST + timedelta(days=1)))[0] == 0
    assert report(layout, "--since", str(FIRST + timedelta(days=1)), "--until", str(FIRST + timedelta(days=2)))[0] == 0
    assert report(layout)[0] == 6


def test_of_a_job_only_what_is_missing_among_its_events_or_beside_them_is_told(layout: Layout) -> None:
    first = lines([1, 2]) + lines([4, 5, 7], job="j-2") + lines([9, 10], job="j-3")
    write(layout, first + lines([1, 3], producer="q", job="j-3"))
    assert faults(report(layout, "j-2")[1]) == {"p": ([[3, 3], [6, 6], [8, 8]], [])}
    assert faults(report(layout, "j-1")[1]) == {"p": ([[3, 3]], [])}
    assert faults(report(layout, "j-3")[1]) == {"p": ([[8, 8]], []), "q": ([[2, 2]], [])}


def test_who_does_not_count_has_no_gaps_and_what_was_given_up_no_number(layout: Layout) -> None:
    queued = b"".join(
        lines([7, 9], producer=f"{name}-4f09ac") for name in ("job-queued", "job-ended", "telemetry-rejected")
    )
    lost = line(2, kind="events.dropped", dropped={"debug": 3, "info": 4}, types={"job.output": 7})
    write(layout, queued + line(1) + lost)
    status, told = report(layout)
    assert (status, told["given_up"], told["found"]) == (0, 7, [])
    assert "7 were given up" in checked(layout).out
    write(layout, queued + lines([9], producer="job-ended-4f09ac"))
    assert faults(report(layout)[1]) == {"job-ended-4f09ac": ([], [[9, 9]])}


def test_a_period_that_is_in_both_files_is_not_doubled(layout: Layout) -> None:
    write(layout, lines([1]), lines([2, 3]), plain=lines([2, 3]), begun=lines([4]))
    assert report(layout)[0] == 0


@pytest.mark.parametrize("words", [["-f"], ["--type", "job."], ["--grep", "x"], ["-n", "3"]])
def test_a_choice_of_events_that_leaves_gaps_is_refused(layout: Layout, words: list[str]) -> None:
    write(layout, lines([1]))
    done = checked(layout, *words)
    assert done.status == 2
    assert "--check takes" in done.err


def test_where_no_log_is_that_is_said(layout: Layout) -> None:
    layout.root.mkdir()
    done = checked(layout)
    assert done.status == 3
    assert "no log" in done.err


def test_memory_grows_neither_with_events_nor_without_end_with_gaps(layout: Layout) -> None:
    write(layout, *(lines(range(first, first + 2000)) for first in range(1, 20_001, 2000)))
    write(layout, lines(range(2, 24_002, 2), producer="gaps", day=1), day=1)
    tracemalloc.start()
    found = check(layout, Filter())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (gaps,) = found.findings()
    assert (gaps.producer, gaps.num_missing, len(gaps.missing)) == ("gaps", 12_000, 10_000)
    assert peak < 8 << 20


@pytest.mark.timeout(60)  # telemetry is started, and stands still for a while
async def test_of_a_real_run_nothing_is_missing_and_what_waits_in_the_stream_is_told(
    tmp_path: Path, server: Server
) -> None:
    async with cluster(tmp_path, server) as found:
        env = {"RAILBUS_NATS_URL": server.url}

        async def told(*words: str) -> tuple[int, dict[str, Any]]:
            return await asyncio.to_thread(report, found.layout, *words, env=env)

        (producer,) = found.producers
        await until(producer.is_sending)
        await found.flush()
        status, first = await told()
        assert (status, first["missing"], first["doubled"], first["broken"]) == (0, 0, 0, 0)
        assert first["events"] > 0
        found.telemetry.signal(signal.SIGSTOP)
        noted = len(found.acknowledged())
        await until(lambda: len(found.acknowledged()) > noted + 100)
        status, second = await told()
        assert status == 0
        assert second["not_on_disk_yet"] >= 100
        found.telemetry.signal(signal.SIGCONT)
        await found.settled()
        status, third = await told()
        assert status == 0
        assert third["events"] >= first["events"] + second["not_on_disk_yet"]
        assert 1 <= third["not_on_disk_yet"] < 10, "that telemetry has stopped, and its like, the next start writes"
    (closed,) = found.layout.logs.rglob(CLOSED_LOG_NAME)
    whole = gzip.decompress(closed.read_bytes()).splitlines(keepends=True)
    lost = json.loads(whole[len(whole) // 2])
    closed.write_bytes(gzip.compress(b"".join(one for one in whole if one != whole[len(whole) // 2])))
    status, fourth = await told()
    missing = {name: ranges for name, (ranges, _) in faults(fourth).items() if ranges}
    assert (status, missing) == (6, {lost["producer"]: [[lost["number"]] * 2]})
    assert (fourth["missing"], fourth["doubled"]) == (1, 0)


def test_a_person_counts_by_themselves_whatever_producer_they_name(layout: Layout) -> None:
    of_ann = b"".join(line(n).replace(b'{"type"', b'{"person":"ann","type"') for n in (1, 2, 5))
    write(layout, lines([1, 2, 3]) + of_ann)
    assert faults(report(layout)[1]) == {"ann/p": ([[3, 4]], [])}
    assert "ann/p" in checked(layout).out
