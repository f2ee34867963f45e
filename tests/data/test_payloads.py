"""What is written in each payload: others' readers open the files, and how samples were cut changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from railbus_shared.contracts.artifacts import Column, DatasetSchema, Dtype, Split
from railbus_shared.data.chunks import MAX_SAMPLE_BYTES, Array
from railbus_shared.data.container import ALIGN_BYTES
from railbus_shared.data.dtypes import ITEM_BYTES, OFFSETS, numpy_dtype
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.parquet_writer import row_groups
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.readers import open_shard
from railbus_shared.data.writer import Chunk, write_dataset
from railbus_shared.errors import InvalidField, SchemaInvalid
from railbus_shared.layout import Layout

SAMPLES = 500


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def schema_of(payload: str, columns: dict[str, Column]) -> DatasetSchema:
    schema = DatasetSchema(name="d", columns=columns, splits={"all": Split(first=0, samples=1)})
    return DatasetSchema.parse(schema.to_map() | {"payload": payload})


def values_of(column: Column, count: int, seed: int) -> Array:
    """Random bits in a column's dtype; texts are ASCII."""
    size = (count, *column.shape, ITEM_BYTES[column.dtype])
    low, high = {"bool": (0, 2)}.get(column.dtype, (32, 127) if column.encoding == "utf-8" else (0, 256))
    return np.random.default_rng(seed).integers(low, high, size, np.uint8).view(numpy_dtype(column))[..., 0]


def held(columns: dict[str, Column], samples: int = SAMPLES) -> Chunk:
    """All samples in one chunk; some of variable length are empty."""
    found: dict[str, Array | Ragged] = {}
    for seed, (name, column) in enumerate(columns.items()):
        if column.variable_length:
            lengths = np.random.default_rng(seed).integers(0, 30, samples)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            found[name] = Ragged(values_of(column, int(offsets[-1]), seed), offsets)
        else:
            found[name] = values_of(column, samples, seed)
    return found


def cut(chunk: Chunk, size: int, samples: int = SAMPLES) -> Iterator[Chunk]:
    """The same samples in chunks; of a Ragged, each has all values and its part of the offsets."""
    for at in range(0, samples, size):
        end = min(samples, at + size)
        yield {
            name: Ragged(one.values, one.offsets[at : end + 1]) if isinstance(one, Ragged) else one[at:end]
            for name, one in chunk.items()
        }


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


COLUMNS = {
    "text": Column(dtype="uint8", shape=(), variable_length=True, encoding="utf-8"),
    "image": Column(dtype="uint8", shape=(), variable_length=True, encoding="jpeg"),
    "label": Column(dtype="int64", shape=()),
    "boxes": Column(dtype="float32", shape=(4,), variable_length=True),
    "mask": Column(dtype="bool", shape=(3, 2)),
}
FLAT = {name: column for name, column in COLUMNS.items() if name != "boxes"} | {
    "tokens": Column(dtype="int32", shape=(), variable_length=True)
}
PAYLOADS = {
    "columns": COLUMNS,
    "npy": {"x": Column(dtype="float16", shape=(3, 5))},
    "raw": {"x": Column(dtype="int16", shape=(2,), variable_length=True)},
    "parquet": FLAT,
}


