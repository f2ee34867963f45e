"""Parquet files and datasets of Hugging Face, read by pyarrow alone."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from importers_for_tests import imported, kinds, picture_file, samples, sizes
from railbus.importers.source import Options
from railbus.importing import import_dataset
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def table(count: int = 5) -> pa.Table:
    fixed = pa.list_(pa.list_(pa.float32(), 2), 3)
    return pa.table(
        {
            "n": pa.array(range(count), pa.int32()),
            "f": pa.array([0.5 * i for i in range(count)], pa.float64()),
            "b": pa.array([i % 2 == 0 for i in range(count)]),
            "t": pa.array([f"ä{i}" for i in range(count)]),
            "fix": pa.array([[[i, 1], [2, 3], [4, 5]] for i in range(count)], fixed),
            "var": pa.array([list(range(i % 9)) for i in range(count)], pa.list_(pa.int16())),
            "pairs": pa.array([[[i, i]] * (i % 5) for i in range(count)], pa.list_(pa.list_(pa.int16(), 2))),
            "d": pa.array(["x", "y"] * (count // 2) + ["x"] * (count % 2)).dictionary_encode(),
            "label": pa.array([i % 3 for i in range(count)], pa.int64()),
        }
    )


KINDS = {
    "n": "int32", "f": "float64", "b": "bool", "t": "uint8… utf-8", "fix": "float32[3,2]", "var": "int16…",
    "pairs": "int16[2]…", "d": "uint8… utf-8", "label": "int64",
}  # fmt: skip


@pytest.mark.parametrize("rows_of_a_group", [2, 1000])
def test_every_type_of_parquet_finds_its_column(rows_of_a_group: int, tmp_path: Path, layout: Layout) -> None:
    parquet.write_table(table(), tmp_path / "t.parquet", row_group_size=rows_of_a_group)
    index, found = imported(layout, tmp_path / "t.parquet")
    assert kinds(index) == KINDS
    assert found == table().to_pydict()
    assert index.schema.columns["label"].num_classes == 3


def test_a_mixed_parquet_file_of_many_batches_keeps_its_rows_together(tmp_path: Path, layout: Layout) -> None:
    parquet.write_table(table(9000), tmp_path / "t.parquet")
    index = import_dataset(layout, str(tmp_path / "t.parquet"), held_out_frac=0)
    found, expected = samples(layout, index), table(9000).to_pydict()
    assert found["n"] != expected["n"]
    for row in random.Random(0).sample(range(9000), 50):
        assert {name: values[row] for name, values in found.items()} == {
            name: values[found["n"][row]] for name, values in expected.items()
        }


def test_parquet_files_of_splits_stay_splits(tmp_path: Path, layout: Layout) -> None:
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 4)):
        parquet.write_table(table(count), tmp_path / f"{name}.parquet")
    index, found = imported(layout, tmp_path)
    assert sizes(index) == {"train": 5, "test": 4}
    assert found["n"] == [0, 1, 2, 0, 1, 0, 1, 2, 3]


def test_what_is_missing_is_refused_or_filled(tmp_path: Path, layout: Layout) -> None:
    gaps = pa.table({"f": pa.array([1.0, None]), "t": pa.array([None, "x"]), "v": pa.array([[1], None])})
    parquet.write_table(gaps, tmp_path / "t.parquet")
    with pytest.raises(InvalidField, match=r"1 of 2 values are missing.*--missing fill"):
        imported(layout, tmp_path / "t.parquet")
    _, found = imported(layout, tmp_path / "t.parquet", options=Options(missing="fill"))
    assert (found["f"][0], found["t"], found["v"]) == (1.0, ["", "x"], [[1], []])
    assert math.isnan(found["f"][1])


BAD_TYPES: list[tuple[str, Mapping[str, Any], str]] = [
    ("time", {"a": pa.array([0], pa.timestamp("us"))}, r"'columns\.a' has value 'timestamp"),
    ("lists in lists", {"a": pa.array([[[1], [2, 3]]])}, "a type that has no place"),
    ("map", {"a": pa.array([{"x": 1}])}, "a type that has no place"),
    ("whole numbers missing", {"a": pa.array([1, None])}, "1 of 2 values are missing"),
    ("no rows", {"a": pa.array([], pa.int64())}, "holds no rows"),
    ("same name", {"a": [1], "A": [2]}, "another column has this name"),
]


@pytest.mark.parametrize(("columns", "said"), [case[1:] for case in BAD_TYPES], ids=[case[0] for case in BAD_TYPES])
def test_what_has_no_place_in_a_shard_is_told_by_name(
    columns: Mapping[str, Any], said: str, tmp_path: Path, layout: Layout
) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InvalidField, match=said):
        imported(layout, tmp_path / "t.parquet")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_parquet_file_is_told(damage: str, tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(table(2000), path, use_dictionary=False)
    whole = path.read_bytes()
    flipped = whole[:-200] + bytes(byte ^ 0xFF for byte in whole[-200:-100]) + whole[-100:]
    path.write_bytes({"cut": whole[: len(whole) // 2], "flipped": flipped, "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(InvalidField, match="cannot be imported"):
        imported(layout, path)


def test_text_that_is_no_utf_8_is_told(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"t": ["mark"] * 3}), path, use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"mark", b"m\xffrk"))
    with pytest.raises(InvalidField, match="Invalid UTF8"):
        imported(layout, path)


def test_a_parquet_bomb_is_refused_by_its_own_word(tmp_path: Path, layout: Layout) -> None:
    """A constant column packs a million times; a limit is met before anything is decoded."""
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"a": pa.array(["x" * 1000] * 3000)}), path, use_dictionary=False)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(InvalidField, match="unpacks to more than 1000000 bytes"):
        imported(layout, path, options=Options(max_bytes=1_000_000))


def test_a_parquet_bomb_by_a_dictionary_is_refused_while_it_is_read(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"a": pa.array(["x" * 1000] * 3000)}), path)
    with pytest.raises(InvalidField, match="unpacks to more than 1000000 bytes"):
        imported(layout, path, options=Options(max_bytes=1_000_000))


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def saved(folder: Path, parts: list[pa.Table]) -> None:
    """As `datasets.save_to_disk` writes a split."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_dataset_keeps_splits_classes_and_images(tmp_path: Path, layout: Layout) -> None:
    image = picture_file(tmp_path / "1.png")
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"image": pa.array([{"bytes": image, "path": None}] * 5, kind), "label": pa.array([0, 1, 1, 0, 1])}
    part = pa.table(columns).replace_schema_metadata(metadata)
    saved(tmp_path / "in/train", [part, part.slice(0, 2)])
    saved(tmp_path / "in/test", [part.slice(1, 1)])
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    index, found = imported(layout, tmp_path / "in")
    assert kinds(index) == {"image": "uint8… png", "label": "int64"}
    assert index.schema.columns["label"].labels == ("cat", "dog")
    assert sizes(index) == {"train": 7, "test": 1}
    assert (found["image"], found["label"]) == ([image] * 8, [0, 1, 1, 0, 1, 0, 1, 1])


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "", "a/b.arrow"])
def test_a_saved_dataset_that_names_files_elsewhere_is_refused(name: str, tmp_path: Path, layout: Layout) -> None:
    saved(tmp_path / "in", [table()])
    (tmp_path / "in/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InvalidField, match="names files that are none of this folder"):
        imported(layout, tmp_path / "in")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no state", "name"])
def test_a_damaged_saved_dataset_is_told(damage: str, tmp_path: Path, layout: Layout) -> None:
    saved(tmp_path / "in", [table(50)])
    path = tmp_path / "in/data-00000-of-00001.arrow"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 3])
    elif damage == "flipped":
        path.write_bytes(whole[:40] + bytes(byte ^ 0xFF for byte in whole[40:60]) + whole[60:])
    elif damage == "name":
        path.write_bytes(whole.replace(b"label", b"lab\xa0l", 1))
    elif damage == "gone":
        path.unlink()
    else:
        (tmp_path / "in/state.json").write_text("[]")
    with pytest.raises(InvalidField, match="cannot be imported"):
        imported(layout, tmp_path / "in")


def test_without_pyarrow_the_way_to_get_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    code = """
import sys
sys.modules["pyarrow"] = None
from pathlib import Path
from railbus.importing import import_dataset
from railbus_shared.errors import ConfigError
from railbus_shared.layout import Layout
try:
    import_dataset(Layout(Path(sys.argv[1]) / "learning"), sys.argv[1] + "/t.parquet", name="d")
except ConfigError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install 'railbus[parquet]'" in done.stdout
