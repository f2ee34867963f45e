"""`RemoteDatasets`: finds a dataset that does not lie under the root, on other hosts first, then at the origins.

Other hosts have told the bucket `railbus_datasets` what they have and in which version. Schema and index are brought
here under the hash of the index, checked against it, and kept: a version never changes. A dataset that has a new
version elsewhere is another folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import orjson

from railbus_dataloader.objectstore import ObjectStoreSource, OriginFiles
from railbus_dataloader.sources import RemoteDataset, Source, WantedFile
from railbus_shared import files
from railbus_shared.contracts.artifacts import IndexFile
from railbus_shared.contracts.requests import DatasetSummary
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import (
    DatasetNotFound,
    IndexInvalid,
    NoSource,
    RailbusError,
    SchemaInvalid,
    StorageFull,
    TransientError,
    WireError,
)
from railbus_shared.names import checked_name

logger = logging.getLogger(__name__)

_MAX_KNOWN: Final = 256
_UNUSED_S: Final = 30 * 86_400.0
"""A version that nobody has asked for since is forgotten at the next start; its index can be had again."""

Summary = Callable[[str], Awaitable[DatasetSummary | None]]
"""What the hosts have told of a dataset; raises TransientError."""


class RemoteDatasets:
    """A `Finder`."""

    def __init__(
        self, folder: Path, summary: Summary, *, host: str, peers: Source, origins: Sequence[ObjectStoreSource]
    ) -> None:
        """Indexes are kept in `folder`, by hash; `peers` are the dataloaders of other hosts."""
        self._folder = folder.absolute()
        self._summary = summary
        self._host = host
        self._peers = peers
        self._origins = tuple(origins)
        self._known: dict[str, DatasetIndex] = {}

    async def tidy(self) -> None:
        """Remove what a crash has left, and versions that nobody has asked for in a long time."""
        await asyncio.to_thread(_tidy, self._folder, before_s=time.time() - _UNUSED_S)

    async def find(self, dataset: str) -> RemoteDataset:
        """Raises DatasetNotFound if nobody has it, TransientError if somebody who may have it could not be asked."""
        checked_name(dataset, kind="dataset")
        problem: RailbusError | None = None
        for look in (self._on_hosts, self._at_origins):
            try:
                found = await look(dataset)
            except StorageFull:
                raise
            except RailbusError as exc:
                logger.warning("dataset not found there", extra={"dataset": dataset, "problem": str(exc)})
                problem = problem or exc
                continue
            if found is not None:
                return found
        raise problem or DatasetNotFound(
            f"dataset has value {dataset!r}: it lies neither under this root nor on another host nor at an origin",
            hint="`railbus dataset list` shows what there is, `railbus dataset import` makes one",
            details={"field": "dataset", "value": dataset},
        )

    async def _on_hosts(self, dataset: str) -> RemoteDataset | None:
        summary = await self._summary(dataset)
        if summary is None or not set(summary.hosts) - {self._host}:
            return None
        sha256 = summary.index_sha256
        known = await self._kept(dataset, sha256)
        if known is None:
            index = await self._small(dataset, sha256, "index", sha256)
            schema = await self._small(dataset, sha256, "schema", _schema_sha256(index))
            known = await self._keep(dataset, OriginFiles(schema, index))
        return self._found(known, summary.hosts)

    async def _at_origins(self, dataset: str) -> RemoteDataset | None:
        problem: TransientError | None = None
        for origin in self._origins:
            try:
                files_there = await origin.describe(dataset)
            except NoSource as exc:
                problem = exc
                continue
            if files_there is not None:
                known = await self._kept(dataset, files_there.index_sha256)
                return self._found(known or await self._keep(dataset, files_there), ())
        if problem is not None:
            raise problem
        return None

    def _found(self, index: DatasetIndex, hosts: tuple[str, ...]) -> RemoteDataset:
        folder = self._folder / index.sha256
        sources = (self._peers, *self._origins)
        return RemoteDataset(index, folder / "schema.json", folder / "index.json", sources, hosts)

    async def _small(self, dataset: str, index_sha256: str, file: str, sha256: str) -> bytes:
        """A file of another host that fits into memory, checked against its hash."""
        temporary = self._folder / f".{index_sha256}-{secrets.token_hex(4)}.tmp"
        await asyncio.to_thread(_make, self._folder)
        try:
            await self._peers.fetch(WantedFile(dataset, index_sha256, file, sha256, None), temporary)
            return await asyncio.to_thread(temporary.read_bytes)
        finally:
            temporary.unlink(missing_ok=True)

    async def _kept(self, dataset: str, sha256: str) -> DatasetIndex | None:
        """A version that has been brought here before, and whose files are still what they were."""
        folder = self._folder / sha256
        index = self._known.get(sha256)
        if index is None:
            try:
                index = await asyncio.to_thread(DatasetIndex.read, folder / "schema.json", folder / "index.json")
            except (DatasetNotFound, SchemaInvalid, IndexInvalid):
                return None
            if index.sha256 != sha256:
                return None
            await asyncio.to_thread(_mark_used, folder)
        elif not await asyncio.to_thread((folder / "index.json").exists):
            return None
        index.check_name(dataset)
        return self._remember(index)

    async def _keep(self, dataset: str, found: OriginFiles) -> DatasetIndex:
        """Write a version down, its index last, once it holds together; raises SchemaInvalid, IndexInvalid."""
        folder = self._folder / found.index_sha256
        index = await asyncio.to_thread(DatasetIndex.parse, found.schema, found.index, folder=folder)
        index.check_name(dataset)
        await asyncio.to_thread(_write, folder, found)
        return self._remember(index)

    def _remember(self, index: DatasetIndex) -> DatasetIndex:
        self._known.pop(index.sha256, None)
        self._known[index.sha256] = index
        while len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return index


def _tidy(folder: Path, *, before_s: float) -> None:
    try:
        files.remove_litter(folder)
        for version in folder.glob("*"):
            if version.stat().st_mtime < before_s:
                shutil.rmtree(version)
    except OSError as exc:
        logger.warning("old indexes cannot be removed", extra={"folder": str(folder), "problem": repr(exc)})


def _mark_used(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is forgotten sooner, then, and had again
        os.utime(folder)


def _make(folder: Path) -> None:
    with files.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(folder: Path, found: OriginFiles) -> None:
    _make(folder)
    files.write_whole(folder / "schema.json", found.schema)
    files.write_whole(folder / "index.json", found.index)


def _schema_sha256(index: bytes) -> str:
    """What an index says of its schema; all else in it is looked at once the schema is here."""
    try:
        return IndexFile.parse(orjson.loads(index)).schema_sha256
    except (ValueError, TypeError, WireError) as exc:
        raise IndexInvalid(f"the index of another host is none: {exc}", hint="import the dataset there again") from exc
