"""What a start makes of a logs tree: restarts, what was seen, torn tails, and closed files that are damaged."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path

import pytest

from railbus_shared.layout import Layout
from railbus_telemetry import closing
from railbus_telemetry.lines import DAY_NS
from written_logs import CLOSED, HOUR_NS, NOON_NS, PLAIN, Clock, lines, new, numbers_in, series, tree


def test_a_new_writer_knows_what_stands_in_plain_and_in_closed_files(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append(lines(1, 2))
    writer.close_all()
    writer.append(lines(3))
    assert new(series(layout, now).append(lines(1, 2, 3, 4))) == 1
    assert tree(layout) == {CLOSED: [1, 2], PLAIN: [3, 4]}


def test_the_sidecar_alone_knows_what_older_days_hold(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    for day in (5, 4, 3, 0):
        writer.append(lines(10 - day, at_ns=NOON_NS - day * DAY_NS))
    writer.close_all()
    assert new(series(layout, now).append(lines(5, at_ns=NOON_NS - 5 * DAY_NS))) == 0


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"[[") if b"[[" in data else data.index(b"p-1")
    data[at + 2] ^= 1
    path.write_bytes(data)


def test_an_older_sidecar_is_not_believed_about_what_was_closed_since(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append(lines(1))
    writer.close_all()
    old = (layout.logs / ".seen.json").read_bytes()
    writer.append([*lines(2), *lines(3, at_ns=NOON_NS - 5 * DAY_NS)])
    writer.close_all()
    (layout.logs / ".seen.json").write_bytes(old)
    assert new(series(layout, now).append([*lines(1, 2), *lines(3, at_ns=NOON_NS - 5 * DAY_NS)])) == 0


def test_without_its_sidecar_a_writer_knows_late_events_and_reads_no_old_days(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append([line for day in range(6) for line in lines(day + 1, at_ns=NOON_NS - day * DAY_NS)])
    writer.close_all()
    old = layout.logs / "2026/11/18" / "trainer.log.jsonl.gz"
    os.utime(old, (NOON_NS // 10**9, old.stat().st_mtime - 5 * 86_400))
    (layout.logs / ".seen.json").unlink()
    fresh = series(layout, now)
    assert new(fresh.append(lines(5, at_ns=NOON_NS - 4 * DAY_NS))) == 0
    assert new(fresh.append(lines(6, at_ns=NOON_NS - 5 * DAY_NS))) == 1


@pytest.mark.parametrize("harm", ["missing", "empty", "torn", "flipped", "foreign"])
def test_without_its_sidecar_a_writer_reads_the_newest_two_days(layout: Layout, now: Clock, harm: str) -> None:
    writer = series(layout, now)
    writer.append([*lines(1), *lines(2, at_ns=NOON_NS - DAY_NS)])
    writer.close_all()
    sidecar = layout.logs / ".seen.json"
    match harm:
        case "missing":
            sidecar.unlink()
        case "empty":
            sidecar.write_bytes(b"")
        case "torn":
            sidecar.write_bytes(sidecar.read_bytes()[:-5])
        case "flipped":
            _flip(sidecar)
        case _:
            sidecar.write_bytes(b'{"v":1,"content":{}}')
    assert new(series(layout, now).append([*lines(1), *lines(2, at_ns=NOON_NS - DAY_NS), *lines(3)])) == 1


@pytest.mark.parametrize("tail", [b'{"v":1,"producer":"p-1","num', b"\0" * 40, b"\0" * 40 + b"\n", b"noise\n", b"{}\n"])
def test_a_torn_tail_is_cut_and_the_lines_before_it_stay(layout: Layout, now: Clock, tail: bytes) -> None:
    series(layout, now).append(lines(1, 2))
    with (layout.logs / PLAIN).open("ab") as file:
        file.write(tail)
    assert new(series(layout, now).append(lines(2, 3))) == 1
    assert tree(layout) == {PLAIN: [1, 2, 3]}


def test_a_plain_file_without_a_complete_line_goes(layout: Layout, now: Clock) -> None:
    series(layout, now).append(lines(1))
    (layout.logs / PLAIN).write_bytes(b'{"v":1')
    writer = series(layout, now)
    assert tree(layout) == {}
    assert new(writer.append(lines(1))) == 1


def test_a_plain_file_that_was_closed_before_the_kill_is_dropped(layout: Layout, now: Clock) -> None:
    writer = series(layout, now)
    writer.append(lines(1))
    writer.close_all()
    writer.append(lines(2, 3))
    plain = (layout.logs / PLAIN).read_bytes()
    writer.close_all()
    (layout.logs / PLAIN).write_bytes(plain)
    (layout.logs / ".seen.json").unlink()
    assert new(series(layout, now).append(lines(1, 2, 3))) == 0
    assert tree(layout) == {CLOSED: [1, 2, 3]}


def test_litter_of_a_killed_writer_is_removed(layout: Layout, now: Clock) -> None:
    series(layout, now).append(lines(1))
    litter = [layout.logs / ".seen.json.77-aa.tmp", layout.logs / "2026/11/23/.trainer.log.jsonl.gz.tmp"]
    for path in litter:
        path.write_bytes(b"half")
    series(layout, now)
    assert not any(path.exists() for path in litter)


@pytest.mark.parametrize("lost_bytes", [1, 8, 30])
def test_a_damaged_closed_file_is_kept_aside_and_reported(
    layout: Layout, now: Clock, lost_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    writer = series(layout, now)
    writer.append(lines(1, 2))
    writer.close_all()
    writer.append(lines(3, 4))
    writer.close_all()
    closed = layout.logs / CLOSED
    damaged = closed.read_bytes()[:-lost_bytes]
    closed.write_bytes(damaged)
    with caplog.at_level(logging.ERROR):
        again = series(layout, now)
    assert "damaged" in caplog.text
    assert closed.with_name(f"{closed.name}.damaged").read_bytes() == damaged
    assert numbers_in(closed)[:2] == [1, 2]
    again.append(lines(5))
    again.close_all()
    assert numbers_in(closed)[-1] == 5


class LossyCompressor:
    """A compressor that leaves out the last byte of each chunk, as broken memory might."""

    def __init__(self) -> None:
        self._whole = zlib.compressobj(1, wbits=31)

    def compress(self, data: bytes, /) -> bytes:
        return self._whole.compress(data[:-1])

    def flush(self) -> bytes:
        return self._whole.flush()


def test_a_period_that_reads_back_differently_stays_plain(
    layout: Layout, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = series(layout, now)
    writer.append(lines(1))
    writer.close_all()
    writer.append(lines(2))
    with monkeypatch.context() as broken:
        broken.setattr(closing, "compressor", LossyCompressor)
        with pytest.raises(OSError, match="reads back differently"):
            writer.close_all()
    assert tree(layout) == {PLAIN: [2], CLOSED: [1]}
    assert new(writer.append(lines(1, 2, 3))) == 1
    writer.close_all()
    assert tree(layout) == {CLOSED: [1, 2, 3]}


def test_recovered_periods_are_closed_like_others(layout: Layout, now: Clock) -> None:
    series(layout, now).append(lines(1))
    writer = series(layout, now)
    assert not writer.due(now.ns)
    now.ns += HOUR_NS
    assert writer.due(now.ns)
    writer.rotate(now.ns)
    assert tree(layout) == {CLOSED: [1]}
