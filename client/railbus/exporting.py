"""From the canonical layout to what other programs read: whole or not at all, and never over what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus.exporters.arrays import write_npy, write_npz
from railbus.exporters.exporter import Exporter, ExportOptions
from railbus.exporters.image_folder import write_images
from railbus.exporters.mds import write_mds
from railbus.exporters.parquet import write_parquet
from railbus.exporters.texts import write_csv, write_jsonl
from railbus.exporters.webdataset import write_webdataset
from railbus.reading_rows import Rows
from railbus_shared import files
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import Conflict, InvalidField
from railbus_shared.layout import Layout


@dataclass(frozen=True)
class _Format:
    write: Exporter
    is_folder: bool
    """Whether several splits go into one place, each under its name; else one must be chosen."""
    part: str = "{split}"
    """Name of a split's part of the folder; empty where the parts name themselves."""


FORMATS: Final[Mapping[str, _Format]] = {
    "npz": _Format(write_npz, is_folder=False),
    "npy": _Format(write_npy, is_folder=False),
    "csv": _Format(write_csv, is_folder=False),
    "jsonl": _Format(write_jsonl, is_folder=False),
    "parquet": _Format(write_parquet, is_folder=True, part="{split}-00000-of-00001.parquet"),
    "webdataset": _Format(write_webdataset, is_folder=True, part=""),
    "mds": _Format(write_mds, is_folder=True),
    "images": _Format(write_images, is_folder=True),
}


def export_dataset(
    layout: Layout,
    index: DatasetIndex,
    *,
    to: str,
    target: Path,
    split: str | None = None,
    options: ExportOptions | None = None,
) -> int:
    """Write a dataset, or one split of it, and return how many samples that are.

    Raises Conflict if the target exists, InvalidField for a column that has no place in the format, NotFound for a
    split that there is not, ShardCorrupt, StorageFull.
    """
    wishes = options or ExportOptions()
    form = FORMATS[to]
    if target.exists() or target.is_symlink():
        raise Conflict(f"target has value {str(target)!r}: it exists", hint="name a new one; nothing is overwritten")
    parts = _parts(index, form, to=to, split=split)
    hidden = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with files.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            samples = sum(
                _write(Rows(layout, index, split=name, verifies=True), hidden / part, form, wishes)
                for name, part in parts.items()
            )
            hidden.rename(target)
        except BaseException:
            _remove(hidden)
            raise
        files.fsync_dir(target.parent)
    return samples


def _write(rows: Rows, path: Path, form: _Format, options: ExportOptions) -> int:
    path.parent.mkdir(exist_ok=True)
    form.write(rows, path, options)
    return rows.samples


def _parts(index: DatasetIndex, form: _Format, *, to: str, split: str | None) -> dict[str, str]:
    """Splits that are written, and where below the target."""
    names = list(index.schema.splits)
    if split is not None:
        return {split: ""}
    if form.is_folder:
        return {name: form.part.format(split=name) for name in names}
    if len(names) > 1:
        raise InvalidField(
            field="split",
            value=None,
            problem=f"{to} has no splits, and {index.schema.name!r} has {', '.join(names)}",
            hint="choose one with --split",
        )
    return {names[0]: ""}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
