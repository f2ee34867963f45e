"""The two JSON files of a dataset as plain values: what reading needs of them, without pydantic.

In a script that only reads, importing pydantic and building the contracts took more than everything else up to the
first batch. So where pydantic is not there yet, files that plainly are in order are taken here. All others are left to
the contracts, which judge them and say what is wrong, as they do everywhere else; tests hold that whatever passes here
passes there, with the same values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from railbus_shared import clock
from railbus_shared.data.dtypes import ITEM_BYTES
from railbus_shared.errors import InvalidName
from railbus_shared.names import checked_name

Payload = Literal["columns", "npy", "parquet", "raw"]


class PlainColumn(NamedTuple):
    """See `Column`."""

    dtype: str
    shape: tuple[int, ...]
    variable_length: bool = False
    num_classes: int | None = None
    labels: tuple[str, ...] = ()


class PlainRange(NamedTuple):
    """See `SampleRange`, and `RowGroup`, which has no first sample."""

    first: int
    samples: int


class PlainSplit(NamedTuple):
    """See `Split`."""

    first: int
    samples: int
    runs: tuple[PlainRange, ...]


class PlainSchema(NamedTuple):
    """See `DatasetSchema`."""

    name: str
    payload: Payload
    columns: Mapping[str, PlainColumn]
    splits: Mapping[str, PlainSplit]


class PlainExtent(NamedTuple):
    """See `Extent`."""

    offset: int
    bytes: int


class PlainColumnExtent(NamedTuple):
    """See `ColumnExtent`."""

    offset: int
    bytes: int
    offsets: PlainExtent | None


class PlainSidecar(NamedTuple):
    """See `Sidecar`."""

    file: str
    bytes: int
    sha256: str


class PlainShard(NamedTuple):
    """See `Shard`."""

    file: str
    bytes: int
    sha256: str
    first_sample: int
    samples: int
    columns: Mapping[str, PlainColumnExtent]
    sidecar: PlainSidecar | None
    row_groups: tuple[PlainRange, ...]


class PlainIndex(NamedTuple):
    """See `IndexFile`."""

    dataset: str
    version: int
    schema_sha256: str
    payload: Payload
    samples: int
    bytes: int
    shards: tuple[PlainShard, ...]


if TYPE_CHECKING:
    from railbus_shared.contracts import artifacts

    AnyColumn = artifacts.Column | PlainColumn
    AnySplit = artifacts.Split | PlainSplit
    AnyExtent = artifacts.Extent | PlainExtent
    AnyColumnExtent = artifacts.ColumnExtent | PlainColumnExtent
    AnySidecar = artifacts.Sidecar | PlainSidecar
    AnyShard = artifacts.Shard | PlainShard
    AnySchema = artifacts.DatasetSchema | PlainSchema
    AnyIndex = artifacts.IndexFile | PlainIndex


def plain_schema(found: object) -> PlainSchema | None:
    """What was in `schema.json`, if it is in order beyond doubt."""
    if not _is_schema(found):
        return None
    told: dict[str, Any] = found  # type: ignore[assignment] # it has just been looked at
    return PlainSchema(
        name=told["name"],
        payload=told.get("payload", "columns"),
        columns={name: _column(column) for name, column in told["columns"].items()},
        splits={name: _split(split) for name, split in told["splits"].items()},
    )


def plain_index(found: object) -> PlainIndex | None:
    """What was in `index.json`, if it is in order beyond doubt."""
    if not _is_index(found):
        return None
    told: dict[str, Any] = found  # type: ignore[assignment] # it has just been looked at
    return PlainIndex(
        dataset=told["dataset"],
        version=told.get("version", 1),
        schema_sha256=told["schema_sha256"],
        payload=told.get("payload", "columns"),
        samples=told["samples"],
        bytes=told["bytes"],
        shards=tuple(map(_shard, told["shards"])),
    )


def _column(told: dict[str, Any]) -> PlainColumn:
    return PlainColumn(
        told["dtype"],
        tuple(told["shape"]),
        told.get("variable_length", False),
        told.get("num_classes"),
        tuple(told.get("labels", ())),
    )


def _split(told: dict[str, Any]) -> PlainSplit:
    whole = PlainRange(told["first"], told["samples"])
    ranges = tuple(PlainRange(one["first"], one["samples"]) for one in told.get("ranges", ()))
    return PlainSplit(*whole, ranges or (whole,))


def _shard(told: dict[str, Any]) -> PlainShard:
    beside = told.get("sidecar")
    return PlainShard(
        told["file"],
        told["bytes"],
        told["sha256"],
        told["first_sample"],
        told["samples"],
        {name: _column_extent(extent) for name, extent in told.get("columns", {}).items()},
        None if beside is None else PlainSidecar(beside["file"], beside["bytes"], beside["sha256"]),
        tuple(PlainRange(0, group["samples"]) for group in told.get("row_groups", ())),
    )


def _column_extent(told: dict[str, Any]) -> PlainColumnExtent:
    offsets = told.get("offsets")
    return PlainColumnExtent(
        told["offset"], told["bytes"], None if offsets is None else PlainExtent(offsets["offset"], offsets["bytes"])
    )


# --- what is in order beyond doubt -----------------------------------------------------------------------------------

_Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _is_one(value: Any) -> bool:
    return type(value) is int and value == 1


def _is_name(value: Any) -> bool:
    try:
        return type(value) is str and checked_name(value) == value
    except InvalidName:
        return False


def _is_time(value: Any) -> bool:
    try:
        return type(value) is str and clock.parse_rfc3339(value) is not None
    except ValueError:
        return False


def _matching(pattern: str) -> _Check:
    fits = re.compile(pattern).fullmatch
    return lambda value: type(value) is str and fits(value) is not None


def _one_of(*values: str) -> _Check:
    return lambda value: type(value) is str and value in values


def _or_nothing(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _items(check: _Check, *, least: int = 0) -> _Check:
    return lambda value: type(value) is list and len(value) >= least and all(map(check, value))


def _by_name(check: _Check, *, least: int = 0, most: int) -> _Check:
    return lambda value: (
        type(value) is dict
        and least <= len(value) <= most
        and all(_is_name(name) and check(one) for name, one in value.items())
    )


def _record(required: Mapping[str, _Check], optional: Mapping[str, _Check] = MappingProxyType({})) -> _Check:
    known = {**required, **optional}
    return lambda value: (
        type(value) is dict
        and required.keys() <= value.keys()
        and all(name in known and known[name](one) for name, one in value.items())
    )


_is_sha256: Final = _matching(r"[0-9a-f]{64}")
_is_file: Final = _matching(r"[a-z0-9][a-z0-9._-]{0,127}")
_is_payload: Final = _one_of("columns", "npy", "parquet", "raw")
_is_range: Final = _record({"first": _is_count, "samples": _is_number})
_is_extent: Final = _record({"offset": _is_count, "bytes": _is_count})
_is_sidecar: Final = _record({"file": _is_file, "bytes": _is_count, "sha256": _is_sha256})
_is_column: Final = _record(
    {"dtype": _one_of(*ITEM_BYTES), "shape": _items(_is_count)},
    {
        "variable_length": _is_flag,
        "encoding": _matching(r"[a-z0-9.+-]{0,32}"),
        "description": _is_text,
        "num_classes": _or_nothing(_is_number),
        "labels": _items(_is_text),
    },
)
_is_split: Final = _record({"first": _is_count, "samples": _is_number}, {"ranges": _items(_is_range)})
_is_column_extent: Final = _record({"offset": _is_count, "bytes": _is_count}, {"offsets": _or_nothing(_is_extent)})
_is_shard: Final = _record(
    {
        "file": _is_file,
        "bytes": _is_count,
        "sha256": _is_sha256,
        "first_sample": _is_count,
        "samples": _is_number,
    },
    {
        "columns": _by_name(_is_column_extent, most=256),
        "sidecar": _or_nothing(_is_sidecar),
        "row_groups": _items(_record({"samples": _is_number})),
    },
)
_is_schema: Final = _record(
    {
        "name": _is_name,
        "columns": _by_name(_is_column, least=1, most=256),
        "splits": _by_name(_is_split, least=1, most=64),
    },
    {
        "format_version": _is_one,
        "version": _is_text,
        "description": _is_text,
        "licence": _is_text,
        "source": _is_text,
        "payload": _is_payload,
        "created_at": _or_nothing(_is_time),
    },
)
_is_index: Final = _record(
    {
        "dataset": _is_name,
        "schema_sha256": _is_sha256,
        "samples": _is_number,
        "bytes": _is_count,
        "shards": _items(_is_shard, least=1),
    },
    {
        "format_version": _is_one,
        "version": _is_number,
        "parent_sha256": _or_nothing(_is_sha256),
        "payload": _is_payload,
    },
)
