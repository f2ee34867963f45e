"""Where the files of a dataset come from that does not lie under the root: what a source of bytes must do.

A source is another dataloader, or object storage. The cache decides what is fetched, when, and where to; a source only
brings bytes. It hashes what it writes, as it writes it, and vouches for the file by its fingerprint, so that a shard
is hashed once on its way into the cache and not again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.verified import Fingerprint


@dataclass(frozen=True)
class WantedFile:
    """A file of a dataset, and what its index says of it."""

    dataset: str
    index_sha256: str
    """The version of the dataset: a source that has another one is of no use."""
    file: str
    """The name of a shard or of a sidecar; or `schema` or `index`."""
    sha256: str
    bytes: int | None
    """None where only the hash is known, as of an index."""


class Source(Protocol):
    """One kind of place that files come from."""

    async def fetch(self, wanted: WantedFile, into: Path) -> Fingerprint:
        """Append to `into`, from its present size on, until the file is whole; hash all of it on the way.

        Returns what the file was when its last byte had been written, if the hash of its bytes was the one wanted.

        Never writes more than `wanted.bytes`: room is reserved for so many and for no more. The caller flushes the file
        and gives it its name.
        Raises TransientError if it cannot be had from here at present; what arrived stays, and the next source goes on
        from there. Raises ShardCorrupt, naming the place, if the bytes there are not those of the index.
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
    hosts: tuple[str, ...] = ()
    """That have it, where that is known."""


class Finder(Protocol):
    """Looks for datasets that do not lie under the root."""

    async def find(self, dataset: str) -> RemoteDataset:
        """Raises DatasetNotFound if nobody has it, TransientError if nobody could be asked."""
        ...
