"""A writer killed at any instant: what it acknowledged is there once, before it runs again and after.

The oracle is a gap and duplicate check on the numbers: a child tells over a pipe which it has appended, and is killed.
"""

from __future__ import annotations

import array
import collections
import contextlib
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from railbus_shared import clock, wire
from railbus_shared.layout import Layout
from railbus_shared.log_reader import read_events
from railbus_telemetry.lines import batch
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries

START_NS = clock.parse_rfc3339("2026-11-23T20:00:00Z")
STEP_NS = 90 * clock.NS_PER_S
KILLS = 15
ACK = struct.Struct(">Q")


def time_of(number: int) -> int:
    return START_NS + number * STEP_NS


def lines(first: int, last: int) -> list[Run]:
    events = [
        {"id": f"p-{n}", "type": "train.metrics", "time": clock.rfc3339(time_of(n)), "producer": "p", "number": n,
         "source": "test", "host": "h", "data": {"noise": random.Random(n).randbytes(400).hex()}}
        for n in range(max(first, 1), last + 1)
    ]  # fmt: skip
    return batch(((1, "s", wire.encode(event)) for event in events), incarnation="4f", telemetry="t")


class Writer:
    """What a child does: time runs with the numbers, so periods end all the time."""

    def __init__(self, layout: Layout, first: int) -> None:
        self.next = first
        self.series = LogSeries(layout, rotation="hourly", incarnation="4f", now_ns=lambda: time_of(self.next))

    def step(self) -> int:
        """Append five new numbers and three old ones; returns the last that is on disk."""
        self.series.append(lines(self.next - 3, self.next + 4))
        self.next += 5
        return self.next - 1

    def close_all(self, goes_on: Callable[[], None] = lambda: None) -> None:
        """Close all, and at the first look whether there is time for it do what may be done meanwhile."""
        work = [goes_on]

        def is_stopping() -> bool:
            if work:
                work.pop()()
            return False

        self.series.close_all(is_stopping=is_stopping)

    def rotate_if_due(self) -> None:
        if self.series.due(time_of(self.next)):
            self.series.rotate(time_of(self.next))


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A child that does the work with the writing end of a pipe; its pid and the reading end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            work(writing)
        except BaseException:  # noqa: BLE001 - a child of a test ends here whatever happens
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def unread(reading: int) -> int:
    """Bytes that wait in a pipe."""
    found = array.array("i", [0])
    fcntl.ioctl(reading, termios.FIONREAD, found)
    return found[0]


