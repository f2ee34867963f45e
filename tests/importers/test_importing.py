"""Importers: what people have becomes a dataset with every value in place, or an error says what is wrong where."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import small_datasets
from railbus.importing import import_dataset
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import Conflict, InvalidField, InvalidName, NotFound
from railbus_shared.layout import Layout

Array = npt.NDArray[Any]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def columns(layout: Layout, index: DatasetIndex, split: str | None = None) -> dict[str, Array]:
    """All columns of a dataset, or of one split."""
    part = slice(None)
    if split is not None:
        found = index.split(split)
        part = slice(found.first, found.first + found.samples)
    return {name: array[part] for name, array in small_datasets.read(layout, index).items()}


def sizes(index: DatasetIndex) -> dict[str, int]:
    return {name: split.samples for name, split in index.schema.splits.items()}


def npz(folder: Path, **arrays: Array) -> str:
    path = folder / "My Data.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def text_file(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows(found: Mapping[str, Array]) -> list[tuple[Any, ...]]:
    return sorted(zip(*(array.tolist() for array in found.values()), strict=True))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_arrays_of_an_npz_become_columns(tmp_path: Path, layout: Layout) -> None:
    x, y = np.random.default_rng(0).normal(size=(50, 3, 2)).astype(np.float32), np.arange(50) % 4
    index = import_dataset(layout, npz(tmp_path, X=x, y=y, flag=y == 2), held_out_frac=0.2)
    assert (index.schema.name, sizes(index)) == ("my-data", {"train": 40, "test": 10})
    schema = index.schema.columns
    assert {name: (column.dtype, column.shape, column.num_classes) for name, column in schema.items()} == {
        "x": ("float32", (3, 2), None),
        "y": ("int64", (), 4),
        "flag": ("bool", (), None),
    }
    found = columns(layout, index)
    order = [next(row for row in range(50) if np.array_equal(x[row], sample)) for sample in found["x"]]
    assert sorted(order) == list(range(50))
    assert order != sorted(order)
    assert np.array_equal(found["y"], y[order])


def test_what_is_held_out_of_a_sorted_table_is_like_the_rest(tmp_path: Path, layout: Layout) -> None:
    index = import_dataset(layout, npz(tmp_path, y=np.repeat(np.arange(5), 200)), held_out_frac=0.2)
    counts = np.bincount(columns(layout, index, "test")["y"], minlength=5)
    assert counts.sum() == 200
    assert counts.min() > 20


def test_rows_that_follow_each_other_stay_in_order_when_asked(tmp_path: Path, layout: Layout) -> None:
    index = import_dataset(layout, npz(tmp_path, t=np.arange(10_000)), shuffle=False)
    assert columns(layout, index)["t"].tolist() == list(range(10_000))
    assert columns(layout, index, "test")["t"].tolist() == list(range(9000, 10_000))


def test_the_columns_of_a_csv_are_whole_or_other_numbers(tmp_path: Path, layout: Layout) -> None:
    content = "\ufeffid, Width ,big,label\r\n1,0.5,9007199254740993,2\r\n\r\n+2,-1e3,-5,0\r\n3,.25,7,1\r\n"
    index = import_dataset(layout, text_file(tmp_path, "t.csv", content), held_out_frac=0, shuffle=False)
    found = columns(layout, index)
    assert {name: array.dtype.name for name, array in found.items()} == {
        "id": "int64", "width": "float32", "big": "int64", "label": "int64"
    }  # fmt: skip
    assert {name: array.tolist() for name, array in found.items()} == {
        "id": [1, 2, 3], "width": [0.5, -1000, 0.25], "big": [9007199254740993, -5, 7], "label": [2, 0, 1]
    }  # fmt: skip
    assert index.schema.columns["label"].num_classes == 3
    assert sizes(index) == {"train": 3}


def test_big_endian_arrays_are_turned_round(tmp_path: Path, layout: Layout) -> None:
    index = import_dataset(layout, npz(tmp_path, a=np.arange(5, dtype=">i4")), shuffle=False)
    assert columns(layout, index)["a"].tolist() == [0, 1, 2, 3, 4]


def test_the_same_file_gives_the_same_dataset_and_another_one_a_conflict(tmp_path: Path, layout: Layout) -> None:
    source = npz(tmp_path, a=np.arange(100))
    first = import_dataset(layout, source)
    assert import_dataset(layout, source) == first
    assert import_dataset(Layout(tmp_path / "other"), source).sha256 == first.sha256
    with pytest.raises(Conflict):
        import_dataset(layout, npz(tmp_path, a=np.arange(101)))


def test_a_table_is_spread_over_shards(tmp_path: Path, layout: Layout) -> None:
    index = import_dataset(layout, npz(tmp_path, a=np.arange(1000)), shard_bytes=1000)
    assert len(index.file.shards) == 8
    assert sorted(columns(layout, index)["a"].tolist()) == list(range(1000))


@pytest.mark.parametrize(
    ("samples", "held_out_frac", "expected"),
    [
        (10, 0.1, {"train": 9, "test": 1}),
        (3, 0.1, {"train": 2, "test": 1}),
        (1, 0.5, {"train": 1}),
        (10, 0.0, {"train": 10}),
        (4, 0.99, {"train": 1, "test": 3}),
    ],
)
def test_a_share_is_held_out_and_something_is_always_left(
    samples: int, held_out_frac: float, expected: dict[str, int], tmp_path: Path, layout: Layout
) -> None:
    index = import_dataset(layout, npz(tmp_path, a=np.arange(samples)), held_out_frac=held_out_frac)
    assert sizes(index) == expected


# --- text ------------------------------------------------------------------------------------------------------------


def decoded(index: DatasetIndex, tokens: Array) -> list[str]:
    labels = index.schema.columns["tokens"].labels
    return ["".join(labels[number] for number in block) for block in tokens.tolist()]


@pytest.mark.parametrize("name", ["poem.txt", "poem.md"])
def test_a_text_becomes_blocks_of_characters(name: str, tmp_path: Path, layout: Layout) -> None:
    text = "the quick brown fox jumps over the lazy dög → ∞\n" * 10
    index = import_dataset(layout, text_file(tmp_path, name, text), block=16, held_out_frac=0.25)
    column = index.schema.columns["tokens"]
    assert (index.schema.name, column.dtype, column.shape) == ("poem", "uint8", (17,))
    assert column.labels == tuple(sorted(set(text)))
    assert column.num_classes == len(column.labels)
    blocks = decoded(index, columns(layout, index)["tokens"])
    assert blocks == [text[at : at + 17] for at in range(0, len(text) - 16, 16)]
    assert sizes(index) == {"train": 22, "validation": 7}
    assert "".join(block[1:] for block in blocks) == text[1 : 16 * len(blocks) + 1]


@pytest.mark.parametrize(("num_symbols", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (5000, "uint16")])
def test_many_symbols_take_two_bytes(num_symbols: int, dtype: str, tmp_path: Path, layout: Layout) -> None:
    text = "".join(chr(0x4E00 + number % num_symbols) for number in range(max(num_symbols, 20)))
    index = import_dataset(layout, text_file(tmp_path, "t.txt", text), block=4)
    assert index.schema.columns["tokens"].dtype == dtype
    assert decoded(index, columns(layout, index)["tokens"])[1] == text[4:9]


def test_a_long_text_is_cut_the_same_in_every_chunk(tmp_path: Path, layout: Layout) -> None:
    text = "".join(chr(97 + (number * number) % 26) for number in range(50_000))
    index = import_dataset(layout, text_file(tmp_path, "t.txt", text), block=8, held_out_frac=0)
    assert decoded(index, columns(layout, index)["tokens"]) == [text[at : at + 9] for at in range(0, 49_985, 8)]


# --- what ships in packages ------------------------------------------------------------------------------------------


def test_digits_are_what_scikit_learn_bundles(layout: Layout) -> None:
    from sklearn.datasets import load_digits

    index = import_dataset(layout, "digits")
    assert (index.schema.name, sizes(index)) == ("digits", {"train": 1438, "test": 359})
    image, label = index.schema.columns["image"], index.schema.columns["label"]
    assert (image.dtype, image.shape, label.dtype, label.shape) == ("float32", (1, 8, 8), "int64", ())
    assert (label.num_classes, label.labels) == (10, tuple("0123456789"))
    found = columns(layout, index)
    assert (float(found["image"].min()), float(found["image"].max())) == (0.0, 1.0)
    bunch: Any = load_digits()
    expected = [
        (*row, digit) for row, digit in zip(bunch.data.astype(int).tolist(), bunch.target.tolist(), strict=True)
    ]
    pixels = (found["image"].reshape(-1, 64) * 16).astype(int).tolist()
    assert sorted((*row, digit) for row, digit in zip(pixels, found["label"].tolist(), strict=True)) == sorted(expected)


def test_a_fifth_of_every_digit_is_held_out_in_a_mixed_order(layout: Layout) -> None:
    index = import_dataset(layout, "digits")
    train, test = columns(layout, index, "train")["label"], columns(layout, index, "test")["label"]
    shares = np.bincount(test) / np.bincount(np.concatenate([train, test]))
    assert np.abs(shares - 0.2).max() < 0.01
    for labels in (train, test):
        assert (np.diff(labels) == 0).mean() < 0.2


def test_pydocs_are_characters_of_pythons_help(layout: Layout) -> None:
    index = import_dataset(layout, "pydocs")
    assert index.file.samples * 128 > 300_000
    assert set(sizes(index)) == {"train", "validation"}
    assert abs(sizes(index)["validation"] / index.file.samples - 0.1) < 0.01
    assert index.schema.columns["tokens"].shape == (129,)
    text = "".join(block[:-1] for block in decoded(index, columns(layout, index)["tokens"]))
    assert 'The "assert" statement' in text


@pytest.mark.parametrize("source", ["digits", "pydocs"])
def test_what_ships_is_imported_the_same_twice_and_under_any_name(source: str, tmp_path: Path, layout: Layout) -> None:
    first = import_dataset(layout, source, name="mine.v2")
    assert first.schema.name == "mine.v2"
    assert import_dataset(layout, source, name="mine.v2") == first
    assert import_dataset(Layout(tmp_path / "other"), source, name="mine.v2").sha256 == first.sha256


def test_what_ships_needs_no_other_package(tmp_path: Path, layout: Layout) -> None:
    code = """
