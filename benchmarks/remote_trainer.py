"""How long a trainer waits for a dataset that lies on another host only, while its dataloader fetches ahead.

    python -m benchmarks remote_trainer [SHARE]

Two dataloaders with roots of their own on one NATS, each a process, and this one in place of a runner and its trainer:
it opens a stream, says what it will read next, has each shard verified, and reads it at a pace. First as fast as it
can, which gives the rate at which shards come; then another dataset at a share of that rate (half, if not told
otherwise). A wait is the time from asking for a shard to the answer that it may be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import uvloop

from benchmarks.remote_shard import nats_server
from benchmarks.results import Cell, command, show, tell
from railbus_shared.bus import topology
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.contracts.requests import OpenedStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.shard_paths import ShardPaths
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings

TARGET_FRAC: Final = 0.01
SHARDS: Final = 4
SHARD_BYTES: Final = 256 << 20
"""The least that a shard of a large dataset has."""
_ROW: Final = 8192
_READ_BYTES: Final = 1 << 20
_READY_S: Final = 30.0


def make(layout: Layout, name: str) -> None:
    samples = SHARDS * SHARD_BYTES // _ROW
    rows = np.random.default_rng(len(name)).integers(0, 255, (samples // SHARDS, _ROW), dtype=np.uint8)
    columns = {"x": Column(dtype="uint8", shape=(_ROW,))}
    schema = DatasetSchema(name=name, columns=columns, splits={"train": Split(first=0, samples=samples)})
    parts = ({"x": np.roll(rows, number)} for number in range(SHARDS))
    index = write_dataset(layout, schema, parts, shard_bytes=SHARD_BYTES)
    assert len(index.file.shards) == SHARDS, len(index.file.shards)


class Trainer:
    """Reads all shards of a dataset in order, through the dataloader of host `here`."""

    def __init__(self, bus: Bus, opened: OpenedStream) -> None:
        self._bus = bus
        self._opened = opened
        self.waits_s: list[float] = []
        """Until each shard could be read."""
        self.took_s = 0.0
        """From the moment that the first shard could be read to the end of the last."""

    @classmethod
    async def open(cls, bus: Bus, dataset: str) -> Trainer:
        answer = await _ask(bus, "open", {"job": "j-1", "lease_epoch": 1, "dataset": dataset})
        return cls(bus, OpenedStream.parse(answer))

    async def read(self, *, bytes_per_s: float) -> None:
        began = 0.0
        index = DatasetIndex.read(Path(self._opened.schema_path), Path(self._opened.index_path))
        paths = ShardPaths(index.file, Path(self._opened.shards_path), is_cached=self._opened.is_cached)
        for number, path in paths.items():
            ahead = list(range(number, len(paths)))
            released = [number - 1] if number else []
            said = {"stream": self._opened.stream, "ahead": ahead, "released": released}
            await _ask(self._bus, "progress", said)  # a trainer says it in passing, and waits for no answer
            asked = time.perf_counter()
            wanted = {"dataset": self._opened.dataset, "stream": self._opened.stream, "shards": [number]}
            await _ask(self._bus, "verify", wanted)
            self.waits_s.append(time.perf_counter() - asked)
            began = began or time.perf_counter()
            await asyncio.to_thread(_read_at, path, bytes_per_s)
        self.took_s = time.perf_counter() - began

    @property
    def waited_frac(self) -> float:
        """Of the time after the first shard, how much was waited."""
        return sum(self.waits_s[1:]) / self.took_s


def _read_at(path: Path, bytes_per_s: float) -> None:
    """Read a file at a pace."""
    began, done = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            done += len(data)
            time.sleep(max(0.0, began + done / bytes_per_s - time.perf_counter()))


async def _ask(bus: Bus, verb: str, body: dict[str, object]) -> dict[str, object]:
    return await bus.request(bus.subjects.request("data.here", verb), body, timeout_s=60)


@contextlib.contextmanager
def dataloader(url: str, root: Path, host: str) -> Iterator[None]:
    """One host's dataloader, ready."""
    state = Layout(root).state
    own = {"NATS_URL": url, "ROOT": str(root), "HOST": host, "RUN_DIR": str(state / "run")}
    own |= {"DATALOADER_HTTP_PORT": "0", "DATALOADER_SCAN_S": "0.5"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")}
    environment = {**kept, **{f"RAILBUS_{name}": value for name, value in own.items()}}
    process = subprocess.Popen([sys.executable, "-m", "railbus_dataloader"], env=environment, stderr=subprocess.DEVNULL)
    try:
        _until_ready(state / "run" / "dataloader.json")
        yield
    finally:
        process.terminate()
        process.wait(20)


def _until_ready(run_file: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            url = json.loads(run_file.read_bytes())["http_url"]
            urllib.request.urlopen(f"{url}/readyz", timeout=2).close()  # noqa: S310 - our own
            return
        time.sleep(0.05)
    raise AssertionError(f"no dataloader is ready after {_READY_S:g} s")


async def measure(url: str, root: Path, share: float) -> tuple[Trainer, Trainer, float]:
    """A trainer that reads as fast as it can, one at a share of that rate, and the second one's rate in bytes/s."""
    async with Bus.open(CommonSettings(root=root, nats_url=url), name="bench") as bus:
        await topology.ensure(bus, root / "store.json")
        await asyncio.sleep(2)  # until the other host has told what it has
        fast = await Trainer.open(bus, "fast")
        began = time.perf_counter()
        await fast.read(bytes_per_s=1e12)
        rate = SHARDS * SHARD_BYTES / (time.perf_counter() - began)
        paced = await Trainer.open(bus, "paced")
        await paced.read(bytes_per_s=rate * share)
    return fast, paced, rate


def report(fast: Trainer, paced: Trainer, *, rate: float, share: float) -> None:
    mb = SHARDS * SHARD_BYTES / 1e6
    rows: list[list[Cell]] = [
        ["as fast as they come", rate / 1e6, fast.waits_s[0], fast.took_s, fast.waited_frac * 100],
        [f"at {share:g} of that", mb / paced.took_s, paced.waits_s[0], paced.took_s, paced.waited_frac * 100],
    ]
    show(
        f"$ {command('remote_trainer')}   ({SHARDS} shards of 256 MiB)",
        header=["", "MB/s", "first shard, s", "then, s", "waited, %"],
        rows=rows,
    )
    tell(
        "remote_trainer",
        rate_mb_per_s=round(rate / 1e6, 1),
        share=share,
        first_shard_s=round(paced.waits_s[0], 3),
        waited_frac=round(paced.waited_frac, 5),
        longest_wait_s=round(max(paced.waits_s[1:]), 4),
        target=TARGET_FRAC,
        within_target=paced.waited_frac < TARGET_FRAC,
    )


def main() -> None:
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dataset in ("fast", "paced"):
            make(Layout(folder / "there"), dataset)
        (folder / "here").mkdir()
        with (
            nats_server(folder, "-js", "-sd", str(folder / "store")) as url,
            dataloader(url, folder / "there", "there"),
            dataloader(url, folder / "here", "here"),
        ):
            fast, paced, rate = uvloop.run(measure(url, folder / "here", share))
    report(fast, paced, rate=rate, share=share)


if __name__ == "__main__":
    main()