def everything(layout: Layout, index: DatasetIndex) -> dict[str, list[bytes]]:
    """Each sample's bytes, through the readers."""
    found: dict[str, list[bytes]] = {name: [] for name in index.schema.columns}
    for number, shard in enumerate(index.file.shards):
        reader = open_shard(layout.shards("d") / shard.file, index, number)
        for name, column in index.schema.columns.items():
            for row in np.arange(shard.samples)[:, None]:
                items = int(reader.lengths(name, row)[0]) if column.variable_length else 1
                out = np.empty((items, *column.shape), numpy_dtype(column))
                (reader.take_items if column.variable_length else reader.take)(name, row, out)
                found[name].append(out.tobytes())
    return found


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_was_written_is_read_back_bit_by_bit(payload: str, layout: Layout) -> None:
    columns, chunk = PAYLOADS[payload], held(PAYLOADS[payload])
    index = write_dataset(layout, schema_of(payload, columns), [chunk], shard_bytes=8000)
    assert len(index.file.shards) > 1
    found = everything(layout, index)
    for name, one in chunk.items():
        assert found[name] == [one[row].tobytes() for row in range(SAMPLES)]
    assert DatasetIndex.load(layout.dataset("d")) == index


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("size", [1, 7, 130])
def test_how_samples_are_cut_into_chunks_changes_no_byte(payload: str, size: int, tmp_path: Path) -> None:
    schema, chunk = schema_of(payload, PAYLOADS[payload]), held(PAYLOADS[payload])
    one, other = Layout(tmp_path / "one"), Layout(tmp_path / "other")
    write_dataset(one, schema, [chunk], shard_bytes=8000)
    write_dataset(other, schema, cut(chunk, size), shard_bytes=8000)
    assert tree(other.datasets) == tree(one.datasets)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_import_that_was_interrupted_ends_as_one_that_was_not(payload: str, tmp_path: Path) -> None:
    schema, chunk = schema_of(payload, PAYLOADS[payload]), held(PAYLOADS[payload])
    one, other = Layout(tmp_path / "one"), Layout(tmp_path / "other")

    def interrupted() -> Iterator[Chunk]:
        yield from itertools.islice(cut(chunk, 20), 20)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_dataset(other, schema, interrupted(), shard_bytes=3000)
    finished = {path.name: path.stat().st_ino for path in (other.dataset("d") / ".import" / "shards").iterdir()}
    assert finished
    write_dataset(other, schema, cut(chunk, 33), shard_bytes=3000)
    write_dataset(one, schema, [chunk], shard_bytes=3000)
    assert tree(other.datasets) == tree(one.datasets)
    assert {name: (other.shards("d") / name).stat().st_ino for name in finished} == finished


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_file_has_the_size_and_hash_of_the_index(payload: str, layout: Layout) -> None:
    schema, chunk = schema_of(payload, PAYLOADS[payload]), held(PAYLOADS[payload])
    index = write_dataset(layout, schema, [chunk], shard_bytes=8000)
    named = {}
    for shard in index.file.shards:
        named[shard.file] = (shard.bytes, shard.sha256)
        if shard.sidecar is not None:
            named[shard.sidecar.file] = (shard.sidecar.bytes, shard.sidecar.sha256)
    files = tree(layout.shards("d"))
    assert named == {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}


@pytest.mark.parametrize("payload", ["columns", "npy", "raw"])
def test_shards_have_the_promised_size(payload: str, layout: Layout) -> None:
    schema, chunk = schema_of(payload, PAYLOADS[payload]), held(PAYLOADS[payload])
    for target in (3000, 5000, 7000):
        index = write_dataset(Layout(layout.root / str(target)), schema, [chunk], shard_bytes=target)
        header = 1500 if payload == "columns" else 200
        assert all(target / 2 <= shard.bytes <= 1.5 * target + header for shard in index.file.shards)


def test_safetensors_opens_columns_of_variable_length(layout: Layout) -> None:
    chunk = held(COLUMNS)
    index = write_dataset(layout, schema_of("columns", COLUMNS), [chunk])
    loaded = load_file(layout.shards("d") / "shard-00000.data")
    extents = index.file.shards[0].columns
    for name, one in chunk.items():
        assert extents[name].offset % ALIGN_BYTES == 0
        if isinstance(one, Ragged):
            assert np.array_equal(loaded[name].view(np.uint8), one.values.view(np.uint8))
            assert np.array_equal(loaded[OFFSETS + name], one.offsets)
            offsets = extents[name].offsets
            assert offsets is not None
            assert offsets.offset % ALIGN_BYTES == 0
        else:
            assert np.array_equal(loaded[name], one)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 5)])
