"""How quickly the past is found: `railbus logs` and `telemetry.query` on a year of logs, against `zcat | grep`.

    python -m benchmarks log_reading [MEGABYTES [FOLDER]]

A year that ends now, each hour a gzip member with ten jobs of its own, the hour that runs in the plain file; 3,000 MB
of lines if nothing else is said, made of one hour with other times and jobs. Indexes are made by telemetry itself. The
time of a command is that of its process; what the same process takes on an empty tree is told beside it. `zcat` is run
over the whole year once, and over the one day that a person might know.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import orjson

from benchmarks.results import Cell, command, show, tell
from railbus_shared import log_reader
from railbus_shared.contracts.logs import QueryEvents
from railbus_shared.layout import CLOSED_LOG_NAME, LOG_INDEX_NAME, LOG_NAME, Layout
from railbus_telemetry import closing, indexing

DAYS: Final = 365
JOBS: Final = 10
ROUNDS: Final = 5
_HOUR: Final = "2026-11-23T12"
_JOB: Final = re.compile(rb"j-4f09ac-0000")


def hour_of_lines(num_bytes: int) -> bytes:
    """An hour as jobs make it: metrics, output, and facts."""
    lines: list[bytes] = []
    size = number = 0
    while size < num_bytes:
        job, step = number % JOBS, number // JOBS
        first = {"id": f"runner-bench-1-{number}", "number": number + 1, "producer": "runner-bench-1", "v": 1,
                 "time": f"{_HOUR}:{number // 60 % 60:02d}:{number % 60:02d}.{number * 7919 % 10**9:09d}Z"}  # fmt: skip
        about = {"severity": "info", "source": "runner", "host": "bench", "job": f"j-4f09ac-0000{job:02d}",
                 "attempt": 1, "lease_epoch": 1}  # fmt: skip
        if step == 0:
            what: dict[str, object] = {"type": "job.queued", "data": {"model": "tiny", "dataset": "digits"}}
        elif number % 7 == 0:
            what = {"type": "job.output", "data": {"stream": "stdout", "line": f"epoch {step // 100} step {step}"}}
        else:
            data = {"loss": 1 / (number + 1), "lr": 0.001, "samples_per_s": 1234.5 + number % 97, "step_s": 0.0123}
            what = {"type": "train.metrics", "step": step, "data": data}
        line = orjson.dumps({**first, **about, **what, "seq": number, "incarnation": "4f09ac"}) + b"\n"
        lines.append(line)
        size += len(line)
        number += 1
    return b"".join(lines)


def written_year(layout: Layout, *, total_bytes: int) -> tuple[int, str, Path]:
    """Write the year; returns the bytes of its lines, and a job in its middle with the folder of its day."""
    template = hour_of_lines(total_bytes // (DAYS * 24))
    now = datetime.now(UTC)
    written, wanted, wanted_day = 0, "", layout.logs
    for ago in range(DAYS, -1, -1):
        day = (now - timedelta(days=ago)).date()
        folder = layout.day(day)
        folder.mkdir(parents=True)
        with (folder / CLOSED_LOG_NAME).open("wb") as closed:
            for hour in range(24 if ago else now.hour + 1):
                serial = f"j-4f09ac-{(DAYS - ago) * 24 + hour:04d}"
                lines = template.replace(_HOUR.encode(), f"{day}T{hour:02d}".encode())
                lines = _JOB.sub(serial.encode(), lines)
                written += len(lines)
                if not ago and hour == now.hour:
                    (folder / LOG_NAME).write_bytes(lines)
                    continue
                member = closing.compressor()
                closed.write(member.compress(lines) + member.flush())
                if ago == DAYS // 2:
                    wanted, wanted_day = f"{serial}03", folder
    return written, wanted, wanted_day


def seconds(work: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """The median."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def railbus(root: Path, *words: str) -> Callable[[], int]:
    """Runs `railbus logs --json`; returns how many events it gave."""
    line = [sys.executable, "-m", "railbus.cli.main", "logs", "--json", "--root", str(root), *words]
    env = {**os.environ, "RAILBUS_CONNECT_TIMEOUT_S": "0.1"}

    def work() -> int:
        return subprocess.run(line, env=env, capture_output=True, check=True).stdout.count(b"\n")

    return work


