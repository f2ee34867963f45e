"""Tables of mixed kinds: CSV, JSON lines and arrays of variable length."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from importers_for_tests import imported, kinds, samples, sizes
from railbus.importers import lines
from railbus.importers.source import Options
from railbus.importing import import_dataset
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_words_of_a_csv_become_text_and_those_of_a_label_classes(tmp_path: Path, layout: Layout) -> None:
    content = 'x,name,label\n1,"héllo, wörld",cat\n2,"two\nlines",dog\n3,,cat\n'
    index, found = imported(layout, write(tmp_path, "t.csv", content))
    assert kinds(index) == {"x": "int64", "name": "uint8… utf-8", "label": "int64"}
    assert found == {"x": [1, 2, 3], "name": ["héllo, wörld", "two\nlines", ""], "label": [0, 1, 0]}
    assert index.schema.columns["label"].labels == ("cat", "dog")


def test_a_kind_is_found_over_the_whole_file_and_not_by_its_first_lines(tmp_path: Path, layout: Layout) -> None:
    content = "a,b\n" + "1,2\n" * 9000 + "1.5,3\n"
    index, found = imported(layout, write(tmp_path, "t.csv", content))
    assert kinds(index) == {"a": "float32", "b": "int64"}
    assert (found["a"][-2:], found["b"][-1], len(found["a"])) == ([1.0, 1.5], 3, 9001)


def test_a_mixed_table_of_many_chunks_keeps_its_rows_together(tmp_path: Path, layout: Layout) -> None:
    content = "id,word\n" + "".join(f"{i},{'w' * (i % 7)}_{i}\n" for i in range(10_000))
    path = write(tmp_path, "t.csv", content)
    index = import_dataset(layout, str(path), shard_bytes=50_000)
    found = samples(layout, index)
    assert len(index.file.shards) > 1
    assert found["id"] != sorted(found["id"])
    assert all(word == f"{'w' * (i % 7)}_{i}" for i, word in zip(found["id"], found["word"], strict=True))
    assert sizes(index) == {"train": 9000, "test": 1000}
    again = import_dataset(Layout(tmp_path / "other"), str(path), shard_bytes=50_000)
    assert again.sha256 == index.sha256


def test_a_mixture_can_be_taken_as_text_and_a_gap_be_filled(tmp_path: Path, layout: Layout) -> None:
    path = write(tmp_path, "t.csv", "a,b\n1,2\nn/a,\n")
    options = Options(text_columns=frozenset({"a"}), missing="fill")
    index, found = imported(layout, path, options=options)
    assert kinds(index) == {"a": "uint8… utf-8", "b": "float32"}
    assert found["a"] == ["1", "n/a"]
    assert found["b"][0] == 2
    assert math.isnan(found["b"][1])


@pytest.mark.parametrize(("name", "content"), [("t.csv", "a,b\n1,2\n"), ("t.jsonl", '{"a": 1, "b": 2}\n')])
def test_a_column_that_is_to_be_text_must_be_there(name: str, content: str, tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(InvalidField, match=rf"'text' has value 'c': '{name}' has no such column .it has a, b"):
        imported(layout, write(tmp_path, name, content), options=Options(text_columns=frozenset({"c"})))


def test_the_hint_for_a_mixture_and_for_a_gap_names_the_option(tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(InvalidField, match=r"'columns\.a' has value 'x': line 9002.*--text a"):
        imported(layout, write(tmp_path, "t.csv", "a\n" + "1\n" * 9000 + "x\n"))
    with pytest.raises(InvalidField, match=r"line 3 of 't\.csv'.*--missing fill"):
        imported(layout, write(tmp_path, "t.csv", "a,b\n1,1\nnan,2\n"))


def test_a_line_that_would_fill_the_memory_is_refused(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    with pytest.raises(InvalidField, match="line 2 is longer than 1000 bytes"):
        imported(layout, write(tmp_path, "t.csv", "a\n" + "1" * 2000))
    with pytest.raises(InvalidField, match="line 1 is longer"):
        imported(layout, write(tmp_path, "t.jsonl", "[" * 2000))


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_every_kind_of_json_value_finds_its_column(tmp_path: Path, layout: Layout) -> None:
    content = """
{"n": 1, "f": 0.5, "t": "ä", "b": true, "fix": [[1, 2], [3, 4]], "var": [1, 2], "m": {"k": [1]}, "label": "no"}