import sys
sys.modules["sklearn"] = None
from pathlib import Path
from railbus.importing import import_dataset
from railbus_shared.layout import Layout
print(import_dataset(Layout(Path(sys.argv[1])), "digits").sha256)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == import_dataset(layout, "digits").sha256


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["nowhere.csv", "digit", "", "/"])
def test_a_source_that_is_not_there_names_what_can_be_given(source: str, layout: Layout) -> None:
    with pytest.raises(NotFound, match=r"\.npz, \.csv, \.txt, \.md.*digits, pydocs"):
        import_dataset(layout, source, name="d")


def test_an_unknown_format_names_the_known_ones(tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(InvalidField, match=r"'\.xlsx' is not known.*\.npz, \.csv, \.txt, \.md"):
        import_dataset(layout, text_file(tmp_path, "t.xlsx", "x"))


BAD_CSV: list[tuple[str, str | bytes, str]] = [
    ("word", "a,b\n1,2\n3,four\n", r"'columns\.b' has value 'four': line 3 of 't\.csv' holds no number"),
    ("empty cell", "a,b\n1,\n", r"'columns\.b' has value '': line 2"),
    ("nan", "a\nnan\n", r"'columns\.a' has value 'nan': line 2"),
    ("underscore", "a\n1_000\n2\n", r"'1_000': line 2"),
    ("after a cell of two lines", 'a,b\n"1\n",2\n3,x\n', r"'x': line 4"),
    ("short line", "a,b\n1,2\n3\n", "line 3 has 1 cells, but the first line 2"),
    ("long line", "a,b\n1,2,3\n", "line 2 has 3 cells"),
    ("no names", "1.5,2\n3,4\n", "first line holds numbers"),
    ("empty", "", "first line is empty"),
    ("names only", "a,b\n", "must have one length, and not 0"),
    ("same name", "a,A\n1,2\n", r"'columns\.a' has value 'A': another column"),
    ("same name exactly", "a,a\n1,2\n", "names a column twice"),
    ("latin-1", b"a,b\n1,\xe9\n", "cannot be imported"),
    ("open quote", 'a\n"1\n', "cannot be imported"),
    ("zero byte", b"a\n1\x00\n1\n", "has value|cannot be imported"),
    ("too large", "a\n99999999999999999999\n", "beyond 64 bits"),
    ("too large for a float", "a\n1e300\n", "beyond the range of float32"),
    ("beyond any float", "a\n1e999\n", "beyond the range of float32"),
]


@pytest.mark.parametrize(("content", "said"), [case[1:] for case in BAD_CSV], ids=[case[0] for case in BAD_CSV])
def test_a_fault_of_a_csv_is_told_with_its_place(
    content: str | bytes, said: str, tmp_path: Path, layout: Layout
) -> None:
    with pytest.raises(InvalidField, match=said):
        import_dataset(layout, text_file(tmp_path, "t.csv", content))
    assert not layout.datasets.exists()


BAD_NPZ: list[tuple[str, dict[str, Any], str]] = [
    ("words", {"a": np.array(["x", "y"])}, r"'columns\.a' has value 'str"),
    ("complex", {"a": np.array([1j])}, "complex128"),
    ("objects", {"a": np.array([{}, []], dtype=object)}, "cannot be imported"),
    ("lengths", {"a": np.zeros(3), "b": np.zeros(4)}, "must have one length"),
    ("scalar", {"a": np.float64(3)}, "must have one length, and not 0"),
    ("no samples", {"a": np.zeros((0, 3))}, "not 0"),
    ("nothing", {}, "must have one length"),
    ("same name", {"a": np.zeros(3), "A": np.zeros(3)}, "another column has this name"),
]


@pytest.mark.parametrize(("arrays", "said"), [case[1:] for case in BAD_NPZ], ids=[case[0] for case in BAD_NPZ])
def test_a_fault_of_an_npz_is_told(arrays: dict[str, Any], said: str, tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(InvalidField, match=said):
        import_dataset(layout, npz(tmp_path, **arrays))
    assert not layout.datasets.exists()


def one_array(folder: Path) -> bytes:
    np.save(folder / "a.npy", np.arange(5))
    return (folder / "a.npy").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "one array"])
