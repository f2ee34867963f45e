"""The datasets that can be read on this host, and where each of their shards lies: under the root, or in the cache.

An index is kept in memory and read again when its files have changed. A dataset under the root wins over one elsewhere.
A shard in the cache has a folder of its own, named for its content and its file names, so that versions of a dataset
share what is the same, and a sidecar lies beside its shard under the name that the index gives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import aiofiles

from railbus_dataloader.sources import Finder, RemoteDataset, Source, WantedFile
from railbus_dataloader.verification import Wanted
from railbus_shared import clock
from railbus_shared.contracts.artifacts import Shard
from railbus_shared.contracts.requests import DatasetSummary, SplitSummary
from railbus_shared.data.index import DatasetIndex, schema_of, unreadable
from railbus_shared.data.shard_paths import cache_key
from railbus_shared.errors import DatasetNotFound, IndexInvalid, InvalidName, NotFound, RailbusError, SchemaInvalid
from railbus_shared.layout import Layout, cached_shard
from railbus_shared.names import checked_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocatedShard:
    """Where the files of a shard lie on this host, or will once they have been fetched."""

    files: tuple[Wanted, ...]
    """The shard, and its sidecar where it has one."""
    key: str = ""
    """In the cache; empty for a shard under the root."""

    @property
    def path(self) -> Path:
        return self.files[0].path

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Located:
    """A dataset, and where it lies for readers on this host."""

    index: DatasetIndex
    schema_path: Path
    index_path: Path
    shards_path: Path
    """As `ShardPaths` wants it: of the folder of all shards, or of the cache."""
    shards: tuple[LocatedShard, ...]
    hosts: tuple[str, ...]
    sources: Sequence[Source] = ()

    @property
    def name(self) -> str:
        return self.index.schema.name

    @property
    def is_remote(self) -> bool:
        return bool(self.shards[0].key)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of every shard with its sidecar."""
        return tuple(shard.bytes for shard in self.shards)

    def shard(self, number: int) -> LocatedShard:
        """Raises NotFound for a number that the index does not have."""
        if not 0 <= number < len(self.shards):
            raise NotFound(
                f"field 'shards' has value {number}: dataset {self.name!r} has shards 0 to {len(self.shards) - 1}",
                details={"field": "shards", "value": number},
            )
        return self.shards[number]

    def wanted_file(self, file: Wanted) -> WantedFile:
        """What to ask a source for."""
        return WantedFile(self.name, self.index.sha256, file.path.name, file.sha256, file.bytes)


@dataclass(frozen=True)
class _Remembered:
    """An index, and the two files as they were when it was read."""

    index: DatasetIndex
    files: tuple[tuple[int, int, int], ...]
    located: Located | None = None


class Catalogue:
    """Datasets as one host sees them."""

    def __init__(self, layout: Layout, *, host: str, finder: Finder | None = None) -> None:
        self._layout = layout
        self._host = host
        self._finder = finder
        self._indexes: dict[str, _Remembered] = {}

    async def list_all(self) -> list[DatasetSummary]:
        """All datasets under the root that hold together, by name; what does not is logged."""
        found: list[DatasetSummary] = []
        for name in await asyncio.to_thread(self._names):
            try:
                found.append(_summary(await self._here(name)))
            except RailbusError as exc:
                logger.warning("not a dataset", extra={"dataset": name, "problem": str(exc)})
        return found

    async def describe(self, name: str) -> DatasetSummary:
        """Look at a dataset; raises DatasetNotFound, SchemaInvalid, IndexInvalid, InvalidName."""
        return _summary(await self.locate(name))

    async def locate(self, name: str) -> Located:
        """A dataset under the root, else one that the finder finds.

        Raises DatasetNotFound, SchemaInvalid, IndexInvalid, ShardCorrupt for a shard of another size, InvalidName.
        """
        try:
            return await self._here(name)
        except DatasetNotFound:
            if self._finder is None:
                raise
        return await asyncio.to_thread(self._elsewhere, await self._finder.find(name))

    async def _here(self, name: str) -> Located:
        index = await self.index_here(name)
        folder = await asyncio.to_thread(self._layout.shards(name).resolve)
        known = self._indexes.get(name)
        if known is not None and known.index is index and known.located and known.located.shards_path == folder:
            return known.located
        located = await asyncio.to_thread(self._placed, index, folder)
        if known is not None and known.index is index:
            self._indexes[name] = replace(known, located=located)
        return located

    def _placed(self, index: DatasetIndex, folder: Path) -> Located:
        """A dataset whose shards lie in a folder; an index of thousands takes a while."""
        dataset = folder.parent
        shards = tuple(LocatedShard(_files(shard, folder)) for shard in index.file.shards)
        return Located(index, dataset / "schema.json", dataset / "index.json", folder, shards, hosts=(self._host,))

    def _elsewhere(self, found: RemoteDataset) -> Located:
        shards = []
        cache = self._layout.cache.absolute()
        for shard in found.index.file.shards:
            key = cache_key(shard)
            shards.append(LocatedShard(_files(shard, cached_shard(cache, key)), key))
        return Located(
            found.index,
            found.schema_path,
            found.index_path,
            cache,
            tuple(shards),
            hosts=found.hosts,
            sources=found.sources,
        )

    async def index_here(self, name: str) -> DatasetIndex:
        """A dataset's index, read again only when its files have changed; the sizes of its shards are looked at."""
        folder = self._layout.dataset(name)
        schema_path, index_path = self._layout.schema(name), self._layout.index(name)
        stamps = await asyncio.to_thread(_stamps, (schema_path, index_path))
        known = self._indexes.pop(name, None)
        if known is None or known.files != stamps:
            index = await _read(index_path, IndexInvalid)  # before the schema, as `schema_of` wants it
            schema = await _read(schema_path, SchemaInvalid)
            schema = await asyncio.to_thread(schema_of, index, schema, folder=folder)
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


def _files(shard: Shard, folder: Path) -> tuple[Wanted, ...]:
    found = Wanted(folder / shard.file, shard.sha256, shard.bytes)
    beside = shard.sidecar
    return (found,) if beside is None else (found, Wanted(folder / beside.file, beside.sha256, beside.bytes))


def _summary(located: Located) -> DatasetSummary:
    index = located.index
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
        hosts=located.hosts,
        described_at=clock.now(),
    )


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