{"n": 2, "f": 3, "t": "", "b": false, "fix": [[5, 6], [7, 8]], "var": [], "m": null, "label": "yes"}
""".replace('"m": null', '"m": {}')
    index, found = imported(layout, write(tmp_path, "t.jsonl", content))
    assert kinds(index) == {
        "n": "int64", "f": "float32", "t": "uint8… utf-8", "b": "bool", "fix": "int64[2,2]", "var": "int64…",
        "m": "uint8… json", "label": "int64",
    }  # fmt: skip
    assert found == {
        "n": [1, 2], "f": [0.5, 3], "t": ["ä", ""], "b": [True, False], "var": [[1, 2], []],
        "fix": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], "m": ['{"k":[1]}', "{}"], "label": [0, 1],
    }  # fmt: skip
    assert index.schema.columns["label"].labels == ("no", "yes")


def test_lists_are_widened_over_the_whole_file(tmp_path: Path, layout: Layout) -> None:
    content = '{"v": [1]}\n' * 5000 + '{"v": [0.5, 2]}\n'
    index, found = imported(layout, write(tmp_path, "t.jsonl", content))
    assert kinds(index) == {"v": "float32…"}
    assert (found["v"][0], found["v"][-1]) == ([1.0], [0.5, 2.0])


def test_fields_that_are_missing_are_filled_when_asked(tmp_path: Path, layout: Layout) -> None:
    path = write(tmp_path, "t.jsonl", '{"a": 1, "t": "x", "v": [1]}\n{"b": 2}\n')
    with pytest.raises(InvalidField, match=r"line 2 .* nothing here, but line 1 a number.*--missing fill"):
        imported(layout, path)
    index, found = imported(layout, path, options=Options(missing="fill"))
    assert kinds(index) == {"a": "float32", "t": "uint8… utf-8", "v": "int64…", "b": "float32"}
    assert (found["t"], found["v"], found["a"][0]) == (["x", ""], [[1], []], 1)
    assert math.isnan(found["a"][1])


BAD_JSON: list[tuple[str, str | bytes, str]] = [
    ("no json", '{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
    ("no map", '{"a": 1}\n[1]\n', "line 2 is no map"),
    ("mixed", '{"a": 1}\n{"a": "x"}\n', r"'columns\.a' has value 'x': line 2 .* has a text here, but line 1 a number"),
    ("list and number", '{"a": [1]}\n{"a": 1}\n', "line 2 .* a number here, but line 1 a list"),
    ("new field", '{"a": 1}\n{"a": 1, "b": 2}\n', r"columns\.b.*line 2"),
    ("too large", '{"a": 9223372036854775808}\n', "beyond 64 bits"),
    ("too large for a float", '{"a": 1e200}\n', "beyond the range of float32"),
    ("same name", '{"a": 1, "A": 2}\n', "another column has this name"),
    ("latin-1", b'{"a": "\xe9"}\n', "line 1: .*utf-8"),
    ("empty", "", "holds no rows"),
    ("no fields", "{}\n", "holds no rows with fields"),
    ("deep", '{"a": ' + "[" * 2000 + "]" * 2000 + "}", "not valid JSON|beyond|claims|has value"),
]


@pytest.mark.parametrize(("content", "said"), [case[1:] for case in BAD_JSON], ids=[case[0] for case in BAD_JSON])
def test_a_fault_of_a_json_file_is_told_with_its_line(
    content: str | bytes, said: str, tmp_path: Path, layout: Layout
) -> None:
    with pytest.raises(InvalidField, match=said):
        imported(layout, write(tmp_path, "t.jsonl", content))
    assert not layout.datasets.exists()


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_with_offsets_are_columns_of_variable_length(tmp_path: Path, layout: Layout) -> None:
    arrays: dict[str, Any] = {"w": np.arange(5, dtype=np.int16), "w.offsets": np.array([0, 2, 2, 5]), "y": np.arange(3)}
    np.savez(tmp_path / "a.npz", **arrays)
    index, found = imported(layout, tmp_path / "a.npz")
    assert kinds(index) == {"w": "int16…", "y": "int64"}
    assert found == {"w": [[0, 1], [], [2, 3, 4]], "y": [0, 1, 2]}


@pytest.mark.parametrize("offsets", [[1, 2, 5], [0, 3, 2, 5], [0, 2, 4], [0, 2, 9], [], [[0, 5]]])
def test_offsets_that_lie_are_refused(offsets: list[Any], tmp_path: Path, layout: Layout) -> None:
    arrays: dict[str, Any] = {"w": np.arange(5), "w.offsets": np.array(offsets, np.int64)}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InvalidField, match=r"not the offsets of 'w'"):
        imported(layout, tmp_path / "a.npz")


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_are_mapped_whatever_their_order(order: Any, tmp_path: Path, layout: Layout) -> None:
    array = np.asarray(np.arange(24, dtype=">f4").reshape(4, 3, 2), order=order)
    np.save(tmp_path / "x.npy", array)
    np.save(tmp_path / "label.npy", np.array([2, 0, 1, 0]))
    index, found = imported(layout, tmp_path)
    assert kinds(index) == {"label": "int64", "x": "float32[3,2]"}
    assert found["x"] == array.tolist()
    assert index.schema.columns["label"].num_classes == 3
    assert imported(Layout(tmp_path / "other"), tmp_path / "x.npy")[1] == {"x": array.tolist()}


def test_packed_archives_are_unpacked_and_a_bomb_is_not(tmp_path: Path, layout: Layout) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros((1000, 1000), np.float32))
    assert imported(layout, tmp_path / "a.npz")[0].file.samples == 1000
    with pytest.raises(InvalidField, match=r"unpacks to more than 1000000 bytes.*--max-bytes"):
        imported(layout, tmp_path / "a.npz", name="e", options=Options(max_bytes=1_000_000))


def test_what_an_archive_hides_is_refused(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../a.txt", "hello")
    with pytest.raises(InvalidField, match="which is no array"):
        imported(layout, path)


def npy_head(shape: str, dtype: str = "<f4") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (117 - len(head)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


@pytest.mark.parametrize(
    "content",
    [
        npy_head("(9223372036854775807, 4)"),
        npy_head("(1000000,)") + b"1234",
        npy_head("(-5,)"),
        npy_head("(5,)", "|O"),
        npy_head("__import__('os').system('true')"),
        b"\x93NUMPY\x03\x00" + b"\0" * 100,
        b"\x93NUMPY",
        b"",
    ],
    ids=["2^63", "cut", "negative", "objects", "code", "version", "magic only", "empty"],
)
def test_an_npy_head_that_lies_is_refused(content: bytes, tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(InvalidField, match="cannot be imported"):
        imported(layout, write(tmp_path, "a.npy", content))
