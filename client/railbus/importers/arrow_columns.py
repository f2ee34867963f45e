"""Columns of Arrow tables, which Parquet files and Hugging Face datasets are made of, as columns of ours.

Plain numbers and lists of them of one length are of fixed shape; lists, texts and bytes have a variable length. The
features that Hugging Face writes into the schema name classes. The only importers of pyarrow besides the payload
`parquet` are this module, `arrow_files.py`, and the exporter of Parquet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from railbus.importers.image_bytes import encoding_of
from railbus.importers.source import Array, Options, Values
from railbus_shared.contracts.artifacts import Column, Dtype
from railbus_shared.data.ragged import Ragged
from railbus_shared.errors import ConfigError, InvalidField

_DTYPES: Final[Mapping[str, Dtype]] = {
    "bool": "bool", "uint8": "uint8", "int8": "int8", "uint16": "uint16", "int16": "int16", "uint32": "uint32",
    "int32": "int32", "uint64": "uint64", "int64": "int64", "halffloat": "float16", "float": "float32",
    "double": "float64",
}  # fmt: skip
ENCODING: Final = b"railbus.encoding"
"""What our own exporter writes beside a field of bytes, for which Parquet has no type."""
_HINT: Final = "turn the column into numbers, texts, bytes, or lists of numbers first"


def pyarrow() -> Any:
    """The library, which is an extra; raises ConfigError if it is not there."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise ConfigError(
            "Parquet files and Hugging Face datasets need pyarrow", hint="pip install 'railbus[parquet]'"
        ) from exc
    return pa


@dataclass(frozen=True)
class ArrowColumn:
    """A column, and how its values are had from Arrow's."""

    key: str
    column: Column
    values: Callable[[Any], Values]
    """From an array of Arrow."""


def arrow_column(field: Any, first: Any, *, features: Mapping[str, Any], options: Options) -> ArrowColumn:
    """How a field of a table becomes a column; `first` are some of its values, which tell files of images.

    Raises InvalidField for a type that has no place in a shard.
    """
    pa = pyarrow()
    key, kind = field.name, field.type
    inner = _bytes_field(pa, kind)
    if inner is not None:
        kind = kind.field(inner).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    reading = _Reading(key, pa, options=options, inner=inner)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if is_text or _is_binary(pa, kind):
        encoding = "utf-8" if is_text else _stated(field) or _encoding(reading.plain(first))
        column = Column(dtype="uint8", shape=(), variable_length=True, encoding=encoding)
        return ArrowColumn(key, column, reading.bytes)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        shape, item = _fixed(pa, kind.value_type)
        column = Column(dtype=_dtype(key, item, field.type), shape=shape, variable_length=True)
        return ArrowColumn(key, column, lambda array: reading.lists(array, shape))
    shape, item = _fixed(pa, kind)
    column = Column(dtype=_dtype(key, item, field.type), shape=shape, **_classes(features.get(key)))
    return ArrowColumn(key, column, lambda array: reading.fixed(array, shape))


