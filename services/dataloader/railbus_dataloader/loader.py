"""`ShardLoader`: what datasets lie under a root, and their shards verified and warm before a trainer wants them."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiofiles
import psutil

from railbus_dataloader.verification import Verification, Wanted
from railbus_shared import clock
from railbus_shared.contracts.requests import (
    DatasetSummary,
    OpenedStream,
    OpenStream,
    SplitSummary,
    StreamShard,
    VerifiedShards,
)
from railbus_shared.data.index import DatasetIndex, unreadable
from railbus_shared.errors import IndexInvalid, InvalidName, NotFound, RailbusError, SchemaInvalid
from railbus_shared.layout import Layout
from railbus_shared.names import checked_name

logger = logging.getLogger(__name__)

_MAX_STREAMS_AHEAD: Final = 64
_WARM_FRAC: Final = 0.5
"""Of the memory that is available: a larger dataset would push its own beginning out of the page cache."""


@dataclass(frozen=True)
class _Remembered:
    """An index, and the two files as they were when it was read."""

    index: DatasetIndex
    files: tuple[tuple[int, int, int], ...]


class ShardLoader:
    """Datasets of one root, as one host sees them."""

    def __init__(self, layout: Layout, *, host: str, state_dir: Path) -> None:
        self._layout = layout
        self._host = host
        self._verification = Verification(state_dir / "verified.json")
        self._indexes: dict[str, _Remembered] = {}
        self._ahead: asyncio.Queue[list[Wanted]] = asyncio.Queue(_MAX_STREAMS_AHEAD)

    # --- what there is -----------------------------------------------------------------------------------------------

    async def list_all(self) -> list[DatasetSummary]:
        """All datasets that hold together, by name; what does not is logged."""
        found: list[DatasetSummary] = []
        for name in await asyncio.to_thread(self._names):
            try:
                found.append(await self.describe(name))
            except RailbusError as exc:
                logger.warning("not a dataset", extra={"dataset": name, "problem": str(exc)})
        return found

    async def describe(self, name: str) -> DatasetSummary:
        """Look at a dataset; raises DatasetNotFound, SchemaInvalid, IndexInvalid, InvalidName."""
        index = await self._index(name)
        return DatasetSummary(
            dataset=index.schema.name,
            description=index.schema.description,
            format=index.schema.payload,
            samples=index.file.samples,
            bytes=index.file.bytes,
            num_shards=len(index.file.shards),
            splits={split: SplitSummary(samples=found.samples) for split, found in index.schema.splits.items()},
            columns=tuple(index.schema.columns),
            index_sha256=index.sha256,
            hosts=(self._host,),
            described_at=clock.now(),
        )

    # --- streams -----------------------------------------------------------------------------------------------------

    async def open(self, request: OpenStream) -> OpenedStream:
        """Where a trainer finds a dataset's shards; from now on they are warmed and verified in order, if `run` runs.

        Raises DatasetNotFound, SchemaInvalid, IndexInvalid, ShardCorrupt.
        """
        index = await self._index(request.dataset)
        wanted = await asyncio.to_thread(self._all_wanted, index)
        shards = await asyncio.to_thread(self._stream_shards, wanted)
        if self._ahead.full():
            logger.info("stream not read ahead: too many wait", extra={"dataset": request.dataset})
        else:
            self._ahead.put_nowait(wanted)
        return OpenedStream(
            stream=f"s-{secrets.token_hex(8)}",
            dataset=request.dataset,
            schema_path=str(self._layout.schema(request.dataset).resolve()),
            index_path=str(self._layout.index(request.dataset).resolve()),
            index_sha256=index.sha256,
            shards=tuple(shards),
        )

    async def verify(self, name: str, shards: Sequence[int] | None = None, *, again: bool = False) -> VerifiedShards:
        """Make sure that shards have their hashes, all of them if none are named.

        Raises ShardCorrupt, IndexInvalid, and NotFound for a number that the index does not have.
        """
        index = await self._index(name)
        known = range(len(index.file.shards))
        numbers = known if shards is None else shards
        if unknown := [number for number in numbers if number not in known]:
            raise NotFound(
                f"field 'shards' has value {unknown[0]}: dataset {name!r} has shards 0 to {len(known) - 1}",
                details={"field": "shards", "value": unknown[0]},
            )
        wanted = await asyncio.to_thread(self._all_wanted, index)
        for number in numbers:
            await self._verification.verify(wanted[number], again=again)
        return VerifiedShards(
            dataset=name, shards=tuple(numbers), bytes=sum(index.file.shards[number].bytes for number in numbers)
        )

    async def run(self) -> None:
        """Warm and verify ahead of the readers, one shard after another, until cancelled."""
        while True:
            wanted = await self._ahead.get()
            spare_bytes = int(psutil.virtual_memory().available * _WARM_FRAC)
            for one in wanted:
                spare_bytes -= one.bytes
                await self._prepare(one, is_warmed=spare_bytes >= 0)

    async def close(self) -> None:
        """Wait for the hashing that is under way."""
        await self._verification.close()

    async def _prepare(self, wanted: Wanted, *, is_warmed: bool) -> None:
        """Warm and verify one shard; whoever reads it is told what is wrong with it."""
        try:
            if is_warmed:
                await asyncio.to_thread(_warm, wanted.path)
            await self._verification.verify(wanted)
        except (RailbusError, OSError) as exc:
            logger.warning("shard not ready", extra={"path": str(wanted.path), "problem": str(exc)})

    def _all_wanted(self, index: DatasetIndex) -> list[Wanted]:
        """All shards of a dataset, by number."""
        folder = self._layout.shards(index.schema.name).resolve()
        return [Wanted(folder / shard.file, shard.sha256, shard.bytes) for shard in index.file.shards]

    def _stream_shards(self, wanted: list[Wanted]) -> list[StreamShard]:
        return [
            StreamShard(
                number=number, path=str(one.path), sha256=one.sha256, verified=self._verification.is_verified(one)
            )
            for number, one in enumerate(wanted)
        ]

    # --- indexes -----------------------------------------------------------------------------------------------------

    async def _index(self, name: str) -> DatasetIndex:
        """A dataset's index, read again only when its files have changed; the sizes of its shards are looked at."""
        folder = self._layout.dataset(name)
        schema_path, index_path = self._layout.schema(name), self._layout.index(name)
        stamps = await asyncio.to_thread(_stamps, (schema_path, index_path))
        known = self._indexes.pop(name, None)
        if known is None or known.files != stamps:
            schema, index = await _read(schema_path, SchemaInvalid), await _read(index_path, IndexInvalid)
            found = await asyncio.to_thread(DatasetIndex.parse, schema, index, folder=folder)
            found.check_name(name)
            known = _Remembered(found, stamps)
        self._indexes[name] = known
        await asyncio.to_thread(known.index.check_files, self._layout.shards(name))
        return known.index

    def _names(self) -> list[str]:
        names: list[str] = []
        for path in sorted(self._layout.datasets.glob("*/index.json")):
            try:
                names.append(checked_name(path.parent.name, kind="dataset"))
            except InvalidName as exc:
                logger.warning("a folder cannot be a dataset", extra={"problem": str(exc)})
        return names


def _stamps(paths: tuple[Path, ...]) -> tuple[tuple[int, int, int], ...]:
    """Size, time and inode of files; zeros for one that cannot be looked at."""
    found = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_size, status.st_mtime_ns, status.st_ino))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


async def _read(path: Path, error: type[RailbusError]) -> bytes | None:
    """A file's bytes, None if it is missing; raises `error` if it cannot be read."""
    try:
        async with aiofiles.open(path, "rb") as file:
            return await file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise unreadable(path, exc, error) from exc


def _warm(path: Path) -> None:
    """Ask the system to bring a file into the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