def shell(line: str) -> Callable[[], int]:
    def work() -> int:
        return int(subprocess.run(["/bin/sh", "-c", f"{line} | wc -l"], capture_output=True, check=True).stdout)

    return work


def measure(layout: Layout, job: str, day: Path, empty: Path) -> tuple[list[list[Cell]], dict[str, float]]:
    root, every = layout.root, f"{layout.logs}/*/*/*/trainer.log.jsonl*"
    start_s = seconds(railbus(empty))
    year_s = seconds(shell(f'zcat -f {every} | grep -F \'"job":"{job}"\''), rounds=1)
    zcats: dict[str, float] = {
        "zcat | grep over the year": year_s,
        "zcat | grep over the one day": seconds(shell(f'zcat -f {day}/*.gz | grep -F \'"job":"{job}"\'')),
        "zcat | tail -n 200 of today": seconds(shell(f"zcat -f {_last_day(layout)}/trainer.log.jsonl* | tail -n 200")),
    }
    request = QueryEvents(job=job, limit=1000)
    ours: dict[str, tuple[float, int]] = {}
    for name, work in {
        f"railbus logs {job}": railbus(root, job),
        "railbus logs --since 2h": railbus(root, "--since", "2h"),
        "railbus logs -n 200": railbus(root, "-n", "200"),
        "railbus logs --type job.failed": railbus(root, "--type", "job.failed"),
        "telemetry.query of the job": lambda: len(asyncio.run(log_reader.query(layout, request)).events),
    }.items():
        ours[name] = seconds(work), work()
    rows: list[list[Cell]] = [["railbus logs on an empty tree", start_s, 0, "", ""]]
    for name, (time_s, events) in ours.items():
        beyond_s = time_s - (0.0 if name.startswith("telemetry") else start_s)
        rows.append([name, time_s, events, round(beyond_s, 3), round(year_s / time_s)])
    rows += [[name, time_s, "", "", round(year_s / time_s, 1)] for name, time_s in zcats.items()]
    told = {
        "start": start_s,
        "year": year_s,
        **{name.replace(job, "JOB"): time_s for name, (time_s, _) in ours.items()},
    }
    return rows, {name: round(time_s, 4) for name, time_s in told.items()}


def _last_day(layout: Layout) -> Path:
    return layout.day(list(layout.log_days())[-1])


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        layout = Layout(Path(folder) / "learning")
        plain_bytes, job, day = written_year(layout, total_bytes=megabytes * 1_000_000)
        started = time.perf_counter()
        for one in layout.log_days():
            indexing.update(layout.day(one))
        index_s = time.perf_counter() - started
        closed_bytes = sum(path.stat().st_size for path in layout.logs.rglob(CLOSED_LOG_NAME))
        index_bytes = sum(path.stat().st_size for path in layout.logs.rglob(LOG_INDEX_NAME))
        empty = Layout(Path(folder) / "empty")
        empty.logs.mkdir(parents=True)
        rows, told = measure(layout, job, day, empty.root)
    size = f"{plain_bytes / 1e9:.1f} GB of lines in {closed_bytes / 1e6:.0f} MB; indexes {index_bytes / 1e6:.1f} MB"
    header = ["", "seconds", "events", "beyond the start", "times zcat | grep"]
    show(
        f"$ {command('log_reading')}   ({size}, made at {plain_bytes / index_s / 1e6:.0f} MB/s)",
        header=header,
        rows=rows,
    )
    tell("log_reading", seconds=told, plain_bytes=plain_bytes, closed_bytes=closed_bytes, index_bytes=index_bytes,
         index_mb_per_s=round(plain_bytes / index_s / 1e6))  # fmt: skip


if __name__ == "__main__":
    main()
