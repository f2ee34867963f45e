"""Logs as telemetry's writer makes them: lines to write, the time at which that is, and what stands where then."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import orjson

from railbus_shared import clock, wire
from railbus_shared.layout import Layout
from railbus_telemetry.lines import batch
from railbus_telemetry.periods import Rotation
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries

HOUR_NS = 3600 * clock.NS_PER_S
NOON_NS = clock.parse_rfc3339("2026-11-23T12:00:00Z")


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.ns = NOON_NS

    def __call__(self) -> int:
        return self.ns


def series(layout: Layout, now: Clock, rotation: Rotation = "hourly") -> LogSeries:
    """A writer as a start of the service makes it; an earlier one of the test is as good as killed."""
    return LogSeries(layout, rotation=rotation, incarnation="4f09ac", now_ns=now)


def lines(*numbers: int, at_ns: int = NOON_NS, producer: str = "p-1", pad: int = 0) -> list[Run]:
    events = [
        {"id": f"{producer}-{n}", "type": "train.metrics", "time": clock.rfc3339(at_ns), "producer": producer,
         "number": n, "source": "test", "host": "h", "data": {"pad": "x" * pad}}
        for n in numbers
    ]  # fmt: skip
    return batch(((1, "s", wire.encode(event)) for event in events), incarnation="4f09ac", telemetry="t")


def new(runs: list[Run]) -> int:
    """How many lines were new."""
    return sum(run.num_lines for run in runs)


def numbers_in(path: Path) -> list[int]:
    """Numbers in a file, in order; of a closed one as `zcat` reads it."""
    data = run("zcat", path) if path.suffix == ".gz" else path.read_bytes()
    return [orjson.loads(line)["number"] for line in data.splitlines()]


def run(program: str, *arguments: str | Path) -> bytes:
    return subprocess.run([shutil.which(program) or program, *arguments], capture_output=True, check=True).stdout


def tree(layout: Layout) -> dict[str, list[int]]:
    """Every visible log file with the numbers in it."""
    found = sorted(path for path in layout.logs.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(layout.logs)): numbers_in(path) for path in found}


PLAIN = "2026/11/23/trainer.log.jsonl"
BEGUN = f"{PLAIN}.begun"
CLOSED = f"{PLAIN}.gz"
