"""The dataloader as a process of its own on a real NATS, asked as a runner asks it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

import small_datasets
from railbus_shared import wire
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.requests import (
    CloseStream,
    DatasetSummary,
    OpenedStream,
    OpenStream,
    StreamProgress,
    VerifyShards,
)
from railbus_shared.errors import RailbusError, TransientError
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(60)  # starts services, several of them in some tests


@dataclass
class Dataloader:
    """A running dataloader of one host."""

    bus: Bus
    host: str
    run_dir: Path
    process: asyncio.subprocess.Process

    async def ask(self, verb: str, request: Contract) -> dict[str, object]:
        subject = self.bus.subjects.request(f"data.{self.host}", verb)
        return await self.bus.request(subject, request.to_map(), timeout_s=PATIENCE_S)

    async def is_serving(self) -> bool:
        try:
            await self.ask("close", CloseStream(stream="nobody"))
        except TransientError:
            return False
        return True

    async def value(self, name: str) -> float:
        """Of one of its metrics, as Prometheus reads it."""
        url = json.loads((self.run_dir / "dataloader.json").read_bytes())["http_url"]
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        (line,) = [line for line in lines if line.startswith(f"railbus_data_{name} ")]
        return float(line.split()[1])


@contextlib.asynccontextmanager
async def dataloader(
    bus: Bus, common: CommonSettings, root: Path, *, host: str, **settings: str
) -> AsyncIterator[Dataloader]:
    run_dir = root / "run"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")},
        "RAILBUS_NATS_URL": common.nats_url,
        "RAILBUS_ROOT": str(root),
        "RAILBUS_HOST": host,
        "RAILBUS_RUN_DIR": str(run_dir),
        "RAILBUS_DATALOADER_HTTP_PORT": "0",
        "RAILBUS_DATALOADER_SCAN_S": "0.2",
        **{f"RAILBUS_DATALOADER_{name.upper()}": value for name, value in settings.items()},
    }
    with (root.parent / f"{host}.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "railbus_dataloader", env=environment, stderr=log
        )
    running = Dataloader(bus, host, run_dir, process)
    try:
        await until(running.is_serving)
        yield running
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                assert await process.wait() == 0, (root.parent / f"{host}.log").read_text()


def root_with(folder: Path, *names: str) -> Layout:
    layout = Layout(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        small_datasets.write(layout, 40, name=name, num_shards=4)
    return layout


OPEN = OpenStream(job="j-1", lease_epoch=1, dataset="d")


async def test_a_stream_is_opened_moved_and_closed(bus: Bus, common: CommonSettings, tmp_path: Path) -> None:
    layout = root_with(tmp_path / "a", "d")
    async with dataloader(bus, common, layout.root, host="a") as service:
        opened = OpenedStream.parse(await service.ask("open", OPEN))
        assert await service.value("sessions") == 1
        await service.ask("progress", StreamProgress(stream=opened.stream, ahead=(3, 1)))
        await service.ask("verify", VerifyShards(dataset="d", shards=(3,), stream=opened.stream))
        await service.ask("close", CloseStream(stream=opened.stream))
        assert await service.value("sessions") == 0
        assert await service.value("shards_verified_total") >= 1


async def test_a_stream_that_falls_silent_ends_and_is_known_again_once_it_asks(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    layout = root_with(tmp_path / "a", "d")
    async with dataloader(bus, common, layout.root, host="a", session_ttl_s="1.5") as service:
        opened = OpenedStream.parse(await service.ask("open", OPEN))
        assert opened.ttl_s == 1.5

        async def has_ended() -> bool:
            return await service.value("sessions") == 0

        async def is_known_again() -> bool:
            await service.ask("verify", VerifyShards(dataset="d", shards=(0,), stream=opened.stream))
            return not await has_ended()

        await until(has_ended)
        await until(is_known_again)


async def test_a_dataset_of_twenty_thousand_shards_is_opened_and_read(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "a")
    index = small_datasets.write_many(layout, 20_000)
    async with dataloader(bus, common, layout.root, host="a") as service:
        answer = await service.ask("open", OPEN)
        assert len(wire.encode(answer)) < 4096
        opened = OpenedStream.parse(answer)
        assert (opened.num_shards, opened.index_sha256) == (20_000, index.sha256)
        assert small_datasets.opened_paths(opened)[19_999] == layout.shards("d") / "shard-19999.data"
        await service.ask("verify", VerifyShards(dataset="d", shards=(19_999,), stream=opened.stream))
        held = tuple(range(20_000))
        await service.ask("progress", StreamProgress(stream=opened.stream, ahead=held[:64], held=held))


async def test_a_stream_outlives_a_kill_of_the_dataloader(bus: Bus, common: CommonSettings, tmp_path: Path) -> None:
    layout = root_with(tmp_path / "a", "d")
    async with dataloader(bus, common, layout.root, host="a") as service:
        opened = OpenedStream.parse(await service.ask("open", OPEN))
        service.process.kill()
        await service.process.wait()
    async with dataloader(bus, common, layout.root, host="a") as service:
        await service.ask("progress", StreamProgress(stream=opened.stream, dataset="d", ahead=(2,), held=(1,)))
        await service.ask("verify", VerifyShards(dataset="d", shards=(2,), stream=opened.stream))
        assert await service.value("sessions") == 1
        with pytest.raises(RailbusError, match="it reads dataset 'd'"):
            await service.ask("progress", StreamProgress(stream=opened.stream, dataset="e"))


async def test_hosts_that_have_a_dataset_stand_in_its_summary_for_as_long_as_they_have_it(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    bucket = Bucket(bus, bus.subjects.datasets)
    roots = {host: root_with(tmp_path / host, "d") for host in ("a", "b")}
    small_datasets.write(roots["b"], 40, name="only-b")

    async def hosts(name: str = "d") -> tuple[str, ...] | None:
        entry = await bucket.get(name)
        return DatasetSummary.parse(entry.value).hosts if entry is not None and entry.value is not None else None

    async def until_hosts(expected: tuple[str, ...] | None, name: str = "d") -> None:
        async def are_there() -> bool:
            return await hosts(name) == expected

        await until(are_there)

    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as tasks:
            for host, layout in roots.items():
                running = dataloader(bus, common, layout.root, host=host)
                tasks.create_task(stack.enter_async_context(running))
        await until_hosts(("a", "b"))
        await until_hosts(("b",), "only-b")
        await asyncio.to_thread(shutil.rmtree, roots["b"].dataset("d"))
        await until_hosts(("a",))
        await asyncio.to_thread(shutil.rmtree, roots["b"].dataset("only-b"))
        await until_hosts(None, "only-b")