def test_a_file_that_is_no_npz_is_told(damage: str, tmp_path: Path, layout: Layout) -> None:
    source = Path(npz(tmp_path, a=np.arange(1000)))
    whole = bytearray(source.read_bytes())
    whole[400] ^= 0xFF
    content = {"cut": bytes(whole[:500]), "flipped": bytes(whole), "text": b"hello", "empty": b""}
    content["one array"] = one_array(tmp_path)
    source.write_bytes(content[damage])
    with pytest.raises(InvalidField, match="cannot be imported"):
        import_dataset(layout, str(source))


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        ("short", {}, "too short for two blocks of 128"),
        ("", {}, "too short"),
        (b"\xff\xfe" * 500, {}, "not UTF-8"),
        ("long enough " * 50, {"block": 0}, "'block' has value 0"),
        ("long enough " * 50, {"block": -3}, "'block' has value -3"),
        ("long enough " * 50, {"held_out_frac": 1.0}, "'held_out_frac' has value 1.0"),
        ("long enough " * 50, {"held_out_frac": -0.1}, "'held_out_frac'"),
        ("long enough " * 50, {"held_out_frac": float("nan")}, "'held_out_frac'"),
    ],
)
def test_a_text_or_setting_that_cannot_be_used_is_told(
    content: str | bytes, settings: dict[str, Any], said: str, tmp_path: Path, layout: Layout
) -> None:
    with pytest.raises(InvalidField, match=said):
        import_dataset(layout, text_file(tmp_path, "t.txt", content), **settings)


@pytest.mark.parametrize("name", ["", "../up", "A", "a/b"])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(InvalidName):
        import_dataset(layout, npz(tmp_path, a=np.arange(5)), name=name)


@pytest.mark.parametrize(
    ("file", "expected"),
    [("My Data (1).csv", "my-data-1"), ("a..b.csv", "a-b"), ("v1.2.csv", "v1.2"), ("_x_.csv", "x")],
)
def test_a_name_is_made_from_the_file(file: str, expected: str, tmp_path: Path, layout: Layout) -> None:
    assert import_dataset(layout, text_file(tmp_path, file, "a\n1\n2\n")).schema.name == expected