def test_numpy_opens_a_shard_of_payload_npy(dtype: Dtype, shape: tuple[int, ...], layout: Layout) -> None:
    columns = {"x": Column(dtype=dtype, shape=shape)}
    chunk = held(columns, 20)
    write_dataset(layout, schema_of("npy", columns), [chunk])
    path = layout.shards("d") / "shard-00000.data"
    loaded = np.load(path, allow_pickle=False)
    expected = chunk["x"]
    assert isinstance(expected, np.ndarray)
    assert (loaded.dtype, loaded.shape) == (expected.dtype, expected.shape)
    assert loaded.tobytes() == expected.tobytes()
    assert (path.stat().st_size - loaded.nbytes) % 64 == 0


def test_a_raw_shard_is_its_values_and_nothing_else(layout: Layout) -> None:
    chunk = held(PAYLOADS["raw"])
    write_dataset(layout, schema_of("raw", PAYLOADS["raw"]), [chunk])
    one = chunk["x"]
    assert isinstance(one, Ragged)
    assert (layout.shards("d") / "shard-00000.data").read_bytes() == one.values.tobytes()
    assert (layout.shards("d") / "shard-00000.offsets").read_bytes() == one.offsets.astype("<i8").tobytes()


def test_pyarrow_opens_a_parquet_shard(layout: Layout) -> None:
    chunk = held(FLAT)
    index = write_dataset(layout, schema_of("parquet", FLAT), [chunk])
    table = pq.read_table(layout.shards("d") / "shard-00000.data")
    types = {field.name: str(field.type) for field in table.schema}
    assert (types["text"], types["image"], types["tokens"]) == ("string", "binary", "list<element: int32>")
    assert (types["label"], types["mask"]) == (
        "int64",
        "fixed_size_list<element: fixed_size_list<element: bool>[2]>[3]",
    )
    assert sum(group.samples for group in index.file.shards[0].row_groups) == SAMPLES
    for row, value in enumerate(table.column("text").to_pylist()):
        assert value.encode() == chunk["text"][row].tobytes()
    for name in ("label", "mask", "tokens"):
        assert table.column(name).to_pylist() == [chunk[name][row].tolist() for row in range(SAMPLES)]


def test_a_parquet_text_that_is_not_utf_8_is_refused(layout: Layout) -> None:
    columns = {"text": FLAT["text"]}
    chunk = {"text": Ragged(np.array([0xFF, 0xFE], np.uint8), np.array([0, 2]))}
    with pytest.raises(InvalidField, match=r"columns\.text.*not UTF-8"):
        write_dataset(layout, schema_of("parquet", columns), [chunk])
    assert list(layout.datasets.iterdir()) == []


@pytest.mark.parametrize("size", [1, 3, 50])
def test_row_groups_hold_as_many_samples_as_fit_whatever_the_blocks(size: int) -> None:
    weights = np.array([3, 3, 3, 1, 20, 0, 0, 5, 5, 5, 11, 2])
    blocks = [weights[at : at + size] for at in range(0, len(weights), size)]
    assert list(row_groups(blocks, limit=10)) == [4, 1, 4, 1, 1, 1]


def bad_columns() -> Iterator[tuple[str, Array | Ragged, str]]:
    values = np.arange(6, dtype=np.int32)
    yield "an array", values, "variable_length is true"
    yield "other items", Ragged(values.astype(np.int64), np.array([0, 6])), r"int32\[items\]"
    other: Any = np.array([0, 6], np.int32)
    yield "other offsets", Ragged(values, other), "int64"
    yield "no offsets", Ragged(values, np.array([], np.int64)), "int64"
    yield "decreasing", Ragged(values, np.array([0, 4, 2, 6])), "do not decrease"
    yield "negative", Ragged(values, np.array([-1, 6])), "do not decrease"
    yield "beyond", Ragged(values, np.array([0, 7])), "within the 6 items"


