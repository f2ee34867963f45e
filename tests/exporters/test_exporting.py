"""Exports, read back by our own importers and by the libraries that people read them with."""

from __future__ import annotations

import csv
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from importers_for_tests import imported, kind, picture_file, samples, sizes
from railbus.exporters.exporter import ExportOptions
from railbus.exporting import FORMATS, export_dataset
from railbus.importing import import_dataset
from railbus_shared.contracts.artifacts import Column, DatasetSchema, SampleRange, Split
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.writer import write_dataset
from railbus_shared.errors import Conflict, InvalidField, NotFound, ShardCorrupt
from railbus_shared.layout import Layout
from small_datasets import flip

COUNT = 30


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def ragged(parts: list[Any], dtype: Any) -> Ragged:
    ends = np.cumsum([0, *map(len, parts)])
    return Ragged(np.concatenate([np.asarray(part, dtype) for part in parts]), ends.astype(np.int64))


def ragged_bytes(parts: list[bytes]) -> Ragged:
    return ragged([list(part) for part in parts], np.uint8)


def written(layout: Layout, columns: dict[str, tuple[Column, Any]], *, num_shards: int = 3) -> DatasetIndex:
    """A dataset of 30 samples in some shards with splits `train` and `test`."""
    schema = DatasetSchema(
        name="d",
        columns={name: column for name, (column, _) in columns.items()},
        splits={"train": Split(first=0, samples=20), "test": Split(first=20, samples=COUNT - 20)},
    )
    size = sum(values.values.nbytes if isinstance(values, Ragged) else values.nbytes for _, values in columns.values())
    chunk = {name: values for name, (_, values) in columns.items()}
    return write_dataset(layout, schema, [chunk], shard_bytes=-(-size // num_shards))


def mixed(layout: Layout, *, image: bytes | None = None, without: tuple[str, ...] = ()) -> DatasetIndex:
    """A column of every kind."""
    ids = np.arange(COUNT)
    texts = [f"ä{number}\n" * (number % 4 + 1) for number in range(COUNT)]
    varying = [list(range(number % 5 + 1)) for number in range(COUNT)]
    columns: dict[str, tuple[Column, Any]] = {
        "id": (Column(dtype="int64", shape=()), ids),
        "f": (Column(dtype="float32", shape=()), (ids / 4).astype(np.float32)),
        "fix": (Column(dtype="float32", shape=(2, 3)), np.arange(COUNT * 6, dtype=np.float32).reshape(COUNT, 2, 3)),
        "label": (Column(dtype="int64", shape=(), num_classes=3, labels=("a", "b", "c")), ids % 3),
        "t": (
            Column(dtype="uint8", shape=(), variable_length=True, encoding="utf-8"),
            ragged_bytes([text.encode() for text in texts]),
        ),
        "v": (Column(dtype="int32", shape=(), variable_length=True), ragged(varying, np.int32)),
        "j": (
            Column(dtype="uint8", shape=(), variable_length=True, encoding="json"),
            ragged_bytes([b'{"k":%d}' % number for number in range(COUNT)]),
        ),
    }
    if image is not None:
        column = Column(dtype="uint8", shape=(), variable_length=True, encoding="png")
        columns["image"] = (column, ragged_bytes([image] * COUNT))
    return written(layout, {name: one for name, one in columns.items() if name not in without})


def back(tmp_path: Path, source: Path) -> tuple[DatasetIndex, dict[str, list[Any]]]:
    return imported(Layout(tmp_path / "back"), source)


@pytest.mark.parametrize("to", ["webdataset", "mds", "parquet"])
def test_a_dataset_comes_back_from_a_folder_format_with_its_splits(to: str, tmp_path: Path, layout: Layout) -> None:
    index = mixed(layout, image=picture_file(tmp_path / "1.png"))
    assert export_dataset(layout, index, to=to, target=tmp_path / "out", options=ExportOptions(shard_bytes=2000)) == 30
    again, found = back(tmp_path, tmp_path / "out")
    assert found == samples(layout, index)
    assert sizes(again) == {"train": 20, "test": 10}
    told = {name: kind(column) for name, column in again.schema.columns.items()}
    assert told == {name: kind(column) for name, column in index.schema.columns.items()}


@pytest.mark.parametrize(("to", "name"), [("npz", "out.npz"), ("npy", "out"), ("jsonl", "out.jsonl")])
def test_a_split_comes_back_from_a_format_without_splits(to: str, name: str, tmp_path: Path, layout: Layout) -> None:
    index = mixed(layout, without=("t", "j") if to != "jsonl" else ())
    assert export_dataset(layout, index, to=to, target=tmp_path / name, split="test") == 10
    _, found = back(tmp_path, tmp_path / name)
    assert found == samples(layout, index, "test")


def test_a_csv_has_a_line_for_each_sample(tmp_path: Path, layout: Layout) -> None:
    index = mixed(layout, without=("fix", "v"))
    export_dataset(layout, index, to="csv", target=tmp_path / "out.csv", split="train")
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[5] == {"id": "5", "f": "1.25", "label": "2", "t": "ä5\nä5\n", "j": '{"k":5}'}
    _, found = back(tmp_path, tmp_path / "out.csv")
    assert found == samples(layout, index, "train")


def test_images_come_back_by_class_whether_files_or_pixels(tmp_path: Path, layout: Layout) -> None:
    image = picture_file(tmp_path / "1.png")
    index = mixed(layout, image=image, without=("fix", "v", "t", "j"))
    export_dataset(layout, index, to="images", target=tmp_path / "out")
    again, found = back(tmp_path, tmp_path / "out")
    assert sizes(again) == {"train": 20, "test": 10}
    assert set(found["image"]) == {image}
    assert again.schema.columns["label"].labels == ("a", "b", "c")
    assert sorted(found["label"]) == sorted(samples(layout, index)["label"])


def test_pixels_become_png_files(tmp_path: Path, layout: Layout) -> None:
    from PIL import Image

    index = import_dataset(layout, "digits")
    export_dataset(layout, index, to="images", target=tmp_path / "out", split="test")
    with Image.open(tmp_path / "out/7" / sorted(one.name for one in (tmp_path / "out/7").iterdir())[0]) as opened:
        pixels = np.asarray(opened)[:, :, 0]
    found = samples(layout, index, "test")
    expected = next(image for image, label in zip(found["image"], found["label"], strict=True) if label == 7)
    assert np.abs(pixels / 255 - np.array(expected)[0]).max() < 0.003


def test_a_label_that_is_a_path_makes_no_path(tmp_path: Path, layout: Layout) -> None:
    image = picture_file(tmp_path / "1.png")
    labels = ("../up", "/etc/x", "..", "")
    columns: dict[str, tuple[Column, Any]] = {
        "image": (
            Column(dtype="uint8", shape=(), variable_length=True, encoding="png"),
            ragged_bytes([image] * COUNT),
        ),
        "label": (Column(dtype="int64", shape=(), num_classes=4, labels=labels), np.arange(COUNT) % 4),
    }
    export_dataset(layout, written(layout, columns), to="images", target=tmp_path / "in/out", split="train")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert len(list((tmp_path / "in/out").glob("*/*.png"))) == 20


def test_archives_are_cut_at_the_size_that_was_asked_for(tmp_path: Path, layout: Layout) -> None:
    index = mixed(layout)
    export_dataset(
        layout, index, to="webdataset", target=tmp_path / "out", options=ExportOptions(shard_bytes=5 * 7 * 1024)
    )
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths if path.name.startswith("test")] == ["test-000000.tar", "test-000001.tar"]
    for path in paths:
        with tarfile.open(path) as tar:
            keys = [name.partition(".")[0] for name in tar.getnames()]
        assert all(keys.count(key) == len(index.schema.columns) for key in keys)


def test_bfloat16_is_written_as_float32_and_truth_values_stay(tmp_path: Path, layout: Layout) -> None:
    values = np.array([1.5, -2.0, math.nan] * 10, np.float32)
    columns: dict[str, tuple[Column, Any]] = {
        "x": (Column(dtype="bfloat16", shape=()), (values.view(np.uint32) >> 16).astype(np.uint16)),
        "b": (Column(dtype="bool", shape=()), np.arange(COUNT) % 2 == 0),
    }
    index = written(layout, columns)
    export_dataset(layout, index, to="parquet", target=tmp_path / "a.parquet", split="test")
    found = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert np.array_equal(found["x"], values[20:], equal_nan=True)
    assert found["b"] == [True, False] * 5
    export_dataset(layout, index, to="jsonl", target=tmp_path / "a.jsonl", split="test")
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0]) == {"x": None, "b": True}


