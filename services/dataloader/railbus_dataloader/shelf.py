"""Cached shards as folders on the disk: `<cache>/<key[:2]>/<key>/`, each with a shard and its sidecar.

A folder appears whole and vanishes whole, each by one rename; under a name that starts with a dot it is litter.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Final

from railbus_shared import files

_BUNDLES: Final = "[0-9a-f][0-9a-f]"


def stock(cache: Path, *, budget_bytes: int) -> list[tuple[str, int]]:
    """Keys and sizes of the shards that lie in a cache, the least recently used first.

    Litter is removed, and of what does not fit into the budget the oldest.
    """
    for bundle in cache.glob(_BUNDLES):
        files.remove_litter(bundle)
    found = sorted((path.stat().st_mtime, path, _size(path)) for path in _shards(cache))
    surplus = sum(size for _, _, size in found) - budget_bytes
    kept: list[tuple[str, int]] = []
    for _, path, size in found:
        if surplus > 0:
            clear(retire(path))
            surplus -= size
        else:
            kept.append((path.name, size))
    return kept


def size_of(cache: Path) -> int:
    """Bytes of all files in a cache."""
    return sum(_size(path) for path in _shards(cache))


def make_empty(folder: Path) -> None:
    """A new folder, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(temporary: Path, final: Path) -> None:
    """Make a folder's files durable and give it its place."""
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files.fsync_dir(temporary)
    temporary.rename(final)
    files.fsync_dir(final.parent)


def retire(folder: Path) -> Path:
    """Take a cached shard from its place, whole; where it lies then, as litter, until it is cleared away.

    A shard that is not there has left already. Raises OSError if it stays where it is.
    """
    leaving = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.gone")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(leaving)
    return leaving


def clear(leaving: Path) -> None:
    """Remove what was retired, as far as it is still there; raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(leaving)


def mark_used(folder: Path) -> None:
    """So that after a restart it is known what was not used for longest; the times of the files stay as they are."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def _shards(cache: Path) -> list[Path]:
    return [path for path in cache.glob(f"{_BUNDLES}/*") if path.is_dir() and not path.name.startswith(".")]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
