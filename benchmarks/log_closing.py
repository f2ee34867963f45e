"""What the closing of a large period costs those who write: the lag of events meanwhile.

    python -m benchmarks log_closing [MB]

On a real `railbus up`: the plain file is filled to so many megabytes (600), then 1000 events a second come, one at a
time, and after some seconds the period is closed (`railbus.req.telemetry.flush`). The lag of an event is from its time
to the moment when its line can be read in a file that grows; the same without a closing stands beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from benchmarks.event_load import as_runner
from benchmarks.results import Cell, command, quantile, show, tell
from benchmarks.running import Running, running_up
from benchmarks.telemetry import Load, caught_up
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared import clock
from railbus_shared.bus.connection import Bus
from railbus_shared.layout import CLOSED_LOG_NAME, LOG_NAME, Layout

_MB: Final = 600
_MESSAGES: Final = 100
_SIZE: Final = 1000
_RATE: Final = 1000
_SECONDS: Final = 16
_BEFORE_S: Final = 5.0
_POLL_S: Final = 0.002


class Tail(threading.Thread):
    """Reads what is appended to a day's files that grow, whatever they are called, and notes the lag of each line."""

    def __init__(self, folder: Path, producer: str) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._wanted = f'"producer":"{producer}"'.encode()
        self._open: dict[int, tuple[BinaryIO, bytes]] = {}
        self.ending = threading.Event()
        self.lags: list[float] = []

    def run(self) -> None:
        for path in self._paths():
            self._begin(path, at_end=True)
        while not self.ending.wait(_POLL_S):
            for path in self._paths():
                self._begin(path, at_end=False)
            for inode in list(self._open):
                self._read(inode)

    def _paths(self) -> list[Path]:
        return [path for path in self._folder.glob(f"{LOG_NAME}*") if path.name != CLOSED_LOG_NAME]

    def _begin(self, path: Path, *, at_end: bool) -> None:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino not in self._open:
                file = path.open("rb")
                file.seek(0, os.SEEK_END if at_end else os.SEEK_SET)
                self._open[os.fstat(file.fileno()).st_ino] = file, b""

    def _read(self, inode: int) -> None:
        file, rest = self._open[inode]
        data, seen_ns = rest + file.read(), time.time_ns()
        *lines, rest = data.split(b"\n")
        self._open[inode] = file, rest
        times = [orjson.loads(line)["time"] for line in lines if self._wanted in line]
        self.lags += [(seen_ns - clock.parse_rfc3339(made)) / 1e9 for made in times]


def size_of(plain: Path) -> int:
    return plain.stat().st_size if plain.exists() else 0


async def filled(up: Running, bus: Bus, plain: Path, limit_bytes: int) -> None:
    turn = 0
    while size_of(plain) < limit_bytes:
        load = Load("publish", up.root, _SIZE, _MESSAGES, f"bench-fill-{turn}", "ours")
        load.start()
        await asyncio.to_thread(load.result)
        await caught_up(bus)
        turn += 1


async def lags(up: Running, folder: Path, producer: str, *, closes: bool) -> tuple[list[float], float]:
    """Of each event, and how long the closing took."""
    load, tail, took_s = Load("paced", up.root, _RATE, _SECONDS, producer), Tail(folder, producer), 0.0
    tail.start()
    load.start()
    async with asyncio.TaskGroup() as tasks:
        ended = tasks.create_task(asyncio.to_thread(load.result))
        await asyncio.sleep(_BEFORE_S)
        if closes:
            async with Client.connect(up.settings) as client:
                began = time.perf_counter()
                await client.flush()
                took_s = time.perf_counter() - began
        await ended
    await asyncio.sleep(1.0)
    tail.ending.set()
    tail.join()
    assert len(tail.lags) == _RATE * _SECONDS, f"{len(tail.lags)} lines were seen"
    return tail.lags, took_s


async def measured(up: Running, num_mb: int) -> None:
    folder = Layout(up.root).day(datetime.now(UTC).date())
    async with as_runner(up.settings) as bus:
        await caught_up(bus)
        await filled(up, bus, folder / LOG_NAME, num_mb * 1_000_000)
        plain_bytes = size_of(folder / LOG_NAME)
        before, _ = await lags(up, folder, "bench-before", closes=False)
        during, took_s = await lags(up, folder, "bench-during", closes=True)
    found: dict[str, dict[str, float]] = {}
    for name, some in {"no closing": before, "a closing": during}.items():
        found[name] = {"p50": quantile(some, 0.5), "p99": quantile(some, 0.99), "max": max(some)}
    rows: list[list[Cell]] = [[name, *values.values()] for name, values in found.items()]
    title = f"$ {command('log_closing')}   {plain_bytes / 1e6:.0f} MB closed in {took_s:.1f} s; lag of events, s"
    show(title, header=["", "p50", "p99", "max"], rows=rows)
    told = {name: {key: round(value, 3) for key, value in values.items()} for name, values in found.items()}
    tell("log_closing", plain_mb=round(plain_bytes / 1e6), closing_s=round(took_s, 2), lag_s=told)


def main() -> None:
    num_mb = int(sys.argv[1]) if len(sys.argv) > 1 else _MB
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        with running_up(root) as up:
            asyncio.run(measured(up, num_mb))


if __name__ == "__main__":
    main()