def test_the_samples_of_a_split_of_several_runs_are_all_there(tmp_path: Path, layout: Layout) -> None:
    ranges = (SampleRange(first=0, samples=4), SampleRange(first=25, samples=5))
    schema = DatasetSchema(
        name="d",
        columns={"id": Column(dtype="int64", shape=())},
        splits={"train": Split(first=0, samples=9, ranges=ranges)},
    )
    index = write_dataset(layout, schema, [{"id": np.arange(COUNT)}], shard_bytes=80)
    export_dataset(layout, index, to="csv", target=tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().split() == ["id", *map(str, [0, 1, 2, 3, 25, 26, 27, 28, 29])]


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_an_export_never_writes_over_what_is_there(to: str, tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(Conflict, match="it exists"):
        export_dataset(layout, mixed(layout), to=to, target=tmp_path / "out", split="test")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("to", ["parquet", "npz", "webdataset"])
def test_a_damaged_shard_leaves_nothing_behind(to: str, tmp_path: Path, layout: Layout) -> None:
    index = mixed(layout, without=("t", "j"))
    flip(layout.shards("d") / index.file.shards[-1].file)
    with pytest.raises(ShardCorrupt):
        export_dataset(layout, index, to=to, target=tmp_path / "out", split="test")
    assert [path.name for path in tmp_path.iterdir()] == ["learning"]


@pytest.mark.parametrize(
    ("to", "without", "split", "said"),
    [
        ("csv", (), "test", r"'columns\.fix'.*no place in CSV.*jsonl or parquet"),
        ("jsonl", (), "test", r"'columns\.image'.*no place in JSON lines"),
        ("images", ("image", "fix"), "test", "need a column of images and one of classes"),
        ("csv", ("fix", "v", "image"), None, "has train, test.*--split"),
    ],
)
def test_what_has_no_place_in_a_format_is_told(
    to: str, without: tuple[str, ...], split: str | None, said: str, tmp_path: Path, layout: Layout
) -> None:
    index = mixed(layout, image=picture_file(tmp_path / "1.png"), without=without)
    with pytest.raises(InvalidField, match=said):
        export_dataset(layout, index, to=to, target=tmp_path / "out", split=split)
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there_is_told(tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(NotFound, match="it has test, train"):
        export_dataset(layout, mixed(layout), to="mds", target=tmp_path / "out", split="dev")