@pytest.mark.parametrize(
    ("given", "problem"), [bad[1:] for bad in bad_columns()], ids=[bad[0] for bad in bad_columns()]
)
def test_a_column_of_variable_length_that_does_not_fit_is_refused(
    given: Array | Ragged, problem: str, layout: Layout
) -> None:
    columns = {"x": Column(dtype="int32", shape=(), variable_length=True)}
    with pytest.raises(InvalidField, match=problem) as caught:
        write_dataset(layout, schema_of("columns", columns), [{"x": given}])
    assert caught.value.details["field"] == "columns.x"
    assert list(layout.datasets.iterdir()) == []


def test_a_ragged_for_a_column_of_fixed_length_is_refused(layout: Layout) -> None:
    columns = {"x": Column(dtype="int32", shape=())}
    with pytest.raises(InvalidField, match="variable_length is false"):
        write_dataset(layout, schema_of("columns", columns), [{"x": Ragged(np.zeros(1, np.int32), np.array([0, 1]))}])


def test_a_sample_larger_than_a_shard_may_be_is_refused_by_its_number(layout: Layout) -> None:
    columns = {"x": Column(dtype="uint8", shape=(), variable_length=True)}
    values = np.zeros(MAX_SAMPLE_BYTES + 11, np.uint8)  # of memory that nobody touches
    chunks = [{"x": Ragged(values, np.array([0, 5]))}, {"x": Ragged(values, np.array([0, 10, MAX_SAMPLE_BYTES + 11]))}]
    with pytest.raises(InvalidField, match=r"samples\.2.*2146435081 bytes.*at most 2146435072"):
        write_dataset(layout, schema_of("columns", columns), chunks)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from railbus_shared.contracts.artifacts import DatasetSchema
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout

columns = {"x": {"dtype": "uint8", "shape": [], "variable_length": True}}
values, offsets = np.zeros(1 << 20, np.uint8), np.arange(0, (1 << 20) + 1, 64)

def peak_mib(root, chunks):
    schema = DatasetSchema.parse(
        {"name": "d", "payload": sys.argv[2], "columns": columns, "splits": {"all": {"first": 0, "samples": 1}}}
    )
    given = ({"x": Ragged(values, offsets)} for _ in range(chunks))
    write_dataset(Layout(Path(sys.argv[1]) / root), schema, given, shard_bytes=32 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

print(peak_mib("small", 70), peak_mib("large", 180))
"""


@pytest.mark.parametrize("payload", ["columns", "parquet"])
def test_memory_does_not_grow_with_the_dataset(payload: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), payload], capture_output=True, text=True, check=True
    )
    small, large = map(int, done.stdout.split())
    assert large - small < 16


@pytest.mark.parametrize(
    ("payload", "columns"),
    [
        ("npy", FLAT),
        ("npy", {"x": Column(dtype="uint8", shape=(), variable_length=True)}),
        ("raw", {"x": Column(dtype="uint8", shape=())}),
        ("columns", {"x": Column(dtype="uint8", shape=(1 << 20, 1 << 11))}),
    ],
)
def test_a_schema_that_its_payload_cannot_hold_is_refused(
    payload: str, columns: dict[str, Column], layout: Layout
) -> None:
    with pytest.raises(SchemaInvalid):
        write_dataset(layout, schema_of(payload, columns), [])


def test_a_raw_dataset_of_empty_samples_is_refused(layout: Layout) -> None:
    chunk = {"x": Ragged(np.zeros((0, 2), np.int16), np.zeros(4, np.int64))}
    with pytest.raises(InvalidField, match="no byte"):
        write_dataset(layout, schema_of("raw", PAYLOADS["raw"]), [chunk])
    assert list(layout.datasets.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [0, -1, (1 << 30) + 1])
def test_shards_may_aim_at_a_size_that_keeps_them_within_2_gib(shard_bytes: int, layout: Layout) -> None:
    with pytest.raises(InvalidField, match="'shard_bytes'"):
        write_dataset(layout, schema_of("npy", PAYLOADS["npy"]), [], shard_bytes=shard_bytes)
