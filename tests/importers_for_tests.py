"""What tests of importers and exporters share: samples of a dataset as plain Python, and files to import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from railbus.exporters.pictures import png
from railbus.importers.source import Values
from railbus.importing import import_dataset
from railbus.reading_rows import Rows
from railbus_shared.contracts.artifacts import Column
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.ragged import Ragged
from railbus_shared.layout import Layout

Array = npt.NDArray[Any]


def plain(column: Column, values: Values) -> list[Any]:
    """Samples as Python values: texts as text, image files as bytes, numbers as numbers and lists."""
    if not isinstance(values, Ragged):
        return list(values.tolist())
    found = [values[row] for row in range(len(values))]
    if column.encoding in {"utf-8", "json"}:
        return [one.tobytes().decode() for one in found]
    return [one.tobytes() if column.encoding else one.tolist() for one in found]


def samples(layout: Layout, index: DatasetIndex, split: str | None = None) -> dict[str, list[Any]]:
    """Every column of a dataset, or of one split."""
    rows = Rows(layout, index, split=split, verifies=True)
    found: dict[str, list[Any]] = {name: [] for name in rows.columns}
    for chunk in rows.chunks():
        for name, values in chunk.items():
            found[name] += plain(rows.columns[name], values)
    return found


def imported(layout: Layout, source: Path, **settings: Any) -> tuple[DatasetIndex, dict[str, list[Any]]]:
    """A source as a dataset, in its own order and with nothing held out, and its samples."""
    index = import_dataset(layout, str(source), **{"held_out_frac": 0, "shuffle": False, "name": "d", **settings})
    return index, samples(layout, index)


def kinds(index: DatasetIndex) -> Mapping[str, str]:
    """What each column is, in short: `int64`, `float32[2,3]`, `uint8… utf-8`."""
    return {name: kind(column) for name, column in index.schema.columns.items()}


def kind(column: Column) -> str:
    shape = f"[{','.join(map(str, column.shape))}]" if column.shape else ""
    return f"{column.dtype}{shape}{'…' if column.variable_length else ''} {column.encoding}".strip()


def sizes(index: DatasetIndex) -> dict[str, int]:
    return {name: split.samples for name, split in index.schema.splits.items()}


def picture_file(path: Path, *, width: int = 8, height: int = 6, seed: int = 0) -> bytes:
    """Write a PNG, or by Pillow a file of the suffix's format; returns its bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(png(pixels))
    else:
        from PIL import Image

        Image.fromarray(pixels).save(path)
    return path.read_bytes()
