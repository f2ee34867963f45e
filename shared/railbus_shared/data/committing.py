"""The last step of a write: shards, schema and index take their places so that a reader always finds a dataset that
holds together.

A new dataset exists once its `index.json` is there. A new version of one exists once its `index.json` has replaced the
older one; `schema.json` is replaced just before, so for an instant the index is one version older than the schema. Both
files of the older version then lie in `versions/` already, where a reader finds the schema that the index names.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from railbus_shared import files
from railbus_shared.contracts.artifacts import Shard
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.journal import files_of, is_whole
from railbus_shared.errors import Conflict
from railbus_shared.layout import Layout

logger = logging.getLogger(__name__)


def commit_new(layout: Layout, index: DatasetIndex, staged: Path, *, schema_bytes: bytes, index_bytes: bytes) -> None:
    """Make a dataset exist, or put right one of the same content; raises Conflict if it is there with other content."""
    name = index.schema.name
    if layout.index(name).exists():
        _repair(layout, index, staged, schema_bytes=schema_bytes, index_bytes=index_bytes)
        return
    if layout.shards(name).exists():  # of an import that never wrote its index
        shutil.rmtree(layout.shards(name))
    layout.shards(name).mkdir()
    files.fsync_dir(layout.dataset(name))
    _place(layout.shards(name), staged, index.file.shards)
    files.write_whole(layout.schema(name), schema_bytes)
    files.write_new(layout.index(name), index_bytes)


def commit_version(
    layout: Layout,
    index: DatasetIndex,
    staged: Path,
    *,
    further: int,
    old: tuple[bytes, bytes],
    new: tuple[bytes, bytes],
) -> None:
    """Replace a dataset's newest version by the one after it, whose further shards are staged.

    Args:
        layout: of the root.
        index: of the new version.
        staged: where its further shards lie.
        further: how many these are.
        old: bytes of schema and index of the version before.
        new: bytes of schema and index of the new version.
    """
    name = index.schema.name
    _place(layout.shards(name), staged, index.file.shards[-further:])
    kept = layout.version(name, index.file.version - 1)
    kept.mkdir(parents=True, exist_ok=True)
    files.remove_litter(kept)
    for file, data in zip(("schema.json", "index.json"), old, strict=True):
        files.write_whole(kept / file, data)
    files.fsync_dir(kept.parent)
    files.fsync_dir(layout.dataset(name))
    files.write_whole(layout.schema(name), new[0])
    files.write_whole(layout.index(name), new[1])


def _place(folder: Path, staged: Path, shards: Sequence[Shard]) -> None:
    """Give staged shards their names, beside those that the next try of a killed commit finds them under."""
    for shard in shards:
        for file, _ in files_of(shard):
            (folder / file).unlink(missing_ok=True)  # no index has ever named it
            os.link(staged / file, folder / file)
    files.fsync_dir(folder)


def _repair(layout: Layout, index: DatasetIndex, staged: Path, *, schema_bytes: bytes, index_bytes: bytes) -> None:
    """Put right what is damaged of a dataset that is there with the same content; raises Conflict if it is another."""
    name = index.schema.name
    if layout.index(name).read_bytes() != index_bytes:
        raise conflict(name)
    layout.shards(name).mkdir(exist_ok=True)
    for file, sha256 in (pair for shard in index.file.shards for pair in files_of(shard)):
        path = layout.shards(name) / file
        if not is_whole(path, sha256):
            logger.warning("shard restored", extra={"path": str(path)})
            (staged / file).replace(path)
            files.fsync_dir(path.parent)
    if not layout.schema(name).is_file() or layout.schema(name).read_bytes() != schema_bytes:
        files.write_whole(layout.schema(name), schema_bytes)


def conflict(name: str) -> Conflict:
    """What to tell whoever would change a dataset by writing it."""
    return Conflict(
        f"dataset {name!r} exists with other content",
        hint="give the new one another name, or remove the folder of the old one; a dataset does not change",
        details={"field": "dataset", "value": name},
    )
