"""Where the shards of an index lie on a host: in one folder, or in a cache, each in a folder named for its content.

Names and hashes stand in the index, so a message need only tell the folder, however many shards there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from railbus_shared.layout import cached_shard

if TYPE_CHECKING:
    from railbus_shared.data.plain import AnyIndex, AnyShard


class ShardPaths(Mapping[int, Path]):
    """Paths of the shards of an index, by their numbers; each is made when it is asked for."""

    def __init__(self, shard_map: AnyIndex, folder: Path, *, is_cached: bool = False) -> None:
        """With `is_cached`, `folder` is that of a cache."""
        self._shards: Sequence[AnyShard] = shard_map.shards
        self._folder = folder
        self._is_cached = is_cached

    def __getitem__(self, number: int) -> Path:
        """Raises KeyError for a number that the index does not have."""
        if not 0 <= number < len(self._shards):
            raise KeyError(number)
        shard = self._shards[number]
        folder = cached_shard(self._folder, cache_key(shard)) if self._is_cached else self._folder
        return folder / shard.file

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._shards)))

    def __len__(self) -> int:
        return len(self._shards)


def cache_key(shard: AnyShard) -> str:
    """Of a shard and its sidecar: the SHA-256 of what `sha256sum` would print of them."""
    lines = [f"{shard.sha256}  {shard.file}\n"]
    if shard.sidecar is not None:
        lines.append(f"{shard.sidecar.sha256}  {shard.sidecar.file}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
