"""How fast a shard comes from another host: 512 MiB over NATS, against a bare stream of chunks of the same run.

    python -m benchmarks remote_shard [RUNS]

Three processes each time, as between two hosts but on one machine: the sender, NATS, and this one. `FileServer` and
`NatsSource` do it with everything (offsets checked, credit, hash, resumable); the bare stream is nats-py, credit and a
callback that hashes and writes. In turns; a bare stream that throws everything away shows what the transport can do.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import nats
import numpy as np
import uvloop

from benchmarks.bare_stream import receive
from benchmarks.results import command, show, tell
from railbus.embedded.nats_server import find_server
from railbus_dataloader.catalogue import Catalogue
from railbus_dataloader.fetching import FetchLimits, NatsSource
from railbus_dataloader.serving import FileServer, SendLimits
from railbus_dataloader.sources import WantedFile
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.endpoints import Endpoint, serving
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.contracts.requests import SendFile
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout
from railbus_shared.metrics import Metrics
from railbus_shared.settings import CommonSettings

TARGET: Final = 1.0
SHARD_BYTES: Final = 512 << 20
_ROW: Final = 8192
_WAYS: Final = ("railbus", "bare, hashed and written", "bare, thrown away")


def make(layout: Layout) -> DatasetIndex:
    """A dataset of one shard."""
    samples = SHARD_BYTES // _ROW
    rows = np.random.default_rng(0).integers(0, 255, (samples, _ROW), dtype=np.uint8)
    columns = {"x": Column(dtype="uint8", shape=(_ROW,))}
    schema = DatasetSchema(name="d", columns=columns, splits={"train": Split(first=0, samples=samples)})
    return write_dataset(layout, schema, [{"x": rows}], shard_bytes=SHARD_BYTES)


async def serve(url: str, root: Path) -> None:
    """What the dataloader of the other host does."""
    common = CommonSettings(root=root, nats_url=url)
    catalogue = Catalogue(common.layout, host="there")
    async with Bus.open(common, name="dataloader", service=True) as control, _bulk(common) as bulk:
        server = FileServer(bulk, common.layout, catalogue.index_here, limits=SendLimits())
        endpoint = Endpoint("shard", control.subjects.request("data.there", "shard"), SendFile, server.send)
        answering = serving(control, "dataloader", "", [endpoint], metrics=Metrics("there"), rejected=lambda *_: None)
        async with server.running(), answering:
            print("ready", flush=True)
            await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _bulk(common: CommonSettings) -> AsyncIterator[Bus]:
    async with Bus.open(common, name="dataloader", service=True) as bus:
        yield bus


async def measure(url: str, folder: Path, want: WantedFile, runs: int) -> dict[str, list[float]]:
    """MB/s of each way, in turns."""
    found: dict[str, list[float]] = {way: [] for way in _WAYS}
    client = await nats.connect(url)
    async with _bulk(CommonSettings(root=folder / "here", nats_url=url)) as bulk:

        async def hosts(_: WantedFile) -> Sequence[str]:
            return ["there"]

        source = NatsSource(bulk, hosts, host="here", limits=FetchLimits())
        for number in range(runs + 1):
            for way in _WAYS:
                into = folder / "arrived"
                into.unlink(missing_ok=True)
                began = time.perf_counter()
                if way == "railbus":
                    await source.fetch(want, into)
                else:
                    digest = await receive(client, into, is_kept=way != _WAYS[2])
                    assert way == _WAYS[2] or digest == want.sha256
                if number:  # the first of each warms everything up
                    found[way].append(want.bytes / (time.perf_counter() - began) / 1e6)
    await client.close()
    return found


@contextlib.contextmanager
def _process(*command: str) -> Iterator[None]:
    """A process that says when it is ready."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def nats_server(folder: Path, *options: str) -> Iterator[str]:
    """A server on a free port; its address."""
    ports = folder / "ports"
    ports.mkdir()
    arguments = ["-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(ports), *options]
    process = subprocess.Popen([find_server(), *arguments], stderr=subprocess.DEVNULL)
    try:
        while not (found := list(ports.glob("*.ports"))):
            time.sleep(0.02)
        time.sleep(0.1)
        url = found[0].read_text().split('"nats":["')[1].split('"')[0]
        yield url
    finally:
        process.terminate()
        process.wait(10)


def report(found: dict[str, list[float]]) -> None:
    rows = [[way, statistics.median(rates), min(rates), max(rates)] for way, rates in found.items()]
    show(f"$ {command('remote_shard')}   (MB/s, 512 MiB)", header=["", "median", "min", "max"], rows=rows)
    ours, bare = found[_WAYS[0]], found[_WAYS[1]]
    ratio = statistics.median(one / other for one, other in zip(ours, bare, strict=True))
    tell(
        "remote_shard",
        runs=len(ours),
        mb_per_s={way: round(statistics.median(rates), 1) for way, rates in found.items()},
        ratio_to_bare=round(ratio, 3),
        target=TARGET,
        within_target=ratio >= TARGET,
    )


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout = Layout(folder / "there")
        index = make(layout)
        shard = index.file.shards[0]
        want = WantedFile("d", index.sha256, shard.file, shard.sha256, shard.bytes)
        path = str(layout.shards("d") / shard.file)
        with (
            nats_server(folder) as url,
            _process("benchmarks.bare_stream", url, path),
            _process("benchmarks.remote_shard", "serve", url, str(layout.root)),
        ):
            found = uvloop.run(measure(url, folder, want, runs))
    report(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        uvloop.run(serve(sys.argv[2], Path(sys.argv[3])))
    else:
        main()