def ended(pid: int, reading: int) -> tuple[int, list[int]]:
    """How a child ended, and what it had acknowledged."""
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, [number for (number,) in ACK.iter_unpack(data[: len(data) // ACK.size * ACK.size])]


def assert_each_once(numbers: list[int], acknowledged: int) -> None:
    counts = collections.Counter(numbers)
    assert not [number for number, count in counts.items() if count > 1], "twice"
    assert not [number for number in range(1, acknowledged + 1) if number not in counts], "missing"


def numbers_read(layout: Layout) -> list[int]:
    return [int(str(event["number"])) for event in read_events(layout)]


def numbers_in_closed_files(layout: Layout) -> list[int]:
    files: list[Path] = sorted(layout.logs.rglob("trainer.log.jsonl.gz"))
    data = b"".join(subprocess.run(["/bin/zcat", file], capture_output=True, check=True).stdout for file in files)
    return [orjson.loads(line)["number"] for line in data.splitlines()]


@pytest.mark.timeout(120)  # hundreds of flushes to a disk that others may use, too
def test_what_was_acknowledged_before_a_kill_is_there_once(tmp_path: Path) -> None:
    layout, acknowledged = Layout(tmp_path), 0
    chance = random.Random(11)
    for _ in range(KILLS):
        first = max(acknowledged - 7, 1)

        def work(pipe: int, first: int = first) -> None:
            writer = Writer(layout, first)
            while True:
                os.write(pipe, ACK.pack(writer.step()))
                writer.rotate_if_due()

        pid, reading = forked(work)
        while unread(reading) < 25 * ACK.size:  # so that each round gets somewhere, however slow the disk is
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        status, acks = ended(pid, reading)
        assert status == -signal.SIGKILL
        acknowledged = max([acknowledged, *acks])
        assert_each_once(numbers_read(layout), acknowledged)
    assert acknowledged > 200
    Writer(layout, acknowledged).series.close_all()
    assert_each_once(numbers_in_closed_files(layout), acknowledged)
    assert not list(layout.logs.rglob("trainer.log.jsonl"))


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.truncate")


def killed_at(layout: Layout, instant: int) -> tuple[int, list[int]]:
    """Run a child that restarts, appends, closes and appends, also while it closes, and dies right before its
    `instant`-th file operation.
    """

    def work(pipe: int) -> None:
        left = instant

        def watch(event: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if event in FILE_EVENTS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        writer = Writer(layout, 41)

        def step() -> None:
            os.write(pipe, ACK.pack(writer.step()))

        for _ in range(2):
            step()
            writer.close_all(goes_on=step)
        step()
        os._exit(0)

    return ended(*forked(work))


@pytest.mark.timeout(120)  # some hundred instants, each with a child and many flushes to disk
def test_there_is_no_instant_at_which_a_kill_loses_or_doubles_a_line(tmp_path: Path) -> None:
    status, instant = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        instant += 1
        layout = Layout(tmp_path / str(instant))
        before = Writer(layout, 1)
        acknowledged = 0
        for _ in range(8):
            acknowledged = before.step()
            if before.next == 21:
                before.series.close_all()
        status, acks = killed_at(layout, instant)
        acknowledged = max([acknowledged, *acks])
        assert_each_once(numbers_read(layout), acknowledged)
        assert set(range(1, acknowledged + 1)) <= set(numbers_by_zcat(layout))
        after = Writer(layout, 36)
        assert_each_once(numbers_by_zcat(layout), acknowledged)
        while after.next <= 71:
            acknowledged = after.step()
        after.series.close_all()
        assert_each_once(numbers_in_closed_files(layout), acknowledged)
    assert status == 0
    assert instant > 50


def numbers_by_zcat(layout: Layout) -> list[int]:
    """What the shell's `zcat -f` gives, after another look where a line was just being appended."""
    command = f"zcat -f {layout.logs}/*/*/*/trainer.log.jsonl*"
    for _ in range(50):
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False)
        problems = done.stderr.splitlines()
        assert all(problem.endswith(b"No such file or directory") for problem in problems), problems
        with contextlib.suppress(orjson.JSONDecodeError):
            return [orjson.loads(line)["number"] for line in done.stdout.splitlines()]
    raise AssertionError("there is always a line that is not whole")


def test_zcat_reads_all_lines_at_every_time_while_periods_close(tmp_path: Path) -> None:
    layout = Layout(tmp_path)

    def work(pipe: int) -> None:
        writer = Writer(layout, 1)
        while True:
            os.write(pipe, ACK.pack(writer.step()))
            writer.rotate_if_due()

    pid, reading = forked(work)
    try:
        for rounds in range(1, 26):
            while unread(reading) < rounds * ACK.size:
                time.sleep(0.005)
            acknowledged = unread(reading) // ACK.size * 5
            looks = 0  # a shell that lists a folder while a period closes may see neither of the two files
            while not set(range(1, acknowledged + 1)) <= set(numbers_by_zcat(layout)):
                looks += 1
                assert looks < 20
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid, reading)
    Writer(layout, 10**6).series.close_all()
    names = [path.name for path in layout.logs.rglob("[!.]*") if path.is_file()]
    assert names == ["trainer.log.jsonl.gz"] * len(list(layout.log_days()))