def features_of(schema: Any) -> Mapping[str, Any]:
    """What Hugging Face says of the fields of a table, if it does."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return {}
    info = said.get("info") if isinstance(said, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    return cast("Mapping[str, Any]", features) if isinstance(features, dict) else {}


class _Reading:
    """Arrow's arrays of one field as NumPy's."""

    def __init__(self, key: str, pa: Any, *, options: Options, inner: str | None) -> None:
        self._key = key
        self._pa = pa
        self._fills = options.missing == "fill"
        self._inner = inner

    def plain(self, array: Any) -> Any:
        """One array, not in pieces, not by dictionary, not wrapped."""
        pa = self._pa
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks)
        if not pa.types.is_primitive(array.type):
            array.validate(full=True)  # offsets, places in a dictionary and UTF-8 are the file's word until now
        if self._inner is not None:
            self._check(array, self._fills)
            array = array.field(self._inner)
        return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array

    def _check(self, array: Any, may_miss: bool) -> None:
        if array.null_count and not may_miss:
            raise InvalidField(
                field=f"columns.{self._key}",
                value=None,
                problem=f"{array.null_count} of {len(array)} values are missing here",
                hint="fill what is missing first, or with --missing fill",
            )

    def bytes(self, array: Any) -> Values:
        pa = self._pa
        found = self.plain(array)
        self._check(found, self._fills)
        if found.null_count:
            found = found.fill_null("" if "string" in str(found.type) else b"")
        return self._varying(found.cast(pa.large_binary()), pa.uint8(), ())

    def _varying(self, found: Any, item: Any, shape: tuple[int, ...]) -> Ragged:
        pa = self._pa
        if len(found) == 0:
            return Ragged(np.zeros((0, *shape), item.to_pandas_dtype()), np.zeros(1, np.int64))
        if pa.types.is_large_binary(found.type):
            _, offsets_buffer, data = found.buffers()
            offsets = np.frombuffer(offsets_buffer, np.int64)[found.offset : found.offset + len(found) + 1]
            values: Array = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
            return Ragged(values[offsets[0] : offsets[-1]], offsets - offsets[0])
        offsets = found.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        values = self._numbers(found.values.slice(offsets[0], offsets[-1] - offsets[0]), shape)
        return Ragged(values, offsets - offsets[0])

    def lists(self, array: Any, shape: tuple[int, ...]) -> Values:
        pa = self._pa
        found = self.plain(array)
        self._check(found, self._fills)
        if found.null_count:
            found = pa.array([value or [] for value in found.to_pylist()], found.type)
        found = found.cast(pa.large_list(found.type.value_type)) if pa.types.is_list(found.type) else found
        return self._varying(found, _fixed(pa, found.type.value_type)[1], shape)

    def fixed(self, array: Any, shape: tuple[int, ...]) -> Values:
        return self._numbers(self.plain(array), shape)

    def _numbers(self, found: Any, shape: tuple[int, ...]) -> Array:
        """Values (N, *shape); what is missing is NaN where it may be."""
        pa = self._pa
        count = len(found)
        for _ in shape:
            self._check(found, may_miss=False)
            found = found.flatten()
        self._check(found, may_miss=self._fills and pa.types.is_floating(found.type))
        array: Array = found.to_numpy(zero_copy_only=False)
        return array.reshape(count, *shape)


def _fixed(pa: Any, kind: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and item of lists of fixed length in each other."""
    shape: list[int] = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return tuple(shape), kind


def _dtype(key: str, item: Any, whole: Any) -> Dtype:
    dtype = _DTYPES.get(str(item))
    if dtype is None:
        raise InvalidField(
            field=f"columns.{key}", value=str(whole), problem="a type that has no place in a shard", hint=_HINT
        )
    return dtype


def _bytes_field(pa: Any, kind: Any) -> str | None:
    """The field that holds the file, of a struct as Hugging Face keeps images and sounds in."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0:
        return "bytes"
    return None


def _is_binary(pa: Any, kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _stated(field: Any) -> str:
    """The encoding that our own exporter wrote, if it did."""
    said = (field.metadata or {}).get(ENCODING, b"").decode("ascii", "replace")
    return said if re.fullmatch(r"[a-z0-9.+-]{1,32}", said) else ""


def _encoding(values: Any) -> str:
    """The encoding that the first values have in common."""
    found = {encoding_of(value) for value in values.slice(0, 16).to_pylist() if value}
    return found.pop() if len(found) == 1 else ""


def _classes(feature: object) -> dict[str, Any]:
    """Classes of a feature `ClassLabel`."""
    said = cast("Mapping[str, Any]", feature) if isinstance(feature, dict) else {}
    names = said.get("names")
    if said.get("_type") != "ClassLabel" or not isinstance(names, list) or not names:
        return {}
    labels = tuple(str(name) for name in cast("list[object]", names))
    return {"num_classes": len(labels), "labels": labels}
