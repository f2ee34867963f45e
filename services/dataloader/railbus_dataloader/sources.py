"""Where the files of a dataset come from that does not lie under the root: what a source of bytes must do.

A source is another dataloader, or object storage. The cache decides what is fetched, when, and where to; a source only
brings bytes. Whatever it brings is hashed before anybody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from railbus_shared.data.index import DatasetIndex


@dataclass(frozen=True)
class WantedFile:
    """A file of a dataset that is to be brought here."""

    dataset: str
    index_sha256: str
    """The version of the dataset: a source that has another one is of no use."""
    file: str
    """`schema.json`, `index.json`, or the name of a shard or sidecar under `shards/`."""
    sha256: str
    bytes: int


class Source(Protocol):
    """Somewhere else that a dataset's files can be had from."""

    async def fetch(self, wanted: WantedFile, into: Path) -> None:
        """Append to `into` what it lacks, from its present size on, until it holds the file; flush nothing.

        Never writes more than `wanted.bytes`: the room for so many is reserved, and for no more. What was written
        before an error stays, and the next try or the next source goes on from there.
        Raises TransientError where another try or another source may help, ShardCorrupt where the bytes are wrong.
        """
        ...


@dataclass(frozen=True)
class RemoteDataset:
    """A dataset that lies elsewhere: its schema and index have been brought here and checked, its shards have not."""

    index: DatasetIndex
    schema_path: Path
    index_path: Path
    sources: Sequence[Source]
    """Tried in this order for every file."""


class Finder(Protocol):
    """Looks for datasets that do not lie under the root."""

    async def find(self, dataset: str) -> RemoteDataset:
        """Raises DatasetNotFound if nobody has it, TransientError if nobody could be asked."""
        ...
