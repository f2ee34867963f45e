"""Reading an index: whatever lies in the files, an index that holds together or an error that says what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import payloads
import small_datasets
from railbus_shared import files
from railbus_shared.contracts.artifacts import PayloadFormat
from railbus_shared.data.index import ITEM_BYTES, DatasetIndex
from railbus_shared.errors import (
    DatasetNotFound,
    IndexInvalid,
    NotFound,
    RailbusError,
    SchemaInvalid,
    ShardCorrupt,
)
from railbus_shared.layout import Layout

Json = dict[str, Any]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    small_datasets.write(made, 30, num_shards=3, test=6)
    return made


def change(path: Path, edit: Callable[[Json], object]) -> None:
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value))


def change_schema(layout: Layout, edit: Callable[[Json], object]) -> None:
    """Change the schema and the hash of it in the index."""
    change(layout.schema("d"), edit)
    sha256 = hashlib.sha256(layout.schema("d").read_bytes()).hexdigest()
    change(layout.index("d"), lambda index: index.update(schema_sha256=sha256))


def put(*keys: str | int, value: object) -> Callable[[Json], None]:
    """An edit that puts a value somewhere."""

    def edit(whole: Any) -> None:
        for key in keys[:-1]:
            whole = whole[key]
        whole[keys[-1]] = value

    return edit


def test_a_dataset_that_is_whole_is_read_back(layout: Layout) -> None:
    index = DatasetIndex.load(layout.dataset("d"))
    assert index.sha256 == files.sha256_file(layout.index("d"))
    assert (index.file.samples, len(index.file.shards)) == (30, 3)
    assert (index.split("test").first, index.split("test").samples) == (24, 6)
    assert index == DatasetIndex.read(layout.schema("d"), layout.index("d"))
    index.check_files(layout.shards("d"))


def test_an_unknown_split_names_those_that_there_are(layout: Layout) -> None:
    with pytest.raises(NotFound, match=r"'valid'.*test, train"):
        DatasetIndex.load(layout.dataset("d")).split("valid")


@pytest.mark.parametrize("missing", ["folder", "index.json", "a file for a folder"])
def test_what_is_not_there_is_said(missing: str, layout: Layout) -> None:
    folder = {"folder": layout.datasets / "no", "a file for a folder": layout.schema("d")}.get(
        missing, layout.dataset("d")
    )
    layout.index("d").unlink()
    with pytest.raises(DatasetNotFound, match=folder.name):
        DatasetIndex.load(folder)


def test_an_index_without_its_schema_is_said(layout: Layout) -> None:
    layout.schema("d").unlink()
    with pytest.raises(SchemaInvalid, match=r"schema\.json is missing"):
        DatasetIndex.load(layout.dataset("d"))


@pytest.mark.parametrize(("name", "error"), [("schema", SchemaInvalid), ("index", IndexInvalid)])
def test_a_folder_in_place_of_a_file_is_said(name: str, error: type[RailbusError], layout: Layout) -> None:
    path = layout.dataset("d") / f"{name}.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(error, match=rf"{name}\.json cannot be read: Is a directory"):
        DatasetIndex.load(layout.dataset("d"))


@pytest.mark.parametrize(("name", "error"), [("schema", SchemaInvalid), ("index", IndexInvalid)])
@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"a": NaN}'])
def test_garbage_names_its_file(name: str, error: type[RailbusError], garbage: bytes, layout: Layout) -> None:
    (layout.dataset("d") / f"{name}.json").write_bytes(garbage)
    with pytest.raises(error, match=rf"{name}\.json"):
        DatasetIndex.load(layout.dataset("d"))


@pytest.mark.parametrize("name", ["schema", "index"])
def test_every_cut_of_a_file_is_refused(name: str, layout: Layout) -> None:
    path = layout.dataset("d") / f"{name}.json"
    data = path.read_bytes()
    for end in range(0, len(data.rstrip()), 13):
        path.write_bytes(data[:end])
        with pytest.raises((SchemaInvalid, IndexInvalid), match=r"\.json"):
            DatasetIndex.load(layout.dataset("d"))


SCHEMA_FAULTS = [
    (put("columns", "x", "dtype", value="float31"), "columns.x.dtype"),
    (put("columns", "x", "shape", value=[2, -3]), "columns.x.shape"),
    (put("columns", "x", "shape", value=[2, 0]), "columns.x.shape"),
    (put("columns", "x", "shape", value=[1] * 40), "columns.x.shape"),
    (put("columns", "id", value={"dtype": "int64", "shape": [], "num_classes": 3, "labels": ["a"]}), "num_classes"),
    (put("columns", value={}), "columns"),
    (put("splits", value={}), "splits"),
    (put("splits", "train", "samples", value=0), "splits.train.samples"),
    (put("splits", "train", "samples", value="24"), "splits.train.samples"),
    (put("splits", "../up", value={"first": 0, "samples": 1}), "splits"),
    (put("name", value="D d"), "name"),
    (put("colour", value="red"), "colour"),
    (put("format_version", value=2), "format_version"),
    (put("name", value="other"), "is called 'd'"),
]


@pytest.mark.parametrize(
    ("edit", "named"), SCHEMA_FAULTS, ids=[f"{n}-{fault[1]}" for n, fault in enumerate(SCHEMA_FAULTS)]
)
def test_a_fault_of_the_schema_is_named(edit: Callable[[Json], None], named: str, layout: Layout) -> None:
    change_schema(layout, edit)
    if named == "is called 'd'":
        change(layout.index("d"), put("dataset", value="other"))
    with pytest.raises(SchemaInvalid) as caught:
        DatasetIndex.load(layout.dataset("d"))
    assert named in caught.value.message
    assert caught.value.hint


def swap_shards(index: Json) -> None:
    index["shards"][0], index["shards"][1] = index["shards"][1], index["shards"][0]


def drop_last_shard(index: Json) -> None:
    gone = index["shards"].pop()
    index["samples"] -= gone["samples"]
    index["bytes"] -= gone["bytes"]


def same_place(extent: Json, other: Json) -> None:
    extent["offset"] = other["offset"]


INDEX_FAULTS = [
    (put("schema_sha256", value="0" * 64), "schema_sha256"),
    (put("schema_sha256", value="beef"), "schema_sha256"),
    (put("dataset", value="other"), "'other'"),
    (put("payload", value="npy"), "npy"),
    (put("samples", value=31), "field 'samples' has value 31"),
    (put("samples", value=2**70), "samples"),
    (put("bytes", value=1), "field 'bytes' has value 1"),
    (put("shards", value=[]), "shards"),
    (put("shards", value={}), "shards"),
    (put("shards", 1, "first_sample", value=11), "shards.1.first_sample"),
    (put("shards", 0, "first_sample", value=1), "shards.0.first_sample"),
    (put("shards", 1, "samples", value=9), "shards."),
    (put("shards", 1, "file", value="../../x"), "shards.1.file"),
    (put("shards", 1, "file", value="shard-00000.data"), "names a file twice"),
    (put("shards", 1, "sha256", value="x" * 64), "shards.1.sha256"),
    (put("shards", 2, "columns", "id", "bytes", value=81), "shards.2.columns.id.bytes"),
    (put("shards", 2, "columns", "id", "offset", value=10**9), "shards.2.columns.id"),
    (put("shards", 2, "columns", "id", "offset", value=-64), "shards.2.columns.id.offset"),
    (put("shards", 2, "columns", "id", "offset", value=65), "no multiple of the size of int64"),
    (lambda index: same_place(index["shards"][2]["columns"]["id"], index["shards"][2]["columns"]["x"]), "to another"),
    (put("shards", 2, "columns", "id", "offsets", value={"offset": 0, "bytes": 88}), "has fixed length"),
    (put("shards", 2, "bytes", value=0), "shards.2.bytes"),
    (put("shards", 2, "samples", value=0), "shards.2.samples"),
    (put("samples", value=0), "samples"),
    (put("shards", 2, "sidecar", value={"file": "s", "bytes": 8, "sha256": "0" * 64}), "shards.2.sidecar"),
    (put("shards", 2, "row_groups", value=[{"samples": 10}]), "shards.2.row_groups"),
    (put("shards", 2, "columns", "extra", value={"offset": 0, "bytes": 0}), "shards.2.columns"),
    (lambda index: index["shards"][0]["columns"].pop("id"), "shards.0.columns"),
    (lambda index: index.pop("shards"), "shards"),
    (swap_shards, "shards.0.first_sample"),
    (drop_last_shard, "splits.train"),
]


@pytest.mark.parametrize(
    ("edit", "named"), INDEX_FAULTS, ids=[f"{n}-{fault[1]}" for n, fault in enumerate(INDEX_FAULTS)]
)
def test_a_fault_of_the_index_is_named(edit: Callable[[Json], None], named: str, layout: Layout) -> None:
    change(layout.index("d"), edit)
    with pytest.raises(IndexInvalid) as caught:
        DatasetIndex.load(layout.dataset("d"))
    assert named in caught.value.message
    assert "index.json" in caught.value.message
    assert caught.value.hint


PAYLOAD_FAULTS: list[tuple[PayloadFormat, Callable[[Json], object], str]] = [
    ("columns", put("shards", 0, "columns", "words", "offsets", value=None), "words.offsets"),
    ("columns", put("shards", 0, "columns", "words", "offsets", "bytes", value=80), "expected 88"),
    ("columns", put("shards", 0, "columns", "words", "offsets", "offset", value=10**6), "end beyond the file's"),
    ("columns", put("shards", 0, "columns", "words", "offsets", "offset", value=3), "no multiple of 8"),
    (
        "columns",
        lambda index: same_place(index["shards"][0]["columns"]["words"]["offsets"], index["shards"][0]["columns"]["x"]),
        "belong to another column",
    ),
    ("columns", put("shards", 0, "columns", "pairs", "bytes", value=7), "no multiple of an item's 4"),
    ("npy", put("shards", 0, "columns", "x", "offset", value=64), "end with the file"),
    ("npy", put("shards", 0, "columns", "x", "offset", value=0), "behind a header"),
    ("raw", put("shards", 0, "columns", "words", "offset", value=1), "columns.words.offset"),
    ("raw", put("shards", 0, "columns", "words", "bytes", value=1), "whole file"),
    ("raw", put("shards", 0, "columns", "words", "offsets", "bytes", value=8), "expected 88"),
    ("raw", put("shards", 0, "columns", "words", "offsets", "offset", value=8), "whole file"),
    ("raw", put("shards", 0, "sidecar", value=None), "sidecar' is missing"),
    ("raw", put("shards", 0, "sidecar", "bytes", value=96), "sidecar.bytes"),
    ("raw", put("shards", 0, "sidecar", "file", value="shard-00001.data"), "names a file twice"),
    ("raw", put("shards", 0, "sidecar", "file", value="../x"), "sidecar.file"),
    ("parquet", put("shards", 0, "row_groups", 0, "samples", value=5), "has 11 samples, but the shard 10"),
    ("parquet", put("shards", 0, "row_groups", value=[]), "has 0 samples"),
    ("parquet", put("shards", 0, "columns", value={"x": {"offset": 0, "bytes": 240}}), "tells its own layout"),
]


@pytest.mark.parametrize(
    ("payload", "edit", "named"), PAYLOAD_FAULTS, ids=[f"{n}-{fault[2]}" for n, fault in enumerate(PAYLOAD_FAULTS)]
)
def test_a_fault_of_a_payload_is_named(
    payload: PayloadFormat, edit: Callable[[Json], object], named: str, tmp_path: Path
) -> None:
    payloads.write(tmp_path / "p", payload)
    change(tmp_path / "p/index.json", edit)
    with pytest.raises(IndexInvalid) as caught:
        DatasetIndex.load(tmp_path / "p")
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("payload", "columns", "named"),
    [
        ("npy", {"a": {"dtype": "int8", "shape": []}, "b": {"dtype": "int8", "shape": []}}, "exactly one column"),
        ("npy", {"a": {"dtype": "int8", "shape": [], "variable_length": True}}, "of fixed length"),
        ("raw", {"a": {"dtype": "int8", "shape": []}}, "of variable length"),
        ("parquet", {"a": {"dtype": "int8", "shape": [2], "variable_length": True}}, "an item has no axes"),
        ("columns", {"a": {"dtype": "int8", "shape": [2**62, 2**62], "variable_length": True}}, "bytes"),
    ],
)
def test_columns_that_a_payload_cannot_hold_are_refused(
    payload: PayloadFormat, columns: Json, named: str, tmp_path: Path
) -> None:
    payloads.write(tmp_path / "p", payload)
    change(tmp_path / "p/schema.json", lambda schema: schema.update(columns=columns))
    with pytest.raises(SchemaInvalid, match=named):
        DatasetIndex.load(tmp_path / "p")


def runs(*pairs: tuple[int, int]) -> list[Json]:
    return [{"first": first, "samples": samples} for first, samples in pairs]


@pytest.mark.parametrize(
    ("split", "named"),
    [
        ({"first": 0, "samples": 11, "ranges": runs((0, 5), (7, 5))}, "its ranges hold 10"),
        ({"first": 0, "samples": 10, "ranges": runs((0, 5), (4, 5))}, "has sample 4 after sample 4"),
        ({"first": 7, "samples": 10, "ranges": runs((7, 5), (0, 5))}, "has sample 0 after sample 11"),
        ({"first": 1, "samples": 10, "ranges": runs((0, 5), (7, 5))}, "its ranges begin elsewhere"),
        ({"first": 0, "samples": 10, "ranges": runs((0, 5), (28, 5))}, "ends at sample 33"),
        ({"first": 0, "samples": 10, "ranges": runs((0, 10), (12, 0))}, "ranges.1.samples"),
        ({"first": 0, "samples": 10, "ranges": runs((-1, 10))}, "ranges.0.first"),
    ],
)
def test_a_split_whose_runs_are_wrong_is_refused(split: Json, named: str, layout: Layout) -> None:
    change_schema(layout, put("splits", "train", value=split))
    with pytest.raises((IndexInvalid, SchemaInvalid), match=named):
        DatasetIndex.load(layout.dataset("d"))


def test_a_split_of_several_runs_is_read(layout: Layout) -> None:
    ranges = runs((0, 5), (5, 1), (20, 10))
    change_schema(layout, put("splits", "train", value={"first": 0, "samples": 16, "ranges": ranges}))
    found = DatasetIndex.load(layout.dataset("d")).split("train")
    assert [(run.first, run.samples) for run in found.runs] == [(0, 5), (5, 1), (20, 10)]


# --- versions --------------------------------------------------------------------------------------------------------


def keep_version(layout: Layout, version: int) -> None:
    """Put the two files of a dataset away as an older version of it."""
    folder = layout.dataset("d") / f"versions/{version:06d}"
    folder.mkdir(parents=True)
    for path in (layout.schema("d"), layout.index("d")):
        (folder / path.name).write_bytes(path.read_bytes())


def test_an_older_version_is_read_when_it_is_asked_for(layout: Layout) -> None:
    old = DatasetIndex.load(layout.dataset("d"))
    keep_version(layout, 1)
    change(layout.index("d"), put("version", value=2))
    new = DatasetIndex.load(layout.dataset("d"))
    assert (new.file.version, new.sha256 == old.sha256) == (2, False)
    assert DatasetIndex.load(layout.dataset("d"), version=2) == new
    assert DatasetIndex.load(layout.dataset("d"), version=1) == old


@pytest.mark.parametrize("version", [0, -1, 3, 10**9])
def test_a_version_that_there_is_not_is_said(version: int, layout: Layout) -> None:
    with pytest.raises(NotFound, match=rf"version has value {version}: dataset 'd' has no such version"):
        DatasetIndex.load(layout.dataset("d"), version=version)


def test_a_version_in_the_place_of_another_is_refused(layout: Layout) -> None:
    keep_version(layout, 7)
    with pytest.raises(IndexInvalid, match="'version' has value 1, expected 7"):
        DatasetIndex.load(layout.dataset("d"), version=7)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_value_anywhere_gives_an_index_or_an_error_of_ours(data: st.DataObject) -> None:
    schema = {
        "name": "d",
        "columns": {"a": {"dtype": "int16", "shape": [2]}},
        "splits": {"s": {"first": 0, "samples": 4}},
    }
    index = {
        "dataset": "d", "schema_sha256": "", "samples": 4, "bytes": 64,
        "shards": [{"file": "s", "bytes": 64, "sha256": "0" * 64, "first_sample": 0, "samples": 4,
                    "columns": {"a": {"offset": 0, "bytes": 16}}}],
    }  # fmt: skip
    inside: Any = data.draw(st.sampled_from([schema, index]))
    while True:
        key = data.draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if not isinstance(inside[key], dict | list) or not inside[key] or data.draw(st.booleans()):
            break
        inside = inside[key]
    numbers = st.integers(-(2**65), 2**65)
    inside[key] = data.draw(st.recursive(st.none() | st.booleans() | numbers | st.floats() | st.text(), st.lists))
    schema_bytes = json.dumps(schema).encode()
    if index.get("schema_sha256") == "":
        index["schema_sha256"] = hashlib.sha256(schema_bytes).hexdigest()
    try:
        found = DatasetIndex.parse(schema_bytes, json.dumps(index).encode(), folder=Path("d"))
    except (SchemaInvalid, IndexInvalid):
        return
    found.locate(np.arange(found.file.samples))


def test_samples_are_located_in_their_shards(tmp_path: Path) -> None:
    index = small_datasets.write(Layout(tmp_path), 31, num_shards=4)
    expected = [(number, row) for number, shard in enumerate(index.file.shards) for row in range(shard.samples)]
    asked = np.random.default_rng(0).permutation(31).astype(np.int64)
    numbers, rows = index.locate(asked)
    assert (numbers.dtype.name, rows.dtype.name) == ("int64", "int64")
    assert list(zip(numbers.tolist(), rows.tolist(), strict=True)) == [expected[sample] for sample in asked]
    assert index.locate(np.array([], dtype=np.int64))[0].size == 0


@pytest.mark.parametrize("sample", [-1, 30, 2**40])
def test_a_sample_that_does_not_exist_is_not_located(sample: int, layout: Layout) -> None:
    with pytest.raises(ValueError, match="of 30"):
        DatasetIndex.load(layout.dataset("d")).locate(np.array([3, sample], dtype=np.int64))


def test_a_shard_that_is_missing_is_found_without_reading(layout: Layout) -> None:
    (layout.shards("d") / "shard-00001.data").unlink()
    with pytest.raises(IndexInvalid, match=r"shard-00001\.data cannot be looked at.*No such file"):
        DatasetIndex.load(layout.dataset("d")).check_files(layout.shards("d"))


def test_a_shard_of_another_size_is_found_without_reading(layout: Layout) -> None:
    path = layout.shards("d") / "shard-00002.data"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardCorrupt, match=rf"shard-00002\.data.*expected {size} bytes, found {size - 1} bytes"):
        DatasetIndex.load(layout.dataset("d")).check_files(layout.shards("d"))


def test_the_sizes_of_dtypes_are_those_of_numpy() -> None:
    sizes = {name: np.dtype(name).itemsize for name in ITEM_BYTES if name != "bfloat16"}
    assert sizes | {"bfloat16": 2} == ITEM_BYTES
