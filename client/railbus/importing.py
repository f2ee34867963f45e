"""From what people have to the canonical layout: the source is looked at, cut into splits, and written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from railbus.importers.builtin_data import BUILTIN, builtin
from railbus.importers.choosing import checked_path, opened
from railbus.importers.scratch import Spooled, scratch_folder
from railbus.importers.source import Chunk, Options, Outline, RandomSource, Source, num_samples, rows_per_chunk
from railbus.importers.splitting import splits
from railbus_shared.contracts.artifacts import DatasetSchema, Split
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import EpochOrder
from railbus_shared.data.writer import SHARD_BYTES, write_dataset
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout
from railbus_shared.names import checked_name

_ORDER_SEED: Final = 0


def import_dataset(
    layout: Layout,
    source: str,
    *,
    name: str | None = None,
    held_out_frac: float = 0.1,
    shuffle: bool = True,
    block: int = 128,
    shard_bytes: int = SHARD_BYTES,
    options: Options | None = None,
) -> DatasetIndex:
    """Write a source into the canonical layout and return the dataset's index; doing it twice does no harm.

    Args:
        layout: of the root.
        source: a file, a folder, or the name of a built-in source (`digits`, `pydocs`), whose splits are fixed.
        name: of the dataset; by default made from the source.
        held_out_frac: share that becomes the split `test` of a table, or `validation` of a text.
        shuffle: whether the rows of a table are mixed, always alike, so that what is held out is like the rest; say
            False for rows that follow each other in time, of which the last are then held out.
        block: tokens of a sample of text.
        shard_bytes: size that shards aim at.
        options: what only some sources look at.

    Raises NotFound for a source that is not there, InvalidField for one that cannot be read, Conflict for a name that
    another dataset has, ConfigError for a package that is not installed, StorageFull.
    """
    if not 0 <= held_out_frac < 1:
        raise InvalidField(
            field="held_out_frac", value=held_out_frac, problem="not a share", hint="give 0 or more, and less than 1"
        )
    dataset = checked_name(name if name is not None else _name_of(source), kind="dataset")
    with scratch_folder(layout) as scratch:
        wishes = dataclasses.replace(options or Options(), block=block, scratch=scratch)
        found = opened_source(source, wishes)
        for note in found.outline.notes:
            wishes.note(note)
        cut = _splits(found.outline, held_out_frac=held_out_frac, split=wishes.split)
        schema = _schema(dataset, found.outline, cut, source=source)
        is_mixed = shuffle and found.outline.splits is None and not found.outline.is_sequence
        chunks = _mixed(found, wishes) if is_mixed else found.chunks()
        return write_dataset(layout, schema, _told(chunks, wishes, found.outline.samples), shard_bytes=shard_bytes)


def opened_source(source: str, options: Options) -> Source:
    """What a word on the command line stands for; a file goes before a built-in source of its name."""
    if source in BUILTIN and not Path(source).exists():
        return builtin(source)
    return opened(checked_path(source), options)


def _name_of(source: str) -> str:
    path = Path(source)
    stem = path.name.partition(".tar")[0] if ".tar" in path.name else path.stem
    return re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", stem.lower()).strip("-._") or source


def _schema(name: str, outline: Outline, cut: dict[str, Split], *, source: str) -> DatasetSchema:
    return DatasetSchema(
        name=name,
        description=outline.description,
        licence=outline.licence,
        source=BUILTIN.get(source) or Path(source).name,
        columns=dict(outline.columns),
        splits=cut,
    )


def _splits(outline: Outline, *, held_out_frac: float, split: str | None) -> dict[str, Split]:
    if split is not None:
        return {checked_name(split, kind="split"): Split(first=0, samples=outline.samples)}
    if outline.splits is not None:
        return dict(outline.splits)
    return splits(outline.samples, held_out_frac=held_out_frac, held_out=outline.held_out)


def _mixed(source: Source, options: Options) -> Iterator[Chunk]:
    """All samples in a fixed mixed order; a source that can only be read from its start is first put on disk."""
    found = source if isinstance(source, RandomSource) else Spooled(source, options.scratch, report=options.report)
    order = EpochOrder(found.outline.samples, _ORDER_SEED, epoch=0)
    step = rows_per_chunk(found.outline.sample_bytes)
    for start in range(0, order.num_samples, step):
        yield found.take(order.positions(start, min(start + step, order.num_samples)))


def _told(chunks: Iterator[Chunk], options: Options, samples: int) -> Iterator[Chunk]:
    done = 0
    for chunk in chunks:
        yield chunk
        done += num_samples(chunk)
        options.report("writing", done, samples)
