"""Writing a dataset: streamed, deterministic, whole or not at all.

Chunks are spooled and cut into shards of even size in a hidden folder of the dataset; `schema.json` follows, and
`index.json` is the commit: without it the dataset does not exist. Appending makes a new version, which shares the
shards of the older ones; those stay as they are. Writers of one dataset wait for each other. A writer that was killed
goes on where it was when the same is written again; after an error nothing stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import orjson

from railbus_shared import files
from railbus_shared.contracts.artifacts import DatasetSchema, IndexFile, SampleRange, Shard, Split
from railbus_shared.data import committing
from railbus_shared.data.assembling import Plan, assembled
from railbus_shared.data.chunks import Chunk, Pieces, fitting, num_samples
from railbus_shared.data.index import DatasetIndex, read_pair
from railbus_shared.data.journal import journal
from railbus_shared.data.shard_writers import check_schema, library, writer_of
from railbus_shared.data.spreading import Spread
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout
from railbus_shared.names import checked_name

__all__ = ["MAX_SHARD_BYTES", "SHARD_BYTES", "Chunk", "append_dataset", "write_dataset"]

SHARD_BYTES: Final = 512 << 20
MAX_SHARD_BYTES: Final = 1 << 30
"""What shards may aim at, so that half as much again is still no more than 2 GiB."""
_HIDDEN: Final = ".import"


def write_dataset(
    layout: Layout, schema: DatasetSchema, chunks: Iterable[Chunk], *, shard_bytes: int = SHARD_BYTES
) -> DatasetIndex:
    """Write a dataset and return its index.

    Each chunk maps every column to an array of shape (samples, *shape), or to a `Ragged` where the length varies; how
    samples are cut into chunks changes nothing. A dataset that is there with the same content stays, and shards of it
    that are damaged are written anew.
    Raises Conflict if it is there with other content, InvalidField for a chunk that does not fit the schema,
    SchemaInvalid, ConfigError if the payload needs a package that is not installed, StorageFull.
    """
    check_schema(schema)
    schema_bytes = files.to_json(schema.to_map())
    schema_sha256 = hashlib.sha256(schema_bytes).hexdigest()
    plan = Plan(schema, writer_of(schema), _spread(shard_bytes))
    with _folder(layout, schema.name) as folder:
        if layout.index(schema.name).exists() and schema_sha256.encode() not in layout.index(schema.name).read_bytes():
            raise committing.conflict(schema.name)
        identity = _identity(schema, schema_sha256, shard_bytes=shard_bytes)
        with journal(folder / _HIDDEN, identity, first_number=0) as opened:
            shards = assembled(plan, opened, _fitting(schema, chunks))
            _check_bytes(shards)
            _check_splits(schema, sum(shard.samples for shard in shards))
            file = _index_file(schema, schema_sha256, shards)
            index_bytes = files.to_json(file.to_map())
            index = DatasetIndex.parse(schema_bytes, index_bytes, folder=folder)
            committing.commit_new(layout, index, opened.shards, schema_bytes=schema_bytes, index_bytes=index_bytes)
        return index


def append_dataset(
    layout: Layout, name: str, chunks: Iterable[Chunk], *, split: str, shard_bytes: int = SHARD_BYTES
) -> DatasetIndex:
    """Add samples to a dataset as shards of their own, and return the index of its new version.

    Samples keep their numbers, and older versions stay readable. Appending twice adds twice: who was killed looks at
    the dataset's version before trying again.

    Args:
        layout: of the root.
        name: of the dataset.
        chunks: as for `write_dataset`, of the same schema.
        split: which they join; a new one, or one that grows.
        shard_bytes: size that the new shards aim at.

    Raises DatasetNotFound, InvalidField for chunks that do not fit or that hold no sample, InvalidName, StorageFull.
    """
    checked_name(split, kind="split")
    with _folder(layout, name) as folder:
        base, old = _newest(layout, name)
        plan = Plan(
            base.schema,
            writer_of(base.schema),
            _spread(shard_bytes),
            first_sample=base.file.samples,
            first_number=len(base.file.shards),
        )
        identity = _identity(base.schema, base.file.schema_sha256, shard_bytes=shard_bytes, base=base.sha256)
        with journal(folder / _HIDDEN, identity, first_number=plan.first_number) as opened:
            shards = assembled(plan, opened, _fitting(base.schema, chunks, first=plan.first_sample))
            _check_bytes(shards)
            schema = _grown(base.schema, split, first=base.file.samples, samples=_counted(shards))
            schema_bytes = files.to_json(schema.to_map())
            file = _index_file(schema, hashlib.sha256(schema_bytes).hexdigest(), shards, base=base)
            index_bytes = files.to_json(file.to_map())
            index = DatasetIndex.parse(schema_bytes, index_bytes, folder=folder)
            committing.commit_version(
                layout, index, opened.shards, further=len(shards), old=old, new=(schema_bytes, index_bytes)
            )
        return index


@contextlib.contextmanager
def _folder(layout: Layout, name: str) -> Iterator[Path]:
    """The dataset's folder, for one writer at a time; rid of what a crash left, and removed if it stays empty."""
    folder = layout.dataset(name)
    lock = layout.state / "imports" / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with files.storage_errors(folder), lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            files.remove_litter(folder, but=_HIDDEN)
            yield folder
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()


