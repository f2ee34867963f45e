"""Stand-ins for our own protocols."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from railbus_dataloader.sources import RemoteDataset, WantedFile
from railbus_device_manager.faults import GpuFault
from railbus_device_manager.inventory import gpu_id
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.verified import Fingerprint
from railbus_shared.errors import RailbusError, ShardCorrupt
from railbus_shared.files import sha256_file
from railbus_shared.layout import Layout


@dataclass
class FakeGpus:
    """A `GpuSource` whose GPUs a test sets; every call answers from what is set at that moment."""

    host: str
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """By UUID; a UUID that begins with `MIG-` is a slice."""
    lost: set[str] = field(default_factory=set)
    pids: dict[str, list[int]] = field(default_factory=dict)
    used_bytes: dict[str, int] = field(default_factory=dict)
    told: list[GpuFault] = field(default_factory=list)
    """Faults that are still to be told."""
    is_closed: bool = False

    def scan(self) -> list[DeviceInfo]:
        return [
            DeviceInfo(
                id=gpu_id(self.host, uuid, is_mig=uuid.startswith("MIG-")),
                host=self.host,
                kind="gpu",
                name="Fake GPU",
                uuid=uuid,
                index=index,
                is_mig=uuid.startswith("MIG-"),
                memory_bytes=memory_bytes,
                memory_used_bytes=self.used_bytes.get(uuid, 0),
                compute_pids=() if uuid in self.lost else tuple(self.pids.get(uuid, ())),
                healthy=uuid not in self.lost,
                health_reason="GPU is lost" if uuid in self.lost else "",
            )
            for index, (uuid, memory_bytes) in enumerate(self.memory_bytes.items())
        ]

    def faults(self) -> list[GpuFault]:
        told, self.told = self.told, []
        return told + [GpuFault(uuid, "fault", "GPU is lost") for uuid in sorted(self.lost)]

    def close(self) -> None:
        self.is_closed = True


_COPY_BYTES = 64 << 10


@dataclass
class FolderSource:
    """A `Source` that copies from another root, piece by piece; a test can hold it up, cut it off and damage it."""

    there: Layout
    asked: list[str] = field(default_factory=list)
    """Names of files, in the order in which they were asked for."""
    may_go: asyncio.Event = field(default_factory=asyncio.Event)
    """Set unless a test clears it; looked at before every piece."""
    cut: RailbusError | None = None
    """Raised once, after the first piece of a file."""
    is_lying: bool = False
    running: int = 0

    def __post_init__(self) -> None:
        self.may_go.set()

    async def fetch(self, wanted: WantedFile, into: Path) -> Fingerprint:
        self.asked.append(wanted.file)
        self.running += 1
        try:
            await self._copy(self.there.shards(wanted.dataset) / wanted.file, into)
        finally:
            self.running -= 1
        if (actual := sha256_file(into)) != wanted.sha256:
            raise ShardCorrupt(path=str(into), expected=wanted.sha256, actual=actual)
        return Fingerprint.of(into)

    async def _copy(self, source: Path, into: Path) -> None:
        data = source.read_bytes()
        with into.open("ab") as file:
            while file.tell() < len(data):
                await self.may_go.wait()
                piece = data[file.tell() :][:_COPY_BYTES]
                file.write(bytes(len(piece)) if self.is_lying else piece)
                file.flush()
                await asyncio.sleep(0)
                if self.cut is not None:
                    error, self.cut = self.cut, None
                    raise error


@dataclass
class FolderFinder:
    """A `Finder` of datasets that lie under another root."""

    sources: list[FolderSource]

    async def find(self, dataset: str) -> RemoteDataset:
        there = self.sources[0].there
        index = await asyncio.to_thread(DatasetIndex.load, there.dataset(dataset))
        return RemoteDataset(index, there.schema(dataset), there.index(dataset), self.sources, hosts=("there",))
