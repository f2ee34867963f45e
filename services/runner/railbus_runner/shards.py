"""The shards that a stream holds: verified before they are first read, open until they lie behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import ShardReader, open_shard

EnsureVerified = Callable[[Sequence[int]], None]
"""Called with the numbers of shards before any of them is opened; raises what keeps them from being read."""


class HeldShards(Protocol):
    """Shards that may be read."""

    @property
    def numbers(self) -> frozenset[int]: ...

    def holds(self, number: int) -> bool: ...

    def hold(self, numbers: Iterable[int]) -> None:
        """Have shards verified that are not held; raises what keeps one from being read."""
        ...

    def let_go(self, numbers: Iterable[int]) -> None:
        """Hold shards no more."""
        ...


class Readable(Protocol):
    """Open shards, by their numbers."""

    readers: dict[int, ShardReader]

    def hold(self, numbers: Iterable[int]) -> None:
        """Have shards opened that are not open; raises what keeps one from being read."""
        ...


class OpenShards:
    """Shards that are open in this process."""

    def __init__(
        self, index: DatasetIndex, shard_paths: Mapping[int, Path], *, ensure_verified: EnsureVerified
    ) -> None:
        self._index = index
        self._paths = shard_paths
        self._ensure_verified = ensure_verified
        self.readers: dict[int, ShardReader] = {}

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(self.readers)

    def holds(self, number: int) -> bool:
        return number in self.readers

    def hold(self, numbers: Iterable[int]) -> None:
        """Have shards verified and open them; raises ShardCorrupt, and what `ensure_verified` raises."""
        new = [number for number in numbers if number not in self.readers]
        if new:
            self._ensure_verified(new)
            for number in new:
                # Not populated: it costs what the faults cost, but before the first batch; see DECISIONS.md.
                self.readers[number] = open_shard(self._paths[number], self._index, number)

    def let_go(self, numbers: Iterable[int]) -> None:
        """Close shards; their maps go with them."""
        for number in numbers:
            del self.readers[number]


class VouchedShards:
    """Shards that are verified here, and opened by other processes."""

    def __init__(self, *, ensure_verified: EnsureVerified) -> None:
        self._ensure_verified = ensure_verified
        self._held: set[int] = set()

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(self._held)

    def holds(self, number: int) -> bool:
        return number in self._held

    def hold(self, numbers: Iterable[int]) -> None:
        new = [number for number in numbers if number not in self._held]
        if new:
            self._ensure_verified(new)
            self._held.update(new)

    def let_go(self, numbers: Iterable[int]) -> None:
        self._held.difference_update(numbers)
