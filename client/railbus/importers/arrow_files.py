"""Parquet files, and datasets that Hugging Face's `save_to_disk` wrote: tables of Arrow, read batch by batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from railbus.importers.arrow_columns import ArrowColumn, arrow_column, features_of, pyarrow
from railbus.importers.joined import SPLIT_NAMES, Joined
from railbus.importers.source import (
    CHUNK_BYTES,
    Budget,
    Chunk,
    Options,
    Outline,
    Source,
    column_names,
    is_class,
    rows_per_chunk,
    unreadable,
)
from railbus_shared.names import checked_name

Batches = Callable[[Path, Sequence[str] | None, int], Iterator[Any]]
"""Record batches of a file: of which columns (all if None), and of how many rows at the most."""


class ArrowFiles:
    """Files that hold tables of one schema, one after the other."""

    def __init__(self, paths: Sequence[Path], batches: Batches, *, rows: int, schema: Any, options: Options) -> None:
        """Looks at the schema and the first rows. Raises InvalidField for what does not fit a dataset."""
        self._paths = paths
        self._batches = batches
        self._options = options
        with _arrow_faults(paths[0].name):
            names = column_names(schema.names)
            first = next(batches(paths[0], None, 16), None)
            if first is None or not names:
                raise unreadable(paths[0].name, "it holds no rows")
            features = features_of(schema)
            found = [arrow_column(field, first.column(field.name), features=features, options=options)
                     for field in schema]  # fmt: skip
        self._columns: dict[str, ArrowColumn] = {names[one.key]: one for one in found}
        columns = {name: self._with_classes(name, one) for name, one in self._columns.items()}
        size = sum(path.stat().st_size for path in paths) // rows
        self.outline = Outline(columns=columns, samples=rows, sample_bytes=max(size, first.nbytes // len(first)))

    def _with_classes(self, name: str, one: ArrowColumn) -> Any:
        """The column; with classes if its name tells of them, which takes a pass over its values."""
        column = one.column
        is_plain = not column.variable_length and not column.shape and column.dtype.lstrip("u").startswith("int")
        if column.num_classes is not None or not (is_class(name) and is_plain):
            return column
        least, most = 0, -1
        for values in self._values(one):
            least, most = min(least, int(values.min())), max(most, int(values.max()))
        return column.changed(num_classes=most + 1) if least >= 0 else column

    def _values(self, one: ArrowColumn) -> Iterator[Any]:
        for path in self._paths:
            with _arrow_faults(path.name):
                for batch in self._batches(path, [one.key], 1 << 16):
                    if len(batch):
                        yield one.values(batch.column(0))

    def chunks(self) -> Iterator[Chunk]:
        budget = Budget(
            self._paths[0].parent.name,
            packed_bytes=sum(path.stat().st_size for path in self._paths),
            max_bytes=self._options.max_bytes,
        )
        done = 0
        for path in self._paths:
            with _arrow_faults(path.name):
                for batch in self._batches(path, None, rows_per_chunk(self.outline.sample_bytes)):
                    budget.spend(batch.nbytes)
                    if len(batch):
                        yield {name: one.values(batch.column(one.key)) for name, one in self._columns.items()}
                        done += len(batch)
                        self._options.report("reading", done, self.outline.samples)


def parquet_file(path: Path, options: Options) -> Source:
    """One Parquet file."""
    return _parquet([path], options)


def parquet_folder(folder: Path, options: Options) -> Source:
    """The Parquet files of a folder; `train-00000-of-00002.parquet` belongs to the split `train`."""
    paths = sorted(folder.glob("*.parquet"))
    parts = {name: [path for path in paths if path.name.startswith((f"{name}-", f"{name}."))] for name in SPLIT_NAMES}
    parts = {name: found for name, found in parts.items() if found}
    if "train" not in parts or sum(map(len, parts.values())) != len(paths):
        return _parquet(paths, options)
    return Joined({name: _parquet(found, options) for name, found in parts.items()})


def _parquet(paths: Sequence[Path], options: Options) -> ArrowFiles:
    pyarrow()
    from pyarrow import parquet  # noqa: PLC0415 - an extra

    budget = Budget(paths[0].name, packed_bytes=sum(path.stat().st_size for path in paths), max_bytes=options.max_bytes)
    rows, schema = 0, None
    for path in paths:
        with _arrow_faults(path.name), parquet.ParquetFile(path, memory_map=True) as file:
            for group in range(file.metadata.num_row_groups):
                budget.spend(file.metadata.row_group(group).total_byte_size)
            rows += file.metadata.num_rows
            schema = _same_schema(path, schema, file.schema_arrow)
    if rows == 0:
        raise unreadable(paths[0].name, "it holds no rows")
    return ArrowFiles(paths, _parquet_batches, rows=rows, schema=schema, options=options)


def _same_schema(path: Path, before: Any, schema: Any) -> Any:
    if before is not None and not before.equals(schema):
        raise unreadable(path.name, "its columns are not those of the files before it")
    return schema


def _parquet_batches(path: Path, columns: Sequence[str] | None, rows: int) -> Iterator[Any]:
    from pyarrow import parquet  # noqa: PLC0415 - an extra

    with parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=rows, columns=columns, use_threads=False)


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_DICT: Final = "dataset_dict.json"
_STATE: Final = "state.json"
_END_OF_STREAM: Final = b"\xff\xff\xff\xff\0\0\0\0"
"""Source: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format"""


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (folder / _DICT).is_file() or (folder / _STATE).is_file()


def saved_dataset(folder: Path, options: Options) -> Source:
    """A dataset of Hugging Face with all its splits; its code, if it has any, is not run."""
    if not (folder / _DICT).is_file():
        return _saved_split(folder, options)
    found = _json(folder / _DICT).get("splits")
    names = [checked_name(name, kind="split") for name in found] if isinstance(found, list) else []
    if not names:
        raise unreadable(folder.name, f"{_DICT} names no splits")
    return Joined({name: _saved_split(folder / name, options) for name in names})


def _saved_split(folder: Path, options: Options) -> ArrowFiles:
    pyarrow()
    files = _json(folder / _STATE).get("_data_files")
    names = [str(one.get("filename")) for one in files if isinstance(one, dict)] if isinstance(files, list) else []
    if not names or not all(name and Path(name).name == name for name in names):
        raise unreadable(folder.name, f"{_STATE} names files that are none of this folder: {names}")
    paths = [folder / name for name in names]
    rows, schema = 0, None
    for path in paths:
        with _arrow_faults(path.name):
            _check_end(path)
            for batch in _stream_batches(path, None, 1 << 40):
                schema = _same_schema(path, schema, batch.schema)
                rows += len(batch)
    if rows == 0:
        raise unreadable(folder.name, "it holds no rows")
    return ArrowFiles(paths, _stream_batches, rows=rows, schema=schema, options=options)


def _check_end(path: Path) -> None:
    """Raises ValueError for a stream without its end: pyarrow takes one that is cut between batches for whole."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < len(_END_OF_STREAM):
            raise ValueError("it is cut")
        file.seek(-len(_END_OF_STREAM), os.SEEK_END)
        if file.read() != _END_OF_STREAM:
            raise ValueError("it ends without the mark of its end, so it is cut")


