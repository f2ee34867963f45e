"""From what people have to the canonical layout: `.npz`, `.csv`, text, and data that ships in packages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import numpy.typing as npt

from railbus.builtin_data import BUILTIN, builtin
from railbus.splitting import splits
from railbus.tables import Arrays, read_csv, read_npz
from railbus.text import text_dataset
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Dtype
from railbus_shared.data.index import ITEM_BYTES, DatasetIndex
from railbus_shared.data.order import EpochOrder
from railbus_shared.data.writer import SHARD_BYTES, Chunk, write_dataset
from railbus_shared.errors import InvalidField, NotFound
from railbus_shared.layout import Layout
from railbus_shared.names import checked_name

FORMATS: Final = (".npz", ".csv", ".txt", ".md")
_CHUNK: Final = 4096
_ORDER_SEED: Final = 0
_CLASS_COLUMNS: Final = frozenset({"label", "target", "class", "y"})


def import_dataset(
    layout: Layout,
    source: str,
    *,
    name: str | None = None,
    held_out_frac: float = 0.1,
    shuffle: bool = True,
    block: int = 128,
    shard_bytes: int = SHARD_BYTES,
) -> DatasetIndex:
    """Write a source into the canonical layout and return the dataset's index; doing it twice does no harm.

    Args:
        layout: of the root.
        source: a file, or the name of a built-in source (`digits`, `pydocs`), whose splits are fixed.
        name: of the dataset; by default made from the source.
        held_out_frac: share that becomes the split `test` of a table, or `validation` of a text.
        shuffle: whether the rows of a table are mixed, always alike, so that what is held out is like the rest; say
            False for rows that follow each other in time, of which the last are then held out.
        block: characters of a sample of text.
        shard_bytes: size that shards aim at.

    Raises NotFound for a source that is not there, InvalidField for one that cannot be read, Conflict for a name that
    another dataset has, ConfigError for a package that is not installed.
    """
    if not 0 <= held_out_frac < 1:
        raise InvalidField(
            field="held_out_frac", value=held_out_frac, problem="not a share", hint="give 0 or more, and less than 1"
        )
    dataset = checked_name(name if name is not None else _name_of(source), kind="dataset")
    if source in BUILTIN and not Path(source).is_file():
        schema, chunks = builtin(source, dataset=dataset)
    else:
        schema, chunks = _from_file(_file(source), dataset, held_out_frac=held_out_frac, shuffle=shuffle, block=block)
    return write_dataset(layout, schema, chunks, shard_bytes=shard_bytes)


def _name_of(source: str) -> str:
    return re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", Path(source).stem.lower()).strip("-._") or source


def _file(source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise NotFound(
            f"source has value {source!r}: there is no such file",
            hint=f"give a file ({', '.join(FORMATS)}) or one of {', '.join(BUILTIN)}",
            details={"field": "source", "value": source},
        )
    if not os.access(path, os.R_OK):
        raise InvalidField(field="source", value=source, problem="this user may not read the file")
    return path


def _from_file(
    path: Path, name: str, *, held_out_frac: float, shuffle: bool, block: int
) -> tuple[DatasetSchema, Iterator[Chunk]]:
    match path.suffix.lower():
        case ".npz":
            return _table(name, read_npz(path), held_out_frac=held_out_frac, shuffle=shuffle, source=path.name)
        case ".csv":
            return _table(name, read_csv(path), held_out_frac=held_out_frac, shuffle=shuffle, source=path.name)
        case ".txt" | ".md":
            return text_dataset(name, _text(path), block=block, held_out_frac=held_out_frac, source=path.name)
        case suffix:
            raise InvalidField(
                field="source",
                value=path.name,
                problem=f"format {suffix!r} is not known",
                hint=f"known formats: {', '.join(FORMATS)}",
            )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidField(field="source", value=path.name, problem=f"not UTF-8 text: {exc}") from exc


def _table(
    name: str, arrays: Arrays, *, held_out_frac: float, shuffle: bool, source: str
) -> tuple[DatasetSchema, Iterator[Chunk]]:
    """Every array a column, its first axis the samples."""
    columns = _named(arrays)
    lengths = {key: (array.shape[0] if array.ndim else 0) for key, array in columns.items()}
    if not lengths or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise InvalidField(
            field="source", value=lengths, problem=f"the columns of {source!r} must have one length, and not 0"
        )
    samples = next(iter(lengths.values()))
    schema = DatasetSchema(
        name=name,
        source=source,
        columns={key: _column(key, array) for key, array in columns.items()},
        splits=splits(samples, held_out_frac=held_out_frac, held_out="test"),
    )
    order = EpochOrder(samples, _ORDER_SEED, epoch=0, shuffle=shuffle)
    return schema, _chunks(columns, order)


def _chunks(columns: Arrays, order: EpochOrder) -> Iterator[Chunk]:
    for start in range(0, order.num_samples, _CHUNK):
        rows = order.positions(start, min(start + _CHUNK, order.num_samples))
        yield {key: array[rows] for key, array in columns.items()}


def _named(arrays: Arrays) -> Arrays:
    """The arrays under names that columns may have; raises InvalidField if two would have the same."""
    columns: Arrays = {}
    for key, array in arrays.items():
        name = checked_name(re.sub(r"[^a-z0-9._-]+", "_", key.lower()).strip("_.-"), kind="column")
        if name in columns:
            raise InvalidField(field=f"columns.{name}", value=key, problem="another column has this name already")
        columns[name] = array
    return columns


def _column(name: str, array: npt.NDArray[Any]) -> Column:
    """The column for an array; whole numbers from 0 up that are named like classes are taken for classes."""
    dtype = array.dtype.name
    if dtype not in ITEM_BYTES:
        raise InvalidField(
            field=f"columns.{name}", value=dtype, problem="not a type of number", hint=f"use {', '.join(ITEM_BYTES)}"
        )
    is_class = name in _CLASS_COLUMNS and array.ndim == 1 and array.dtype.kind in "iu" and int(array.min()) >= 0
    num_classes = int(array.max()) + 1 if is_class else None
    return Column(dtype=cast("Dtype", dtype), shape=array.shape[1:], num_classes=num_classes)
