"""Shards verified by the process that reads them, where no dataloader vouches: in a notebook, in a copy of a stream.

Each is hashed once for a user of a host; that is remembered in the user's cache, which processes share.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from railbus_shared import files
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.verified import Fingerprint, Verified, read_verified, write_verified
from railbus_shared.errors import NotSupported, ShardCorrupt, StorageFull

logger = logging.getLogger(__name__)


def user_memory() -> Path:
    """Where this user's verified shards are remembered."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "railbus" / "verified.json"


class HashedHere:
    """Verifies shards, and the sidecars beside them, in the calling thread."""

    def __init__(
        self, index: DatasetIndex, shard_paths: Mapping[int, Path], *, memory: Path, verified: Iterable[int] = ()
    ) -> None:
        """`verified` are shards that somebody vouches for already."""
        self._index = index
        self._paths = shard_paths
        self._memory = memory
        self._verified = set(verified)

    def __call__(self, numbers: Sequence[int], *, again: bool = False) -> None:
        """Make sure that these shards have their hashes; with `again` even if that is remembered.

        Raises ShardCorrupt for one that has not, or cannot be read.
        """
        unknown = [number for number in numbers if again or number not in self._verified]
        if not unknown:
            return
        known = {} if again else read_verified(self._memory)
        hashed = {
            str(path): _verified(path, sha256)
            for number in unknown
            for path, sha256 in self._files(number)
            if not _is_known(known.get(str(path)), path, sha256)
        }
        if hashed:
            self._remember(hashed)
        self._verified.update(unknown)

    def _files(self, number: int) -> Iterator[tuple[Path, str]]:
        shard, path = self._index.shard_map.shards[number], self._paths[number]
        yield path.absolute(), shard.sha256
        if shard.sidecar is not None:
            yield path.absolute().with_name(shard.sidecar.file), shard.sidecar.sha256

    def _remember(self, hashed: Mapping[str, Verified]) -> None:
        """Add to what all processes of this user remember; where that fails, it is hashed again next time."""
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with self._memory.with_suffix(".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                known = read_verified(self._memory)
                others = {path: one for path, one in known.items() if path not in hashed}
                write_verified(self._memory, {**others, **hashed})
        except (OSError, StorageFull) as exc:
            logger.warning("verified shards not remembered", extra={"problem": repr(exc)})


class NotFetched:
    """Refuses the shards of a dataset that lies elsewhere, for a process that can ask nobody for them."""

    def __init__(self, index: DatasetIndex) -> None:
        self._dataset = index.schema.name

    def __call__(self, numbers: Sequence[int]) -> None:
        """Raises NotSupported, whatever lies here: nothing would keep it here."""
        raise NotSupported(
            f"dataset {self._dataset!r} lies on another host or in object storage, and a copy of its stream in another "
            f"process cannot have shard {numbers[0]} fetched: torch's DataLoader makes one for each of its workers",
            hint="iterate over a stream that has workers of its own, as by `ctx.stream(..., workers=N)`, or use "
            "DataLoader(num_workers=0)",
        )


def _is_known(known: Verified | None, path: Path, sha256: str) -> bool:
    try:
        return known is not None and known == (Fingerprint.of(path), sha256)
    except OSError:
        return False  # whoever reads it is told why it cannot be read


def _verified(path: Path, sha256: str) -> Verified:
    try:
        before = Fingerprint.settled(path)
        actual = files.sha256_file(path)
    except OSError as exc:
        raise ShardCorrupt(path=str(path), expected=sha256, actual=exc.strerror or repr(exc)) from exc
    if actual != sha256:
        raise ShardCorrupt(path=str(path), expected=sha256, actual=actual)
    return Verified(before, actual)