def _newest(layout: Layout, name: str) -> tuple[DatasetIndex, tuple[bytes, bytes]]:
    """The index of a dataset, and the bytes of its schema and index."""
    schema_bytes, index_bytes = read_pair(layout.schema(name), layout.index(name))
    base = DatasetIndex.parse(schema_bytes, index_bytes, folder=layout.dataset(name))
    base.check_name(name)
    return base, (schema_bytes or b"", index_bytes or b"")


def _spread(shard_bytes: int) -> Spread:
    if not 1 <= shard_bytes <= MAX_SHARD_BYTES:
        raise InvalidField(
            field="shard_bytes", value=shard_bytes, problem=f"shards aim at 1 to {MAX_SHARD_BYTES} bytes"
        )
    return Spread(shard_bytes)


def _identity(schema: DatasetSchema, schema_sha256: str, *, shard_bytes: int, base: str = "") -> bytes:
    """What an import that was killed must have been, for its shards to count."""
    return orjson.dumps({"schema": schema_sha256, "shard_bytes": shard_bytes, "base": base, "library": library(schema)})


def _fitting(schema: DatasetSchema, chunks: Iterable[Chunk], *, first: int = 0) -> Iterator[Pieces]:
    for chunk in chunks:
        pieces = fitting(schema, chunk, first=first)
        yield pieces
        first += num_samples(pieces)


def _check_bytes(shards: Sequence[Shard]) -> None:
    """Raises InvalidField for a shard without any byte, which payload `raw` makes of empty samples only."""
    if any(shard.bytes == 0 for shard in shards):
        raise InvalidField(
            field="payload",
            value="raw",
            problem="the samples have no byte",
            hint="use payload 'columns' for empty ones",
        )


def _check_splits(schema: DatasetSchema, samples: int) -> None:
    if samples == 0:
        raise InvalidField(field="samples", value=0, problem="a dataset has at least one sample")
    for name, split in schema.splits.items():
        end = max(run.first + run.samples for run in split.runs)
        if end > samples:
            raise InvalidField(field=f"splits.{name}", value=end, problem=f"there are only {samples} samples")


def _counted(shards: Sequence[Shard]) -> int:
    if not shards:
        raise InvalidField(field="samples", value=0, problem="there is nothing to append")
    return sum(shard.samples for shard in shards)


def _grown(schema: DatasetSchema, split: str, *, first: int, samples: int) -> DatasetSchema:
    """The schema with further samples in a split, which may be new."""
    runs = list(schema.splits[split].runs) if split in schema.splits else []
    if runs and runs[-1].first + runs[-1].samples == first:
        last = runs.pop()
        first, samples = last.first, last.samples + samples
    runs.append(SampleRange(first=first, samples=samples))
    grown = Split(
        first=runs[0].first,
        samples=sum(run.samples for run in runs),
        ranges=tuple(runs) if len(runs) > 1 else (),
    )
    return schema.model_copy(update={"splits": {**schema.splits, split: grown}})


def _index_file(
    schema: DatasetSchema, schema_sha256: str, shards: Sequence[Shard], *, base: DatasetIndex | None = None
) -> IndexFile:
    every = (*(base.file.shards if base else ()), *shards)
    return IndexFile(
        dataset=schema.name,
        version=base.file.version + 1 if base else 1,
        parent_sha256=base.sha256 if base else None,
        schema_sha256=schema_sha256,
        payload=schema.payload,
        samples=sum(shard.samples for shard in every),
        bytes=sum(shard.bytes for shard in every),
        shards=every,
    )