def _stream_batches(path: Path, columns: Sequence[str] | None, rows: int) -> Iterator[Any]:
    pa = pyarrow()
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
        for batch in stream:
            batch.validate(full=True)
            found = batch.select(columns) if columns is not None else batch
            for start in range(0, len(found), rows):
                yield found.slice(start, rows)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise unreadable(path.name, f"it is no JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise unreadable(path.name, "it is no map")
    return found


@contextmanager
def _arrow_faults(name: str) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into InvalidField."""
    pa = pyarrow()
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as exc:
        raise unreadable(name, str(exc)) from exc


# --- zstd ------------------------------------------------------------------------------------------------------------


def unpack_zstd(packed: Path, plain: Path, *, limit_bytes: int) -> None:
    """Write what a zstd file holds; raises InvalidField for one that is damaged or holds more than it should."""
    pa = pyarrow()
    left = limit_bytes
    with (
        _arrow_faults(packed.name),
        pa.CompressedInputStream(pa.OSFile(str(packed)), "zstd") as stream,
        plain.open("wb") as file,
    ):
        while data := stream.read(min(CHUNK_BYTES, left + 1)):
            left -= len(data)
            if left < 0:
                raise unreadable(packed.name, f"it unpacks to more than the {limit_bytes} bytes that are stated")
            file.write(data)
