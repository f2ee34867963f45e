"""Payloads of one column, written: `npy`, one array; and `raw`, samples back to back with offsets beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from railbus_shared.contracts.artifacts import ColumnExtent, DatasetSchema, Extent, Shard, Sidecar
from railbus_shared.data.dtypes import numpy_dtype
from railbus_shared.data.shard_files import new_file
from railbus_shared.data.slices import Slices

SIDECAR_SUFFIX: Final = ".offsets"
_ALIGN_BYTES: Final = 64
_MAGIC: Final = b"\x93NUMPY\x01\x00"


def write_npy(path: Path, schema: DatasetSchema, slices: Slices, *, first: int) -> Shard:
    """Write one shard out of the spool as a `.npy` file, and hash it on the way; arguments as for `columns`."""
    ((name, one),) = slices.items()
    column = schema.columns[name]
    header = _npy_header(numpy_dtype(column).newbyteorder("<").str, (one.samples, *column.shape))
    with new_file(path) as file:
        file.write(header)
        file.write_all(one.blocks())
    extent = ColumnExtent(offset=len(header), bytes=one.bytes)
    return Shard(
        file=path.name,
        bytes=file.size,
        sha256=file.sha256,
        first_sample=first,
        samples=one.samples,
        columns={name: extent},
    )


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Written here and not by NumPy, whose versions pad differently, so that the same input gives the same bytes.

    Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode("latin-1")
    text += b" " * (-(len(_MAGIC) + 2 + len(text) + 1) % _ALIGN_BYTES) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text


def write_raw(path: Path, _: DatasetSchema, slices: Slices, *, first: int) -> Shard:
    """Write one shard out of the spool, its sidecar first, and hash both on the way; arguments as for `columns`."""
    ((name, one),) = slices.items()
    with new_file(path.with_suffix(SIDECAR_SUFFIX)) as offsets:
        offsets.write_all(one.offset_blocks())
    with new_file(path) as file:
        file.write_all(one.blocks())
    extent = ColumnExtent(offset=0, bytes=one.bytes, offsets=Extent(offset=0, bytes=offsets.size))
    return Shard(
        file=path.name,
        bytes=file.size,
        sha256=file.sha256,
        first_sample=first,
        samples=one.samples,
        columns={name: extent},
        sidecar=Sidecar(file=path.with_suffix(SIDECAR_SUFFIX).name, bytes=offsets.size, sha256=offsets.sha256),
    )
