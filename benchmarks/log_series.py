"""How near the log writer comes to the disk: events per second against raw write + fdatasync of the same bytes.

    python -m benchmarks log_series [FOLDER]

Messages of 100 events, some of them in each append, as the telemetry service does it. The raw limit is measured in the
same run, on the same disk, in turns with the writer, because disks and neighbours change by the minute.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import Cell, command, show, tell
from railbus_shared import clock, wire
from railbus_shared.layout import Layout
from railbus_telemetry.lines import batch
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries

EVENTS = 100
ROUNDS = 7
SIZES = {1: 200, 10: 400, 64: 640}
"""Messages an append, and how many in all."""
Message = tuple[int, str, bytes]


def message(sequence: int) -> Message:
    """One batch of metrics, as a trainer's come over the bus."""
    common = {"v": 1, "type": "train.metrics", "producer": "runner-bench-1", "severity": "info", "source": "trainer",
              "host": "bench", "job": "j-4f09ac-17", "attempt": 1, "lease_epoch": 1}  # fmt: skip
    first = (sequence - 1) * EVENTS + 1
    events = [
        {"id": f"runner-bench-1-{n}", "number": n, "time": clock.now(), "step": n,
         "data": {"loss": 1 / n, "lr": 0.001, "samples_per_s": 1234.5 + n, "step_s": 0.0123, "grad_norm": 0.5 + 1 / n}}
        for n in range(first, first + EVENTS)
    ]  # fmt: skip
    return sequence, "railbus.evt.train.j-4f09ac-17.metrics", wire.encode({"v": 1, "common": common, "events": events})


def transcoded(messages: list[Message]) -> list[Run]:
    return batch(messages, incarnation="4f09ac", telemetry="bench")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def raw(path: Path, chunks: list[bytes]) -> None:
    """The limit: the same bytes in the same portions, and nothing else."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for chunk in chunks:
        os.write(fd, chunk)
        os.fdatasync(fd)
    os.close(fd)


def started(root: Path) -> LogSeries:
    """A writer whose file exists, as the raw one's does: making folders durable is no part of appending."""
    series = LogSeries(Layout(root / "tree"), rotation="daily", incarnation="4f09ac", now_ns=clock.now_ns)
    series.append(transcoded([message(1)]))
    raw(root / "raw", [b"x"])
    return series


def one_round(root: Path, groups: list[list[Message]]) -> tuple[float, float, float]:
    """Seconds to transcode all, to append all, and to write the same bytes raw."""
    series = started(root)
    portions: list[list[Run]] = []
    transcode_s = seconds(lambda: portions.extend(transcoded(group) for group in groups))
    chunks = [b"".join(line.data for line in portion) for portion in portions]
    raw_s = seconds(lambda: raw(root / "raw", chunks))
    append_s = seconds(lambda: [series.append(portion) for portion in portions])
    return transcode_s, append_s, raw_s


def measure(folder: Path, *, per_append: int, num_messages: int) -> dict[str, float]:
    """Events a second by each way; medians of some rounds."""
    messages = [message(n) for n in range(2, num_messages + 2)]
    groups = [messages[at : at + per_append] for at in range(0, num_messages, per_append)]
    rounds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            rounds.append(one_round(Path(root), groups))
    transcode_s, append_s, raw_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    events = num_messages * EVENTS
    return {"raw": events / raw_s, "append": events / append_s, "transcoded": events / (transcode_s + append_s)}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    found = {size: measure(folder, per_append=size, num_messages=count) for size, count in SIZES.items()}
    rows: list[list[Cell]] = [
        [
            size,
            *(round(rate) for rate in rates.values()),
            rates["append"] / rates["raw"],
            rates["transcoded"] / rates["raw"],
        ]
        for size, rates in found.items()
    ]
    header = ["messages an append", "raw", "append", "transcode + append", "append/raw", "both/raw"]
    show(f"$ {command('log_series')}   (events/s, {EVENTS} a message, median of {ROUNDS})", header=header, rows=rows)
    tell("log_series", append_of_raw={str(row[0]): round(float(row[4]), 3) for row in rows})


if __name__ == "__main__":
    main()
