"""Folders of images, one for each class; files are written as they are, arrays as PNG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from railbus.exporters.exporter import FILE_ENCODINGS, ExportOptions, is_file
from railbus.exporters.pictures import is_picture, picture, png
from railbus.importers.image_bytes import encoding_of
from railbus.importers.source import Array, num_samples
from railbus.reading_rows import Rows
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import InvalidField


def write_images(rows: Rows, target: Path, options: ExportOptions) -> None:
    """A folder for each class, with its images; other columns are left out."""
    image, label = columns_of(rows.columns)
    folders = _folder_names(rows.columns[label])
    for name in folders:
        (target / name).mkdir(parents=True)
    done = 0
    for chunk in rows.chunks([image, label], report=options.report):
        labels = np.asarray(chunk[label]).tolist()
        for at in range(num_samples(chunk)):
            data, suffix = _file(chunk[image][at], rows.columns[image], name=f"sample {done}")
            (target / folders[labels[at]] / f"{done:09d}.{suffix}").write_bytes(data)
            done += 1


def columns_of(columns: Mapping[str, Column]) -> tuple[str, str]:
    """The first column of pictures and the first of classes; raises InvalidField if there are none."""
    images = [name for name, column in columns.items() if is_picture(column)]
    labels = [name for name, column in columns.items() if column.num_classes and not column.shape]
    if not images or not labels:
        raise InvalidField(
            field="columns",
            value=sorted(columns),
            problem="folders of images need a column of images and one of classes",
            hint="export to npz, parquet, webdataset or mds",
        )
    return images[0], labels[0]


def _folder_names(column: Column) -> list[str]:
    """A plain name for each class; a label is somebody else's text and may hold a path."""
    labels = column.labels or tuple(str(number) for number in range(column.num_classes or 0))
    names = [re.sub(r"[^\w. -]", "_", label).strip(". ") or "_" for label in labels]
    if len(set(names)) != len(names):
        width = len(str(len(names)))
        names = [f"{number:0{width}d}-{name}" for number, name in enumerate(names)]
    return names


def _file(value: Array, column: Column, *, name: str) -> tuple[bytes, str]:
    if not is_file(column):
        return png(picture(value, column, name=name)), "png"
    data = value.tobytes()
    encoding = encoding_of(data) or column.encoding
    return data, FILE_ENCODINGS[encoding]
