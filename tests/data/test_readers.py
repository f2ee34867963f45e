"""Opening and reading shards of every payload: what was put in comes out, and what is not as indexed is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import payloads
import small_datasets
from railbus_shared.contracts.artifacts import Column, PayloadFormat
from railbus_shared.data import parquet
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.mapped import MappedColumn, MappedShard
from railbus_shared.data.mapping import map_file
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.readers import ShardReader, numpy_dtype, open_shard
from railbus_shared.errors import IndexInvalid, ShardCorrupt
from railbus_shared.layout import Layout

PAYLOADS: tuple[PayloadFormat, ...] = get_args(PayloadFormat)


def taken(reader: ShardReader, name: str, column: Column, rows: np.ndarray) -> np.ndarray | Ragged:
    """Rows of a column, of whichever kind."""
    if not column.variable_length:
        out = np.full((len(rows), *column.shape), 77).astype(numpy_dtype(column))
        reader.take(name, rows, out)
        return out
    offsets = np.concatenate([[0], np.cumsum(reader.lengths(name, rows))]).astype(np.int64)
    items = np.full((offsets[-1], *column.shape), 77).astype(numpy_dtype(column))
    reader.take_items(name, rows, items)
    return Ragged(items, offsets)


def assert_rows(found: np.ndarray | Ragged, whole: np.ndarray | Ragged, rows: np.ndarray) -> None:
    if isinstance(whole, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, whole[rows])
        return
    assert isinstance(found, Ragged)
    assert len(found) == len(rows)
    assert all(np.array_equal(found[place], whole[row]) for place, row in enumerate(rows.tolist()))


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("populate", [False, True])
def test_any_rows_of_any_payload_come_back(payload: PayloadFormat, populate: bool, tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", payload)
    index.check_files(tmp_path / "d/shards")
    for number, shard in enumerate(index.file.shards):
        reader = open_shard(tmp_path / "d/shards" / shard.file, index, number, populate=populate)
        whole = payloads.samples(shard.first_sample, shard.samples)
        every = np.arange(shard.samples, dtype=np.int64)
        mixed = np.random.default_rng(number).permutation(np.tile(every, 3))
        for rows in (every, mixed, every[:1], every[-1:], every[:0], every[::-1].copy()):
            for name, column in index.schema.columns.items():
                assert_rows(taken(reader, name, column, rows), whole[name], rows)


@pytest.mark.parametrize("longest", [1, 40, 5000])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_items_come_back_whether_samples_are_short_or_long(longest: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(longest)
    lengths = rng.integers(0, longest, 200, endpoint=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    whole = Ragged(rng.integers(0, 9, (offsets[-1], *shape), np.int32), offsets)
    reader = MappedShard({"a": MappedColumn(whole.values, whole.offsets)})
    column = Column(dtype="int32", shape=shape, variable_length=True)
    for rows in (np.arange(200), rng.integers(0, 200, 64), np.flatnonzero(lengths == 0)[:3]):
        assert_rows(taken(reader, "a", column, rows), whole, rows)


def test_a_reader_holds_no_descriptor(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "columns")
    path = tmp_path / "d/shards/shard-00000.data"
    readers = [open_shard(path, index, 0) for _ in range(50)]
    assert [fd for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd) == str(path)] == []
    assert str(path) in Path("/proc/self/maps").read_text()
    readers.clear()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_shard_that_is_replaced_while_it_is_mapped_keeps_its_bytes(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "columns")
    path = tmp_path / "d/shards/shard-00000.data"
    reader = open_shard(path, index, 0)
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    rows = np.arange(10)
    assert_rows(taken(reader, "x", payloads.X, rows), payloads.samples(0, 10)["x"], rows)


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(folder: Path, index: DatasetIndex) -> ShardCorrupt:
    """The error with which the first shard is not opened."""
    with pytest.raises(ShardCorrupt) as caught:
        open_shard(folder / "shards/shard-00000.data", index, 0)
    assert {"path", "expected", "actual"} == caught.value.details.keys()
    return caught.value


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("damage", ["short", "long", "gone", "a folder", "a pipe", "empty"])
def test_a_shard_that_is_not_the_indexed_file_is_not_opened(
    payload: PayloadFormat, damage: str, tmp_path: Path
) -> None:
    index = payloads.write(tmp_path / "d", payload)
    path = tmp_path / "d/shards" / ("shard-00000.offsets" if payload == "raw" else "shard-00000.data")
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a pipe":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes({"short": data[:-1], "long": data + b"\0", "empty": b""}[damage])
    error = refused(tmp_path / "d", index)
    assert error.details["path"] == str(path)
    assert f"{len(data)} bytes" in str(error.details["expected"])
    with pytest.raises((ShardCorrupt, IndexInvalid), match=path.name):
        index.check_files(tmp_path / "d/shards")


@pytest.mark.root
def test_an_unreadable_shard_is_said_to_be_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    index = payloads.write(tmp_path / "d", "columns")
    for path in (tmp_path, *tmp_path.parents[:3], tmp_path / "d", tmp_path / "d/shards"):
        if path.owner() == "root" and path != Path("/tmp"):
            path.chmod(0o755)
    (tmp_path / "d/shards/shard-00000.data").chmod(0)
    os.seteuid(65534)
    try:
        error = refused(tmp_path / "d", index)
    finally:
        os.seteuid(0)
    assert error.details["actual"] == "Permission denied"


@pytest.mark.parametrize("name", ["shard-00000.data", "shard-00000.offsets"])
def test_a_link_out_of_the_dataset_is_refused_and_one_within_is_not(name: str, tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "raw")
    path = tmp_path / "d/shards" / name
    path.rename(tmp_path / "d/kept")
    path.symlink_to("../kept")
    index.check_files(tmp_path / "d/shards")
    open_shard(tmp_path / "d/shards/shard-00000.data", index, 0)
    (tmp_path / "d/kept").rename(tmp_path / "outside")
    path.unlink()
    path.symlink_to(tmp_path / "outside")
    for attempt in (
        lambda: index.check_files(tmp_path / "d/shards"),
        lambda: open_shard(tmp_path / "d/shards/shard-00000.data", index, 0),
    ):
        with pytest.raises(IndexInvalid, match=rf"{name} is a link that leads out .*outside"):
            attempt()


def rewritten(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new.ljust(len(old)), 1)[: len(data)])


def change_length(length: int) -> Callable[[Path], None]:
    def lie(path: Path) -> None:
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return lie


def change(old: bytes, new: bytes) -> Callable[[Path], None]:
    return lambda path: rewritten(path, old, new)


HEADER_LIES = [
    (change_length(2**63), "claims 9223372036854775808 bytes"),
    (change_length(2**64 - 1), "claims 18446744073709551615 bytes"),
    (change_length(0), "one that is not"),
    (change_length(100), "one that is not"),
    (change(b'"F32"', b'"I32"'), "I32"),
    (change(b"[10, 2, 3]", b"[10, 3, 2]"), "[10, 3, 2]"),
    (change(b'"half"', b'"hald"'), "BF16"),
    (change(b'"data_offsets": [0, 240]', b'"data_offsets": [8, 248]'), "[8, 248]"),
    (change(b'"__offsets__.words"', b'"__offsets__.wordz"'), "no such tensor"),
    (change(b'{"x"', b'["x"'), "one that is not"),
]


@pytest.mark.parametrize(("lie", "said"), HEADER_LIES, ids=[f"{n}-{lie[1]}" for n, lie in enumerate(HEADER_LIES)])
def test_a_header_of_columns_that_lies_is_refused(lie: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "columns")
    lie(tmp_path / "d/shards/shard-00000.data")
    assert said in str(refused(tmp_path / "d", index).details["actual"])


NPY_LIES = [
    (change(b"\x93NUMPY", b"\x93NUMPI"), "begins with"),
    (change(b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00"), "begins with"),
    (change(b"\x76\x00{", b"\xff\xff{"), "claims 65535 bytes"),
    (change(b"'<f4'", b"'>f4'"), ">f4"),
    (change(b"'<f4'", b"'|O4'"), "|O4"),
    (change(b"False, ", b"True,  "), "True"),
    (change(b"(10, 2, 3)", b"(10, 3, 2)"), "(10, 3, 2)"),
    (change(b"{'descr'", b"__import"), "__import"),
]


@pytest.mark.parametrize(("lie", "said"), NPY_LIES, ids=[f"{n}-{lie[1]}" for n, lie in enumerate(NPY_LIES)])
def test_a_numpy_header_that_lies_is_refused(lie: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "npy")
    lie(tmp_path / "d/shards/shard-00000.data")
    assert said in str(refused(tmp_path / "d", index).details["actual"])


@pytest.mark.parametrize("payload", ["columns", "raw"])
@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, 1, "1 to"),
        (0, -1, "-1 to"),
        (10, 2**40, f"to {2**40}"),
        (10, -1, "to -1"),
        (5, 2**40, f"{2**40} and then"),
        (5, -1, "and then -1 at sample 4"),
    ],
)
def test_offsets_that_lead_astray_are_refused(
    payload: PayloadFormat, place: int, value: int, said: str, tmp_path: Path
) -> None:
    index = payloads.write(tmp_path / "d", payload)
    shard = index.file.shards[0]
    offsets = shard.columns["words"].offsets
    assert offsets is not None
    path = tmp_path / "d/shards" / (shard.sidecar.file if shard.sidecar else shard.file)
    data = bytearray(path.read_bytes())
    at = offsets.offset + 8 * place
    data[at : at + 8] = value.to_bytes(8, "little", signed=True)
    path.write_bytes(data)
    error = refused(tmp_path / "d", index)
    assert error.details["path"] == str(path)
    assert said in str(error.details["actual"])


# --- parquet ---------------------------------------------------------------------------------------------------------


def parquet_of(folder: Path, table: pa.Table, *, column: Column, **options: Any) -> DatasetIndex:
    """An index that says that a Parquet file of one row group is as it should be."""
    (folder / "shards").mkdir(parents=True)
    path = folder / "shards/shard-00000.data"
    pq.write_table(table, path, **options)
    index = payloads.write(folder.parent / "other", "parquet", sizes=(4,))
    shard = index.file.shards[0].changed(
        bytes=path.stat().st_size, samples=len(table), row_groups=[{"samples": len(table)}]
    )
    schema = index.schema.changed(columns={"a": column})
    return dataclasses.replace(index, about=schema, shard_map=index.file.changed(shards=[shard], samples=len(table)))


@pytest.mark.parametrize(
    ("array", "column"),
    [
        (pa.array([1, 2], pa.int64()), Column(dtype="int32", shape=())),
        (pa.array([[1], [2]], pa.list_(pa.int32(), 1)), Column(dtype="int32", shape=(2,))),
        (pa.array([[1], [2]], pa.list_(pa.int32(), 1)), Column(dtype="int32", shape=())),
        (pa.array([[1], [2]], pa.list_(pa.int32())), Column(dtype="int64", shape=(), variable_length=True)),
        (pa.array(["a", "b"]), Column(dtype="int8", shape=(), variable_length=True)),
        (pa.array([1, 2], pa.timestamp("ms")), Column(dtype="int64", shape=())),
        (pa.array([{"b": 1}, {"b": 2}]), Column(dtype="int64", shape=())),
    ],
)
def test_a_parquet_column_of_another_type_is_refused(array: pa.Array, column: Column, tmp_path: Path) -> None:
    index = parquet_of(tmp_path / "d", pa.table({"a": array}), column=column)
    assert "column" in str(refused(tmp_path / "d", index).details["expected"])


@pytest.mark.parametrize(
    ("array", "column"),
    [
        (pa.array([1, None], pa.int32()), Column(dtype="int32", shape=())),
        (pa.array([[1], None], pa.list_(pa.int32(), 1)), Column(dtype="int32", shape=(1,))),
        (pa.array([[1], [None]], pa.list_(pa.int32())), Column(dtype="int32", shape=(), variable_length=True)),
        (pa.array([b"a", None]), Column(dtype="uint8", shape=(), variable_length=True)),
    ],
)
def test_parquet_with_nulls_is_refused_when_it_is_read(array: pa.Array, column: Column, tmp_path: Path) -> None:
    index = parquet_of(tmp_path / "d", pa.table({"a": array}), column=column)
    reader = open_shard(tmp_path / "d/shards/shard-00000.data", index, 0)
    with pytest.raises(ShardCorrupt, match="without nulls"):
        taken(reader, "a", column, np.arange(2))


def test_other_row_groups_or_columns_than_the_index_says_are_refused(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "parquet", sizes=(10,))
    path = tmp_path / "d/shards/shard-00000.data"
    table = pq.read_table(path)
    for other, group in ((table, 5), (table.drop_columns(["flag"]), 4)):
        pq.write_table(other, path, row_group_size=group)
        size = path.stat().st_size
        changed = index.file.changed(shards=[index.file.shards[0].changed(bytes=size)])
        refused(tmp_path / "d", dataclasses.replace(index, shard_map=changed))


def test_a_parquet_bomb_is_refused_by_its_footer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 4 << 20)
    items = parquet.MAX_GROUP_BYTES // 4 + 1
    lists = pa.ListArray.from_arrays(pa.array([0, items], pa.int32()), pa.array(np.broadcast_to(np.int32(7), items)))
    column = Column(dtype="int32", shape=(), variable_length=True)
    index = parquet_of(tmp_path / "d", pa.table({"a": lists}), column=column)
    assert index.file.shards[0].bytes < 1 << 16
    assert "bytes" in str(refused(tmp_path / "d", index).details["actual"])


def test_a_parquet_bomb_of_equal_strings_is_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    word = bytes(1 << 20)
    rows = parquet.MAX_GROUP_BYTES // len(word) + 1
    table = pa.table({"a": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([word]))})
    column = Column(dtype="uint8", shape=(), variable_length=True)
    index = parquet_of(tmp_path / "d", table, column=column, dictionary_pagesize_limit=4 << 20)
    reader = open_shard(tmp_path / "d/shards/shard-00000.data", index, 0)
    before = pa.total_allocated_bytes()
    with pytest.raises(ShardCorrupt, match="decodes to at most"):
        reader.lengths("a", np.arange(1))
    assert pa.total_allocated_bytes() - before < 64 << 20


def test_decoded_row_groups_are_bounded_in_bytes_and_the_least_used_go_first() -> None:
    held = parquet.Decoded(max_bytes=1000)
    decoded: list[int] = []

    def get(number: int, size: int = 400) -> None:
        def decode() -> MappedColumn:
            decoded.append(number)
            return MappedColumn(np.zeros(size, np.uint8))

        held.get((number % 2, number, 0), decode)

    for number in (1, 2, 1, 3, 1, 2):
        get(number)
    assert decoded == [1, 2, 3, 2]
    assert held.bytes == 800
    get(4, size=5000)
    assert held.bytes == 5000
    held.forget(0)
    assert held.bytes == 0


def test_a_reader_that_is_gone_leaves_nothing_decoded(tmp_path: Path) -> None:
    index = payloads.write(tmp_path / "d", "parquet")
    before = parquet._decoded.bytes
    reader = open_shard(tmp_path / "d/shards/shard-00000.data", index, 0)
    taken(reader, "x", payloads.X, np.arange(10))
    assert parquet._decoded.bytes == before + 10 * 24
    del reader
    assert parquet._decoded.bytes == before


def test_without_pyarrow_the_way_to_get_it_is_said(tmp_path: Path) -> None:
    payloads.write(tmp_path / "d", "parquet")
    code = """
import sys
sys.modules["pyarrow"] = None
from pathlib import Path
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import open_shard
from railbus_shared.errors import ConfigError
try:
    open_shard(Path(sys.argv[1]) / "shards/shard-00000.data", DatasetIndex.load(Path(sys.argv[1])), 0)
except ConfigError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], capture_output=True, text=True, check=True)
    assert "railbus[parquet]" in done.stdout


def test_reading_other_payloads_does_not_load_pyarrow(tmp_path: Path) -> None:
    code = "import sys, railbus_shared.data.readers; print('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- maps ------------------------------------------------------------------------------------------------------------


def test_a_map_cannot_be_written_to(tmp_path: Path) -> None:
    small_datasets.write(Layout(tmp_path), 5)
    path = Layout(tmp_path).shards("d") / "shard-00000.data"
    data = map_file(path, size_bytes=path.stat().st_size)
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_an_array_keeps_its_map(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 64)
    part = map_file(path, size_bytes=256 * 64)[-256:].view(np.uint32)
    path.unlink()
    assert part.tobytes() == bytes(range(256))
