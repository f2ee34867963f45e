"""`.npz`, or a folder of `.npy`: every column an array; one of variable length is two, `x` and `x.offsets`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Final

import numpy as np

from railbus.exporters.exporter import ExportOptions
from railbus.importers.arrays import OFFSETS
from railbus.reading_rows import Rows, as_numbers, values_of
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.readers import numpy_dtype

_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)
"""The same samples give the same archive."""
Opened = Callable[[str], AbstractContextManager[IO[bytes]]]


def write_npz(rows: Rows, target: Path, options: ExportOptions) -> None:
    """One archive, not packed, so that it can be mapped."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        _write(
            rows,
            lambda name: archive.open(zipfile.ZipInfo(f"{name}.npy", _LONG_AGO), "w", force_zip64=True),
            options,
        )


def write_npy(rows: Rows, target: Path, options: ExportOptions) -> None:
    """A folder with a file for each array."""
    target.mkdir()
    _write(rows, lambda name: (target / f"{name}.npy").open("wb"), options)


def _write(rows: Rows, opened: Opened, options: ExportOptions) -> None:
    for name, column in rows.columns.items():
        count = rows.num_items(name) if column.variable_length else rows.samples
        dtype = np.dtype(np.float32) if column.dtype == "bfloat16" else numpy_dtype(column)
        lengths: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        with opened(name) as file:
            _head(file, dtype, (count, *column.shape))
            for chunk in rows.chunks([name], report=options.report):
                values = chunk[name]
                file.write(np.ascontiguousarray(as_numbers(values_of(values), column)).tobytes())
                if isinstance(values, Ragged):
                    lengths.append(np.diff(values.offsets))
        if column.variable_length:
            with opened(name + OFFSETS) as file:
                _head(file, np.dtype(np.int64), (rows.samples + 1,))
                file.writelines(_offsets(lengths))


def _offsets(lengths: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Iterator[bytes]:
    end = np.int64(0)
    yield end.tobytes()
    for part in lengths:
        ends = np.cumsum(part) + end
        end = ends[-1]
        yield ends.tobytes()


def _head(file: IO[bytes], dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> None:
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
