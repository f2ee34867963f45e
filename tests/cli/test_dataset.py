"""`railbus dataset` on real files, without a bus."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from commands import railbus, railbus_here
from railbus_shared.contracts.artifacts import DatasetSchema
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "learning")
    schema = DatasetSchema.parse(
        {
            "name": "squares",
            "description": "x and its square",
            "columns": {
                "x": {"dtype": "float32", "shape": [2]},
                "y": {"dtype": "int64", "shape": [], "num_classes": 3},
            },
            "splits": {"train": {"first": 0, "samples": 8}, "test": {"first": 8, "samples": 2}},
        }
    )
    columns: dict[str, npt.NDArray[Any]] = {
        "x": np.arange(20, dtype=np.float32).reshape(10, 2),
        "y": np.arange(10, dtype=np.int64) % 3,
    }
    write_dataset(made, schema, iter([columns]))
    return made


def test_datasets_are_listed(layout: Layout) -> None:
    listed = railbus("dataset", "list", "--json", cwd=layout.root.parent).json()
    assert isinstance(listed, list)
    assert [(one["dataset"], one["samples"], one["splits"]["test"]["samples"]) for one in listed] == [
        ("squares", 10, 2)
    ]
    assert railbus("dataset", "-q", cwd=layout.root.parent).out == "squares\n"
    assert "train 8, test 2" in railbus("dataset", cwd=layout.root.parent).out


def test_a_dataset_is_shown_with_its_columns_and_shards(layout: Layout) -> None:
    out = railbus("dataset", "show", "squares", cwd=layout.root.parent).out
    assert "x and its square" in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith(("x ", "y "))] == [
        ["x", "float32", "2"],
        ["y", "int64", "scalar"],
    ]
    assert "shard-00000.data" in out


def test_a_dataset_that_is_whole_is_valid(layout: Layout) -> None:
    done = railbus("dataset", "verify", "squares", cwd=layout.root.parent)
    assert (done.status, done.out.startswith("squares is valid: 10 samples in 1 shard")) == (0, True), done.err


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_damaged_shard_is_found(damage: str, layout: Layout) -> None:
    path = layout.shards("squares") / "shard-00000.data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink() if damage == "gone" else path.write_bytes(data)
    done = railbus("dataset", "verify", "squares", cwd=layout.root.parent)
    assert done.status == 6
    assert "error[SHARD_CORRUPT]: shard " in done.err
    assert "shard-00000.data" in done.err


def test_a_damaged_index_is_said_and_hides_no_other_dataset(layout: Layout) -> None:
    broken = layout.datasets / "broken"
    broken.mkdir()
    (broken / "index.json").write_bytes(b"{")
    done = railbus("dataset", "list", "-q", cwd=layout.root.parent)
    assert (done.status, done.out) == (0, "squares\n")
    assert "warning: broken: " in done.err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["show", "square"], 3, "did you mean 'squares'?"),
        (["verify", "zzz"], 3, "there are: squares"),
        (["show", "../x"], 6, "not a valid name"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(
    words: list[str], status: int, said: str, layout: Layout
) -> None:
    done = railbus("dataset", *words, cwd=layout.root.parent)
    assert (done.status, said in done.err) == (status, True), done.err


# --- import, export and what lies between -----------------------------------------------------------------------------


def text_file(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return name


def test_the_options_of_an_import_reach_the_importer(tmp_path: Path) -> None:
    words = ["--name", "n", "--held-out", "0.25", "--no-shuffle", "--text", "code", "--shard-bytes", "1kB"]
    source = text_file(tmp_path, "t.csv", "x,code\n" + "".join(f"{n},{n % 7}\n" for n in range(400)))
    done = railbus_here("dataset", "import", source, *words, "--json", cwd=tmp_path)
    told = done.json()
    assert isinstance(told, dict), done.err
    assert (told["dataset"], told["splits"]["test"]["samples"], told["num_shards"]) == ("n", 100, 7)
    text = text_file(tmp_path, "t.txt", "hello " * 300)
    done = railbus_here(
        "dataset", "import", text, "--tokenizer", "byte", "--block", "8", "--split", "dev", cwd=tmp_path
    )
    assert (done.status, "imported t: 224 samples" in done.out) == (0, True), done.err
    shown = railbus_here("dataset", "show", "t", "--json", cwd=tmp_path).json()
    assert isinstance(shown, dict)
    assert shown["schema"]["columns"]["tokens"]["shape"] == [9]
    assert list(shown["schema"]["splits"]) == ["dev"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["import", "t.csv"], 6, "error[INVALID_FIELD]: field 'columns.a' has value 'x': line 3 of 't.csv'"),
        (["import", "nowhere.tar"], 3, "there is no such file or folder"),
        (["import", "t.csv", "--shard-bytes", "lots"], 2, "write 512MB or 1GiB"),
        (["import", "t.csv", "--decode", "big"], 2, "write 64x48"),
        (["import", "t.csv", "--held-out", "1"], 2, "not in the range"),
        (["export", "squares", "out", "--to", "tfrecord"], 2, "is not one of"),
        (["export", "squares", "out.csv", "--to", "csv", "--split", "test"], 6, "'columns.x'"),
        (["export", "squares", "t.csv", "--to", "npz", "--split", "test"], 1, "error[CONFLICT]"),
        (["export", "squares", "out", "--to", "mds", "--split", "dev"], 3, "it has test, train"),
        (["sample", "squares", "--png", "s.png"], 6, "none of them holds pictures"),
        (["sample", "squares", "--split", "dev"], 3, "it has test, train"),
        (["append", "squares", "t.jsonl"], 6, "it has x, y"),
    ],
)
def test_what_goes_wrong_ends_with_the_status_of_its_kind(
    words: list[str], status: int, said: str, layout: Layout
) -> None:
    folder = layout.root.parent
    text_file(folder, "t.csv", "a\n1\nx\n")
    text_file(folder, "t.jsonl", '{"a": 1}\n')
    done = railbus_here("dataset", *words, cwd=folder)
    assert (done.status, said in done.err) == (status, True), done.err


def test_samples_are_shown_as_what_they_are(layout: Layout) -> None:
    folder = layout.root.parent
    out = railbus_here("dataset", "sample", "squares", "-n", "2", "--from", "3", cwd=folder).out
    assert [line.split() for line in out.splitlines()] == [
        ["SAMPLE", "x", "y"],
        ["3", "[6,", "7]", "0"],
        ["4", "[8,", "9]", "1"],
    ]
    found = railbus_here("dataset", "sample", "squares", "--split", "test", "--json", cwd=folder).json()
    assert found == [{"sample": 8, "x": [16, 17], "y": 2}, {"sample": 9, "x": [18, 19], "y": 0}]
    text_file(folder, "poem.txt", "roses are red\n" * 300)
    for tokenizer in ("char", "byte", "bpe"):
        words = ("--name", tokenizer, "--tokenizer", tokenizer, "--block", "8", "--vocab-size", "300")
        assert railbus_here("dataset", "import", "poem.txt", *words, cwd=folder).status == 0
        assert "roses" in railbus_here("dataset", "sample", tokenizer, "--from", "0", "-n", "20", cwd=folder).out


def test_pictures_are_drawn_as_a_sheet(tmp_path: Path) -> None:
    from PIL import Image

    assert railbus_here("dataset", "import", "digits", cwd=tmp_path).status == 0
    done = railbus_here("dataset", "sample", "digits", "-n", "10", "--png", "sheet.png", cwd=tmp_path)
    assert (done.status, done.out) == (0, ""), done.err
    assert "drew 10 samples of 'image' into sheet.png" in done.err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.width, sheet.height) == (8 * 100 + 4, 2 * 100 + 4)
        colours = sheet.convert("L").getcolors()
    assert colours is not None
    assert len(colours) > 10


def test_statistics_are_those_of_the_values(layout: Layout) -> None:
    folder = layout.root.parent
    told = railbus_here("dataset", "stats", "squares", "--json", cwd=folder).json()
    x, y = np.arange(20.0), np.arange(10) % 3
    assert isinstance(told, dict)
    assert told["columns"]["x"] == {
        "samples": 10, "min": 0, "max": 19, "mean": pytest.approx(x.mean()), "std": pytest.approx(x.std()), "nan": 0
    }  # fmt: skip
    assert told["columns"]["y"]["classes"] == {"0": 4, "1": 3, "2": 3}
    assert told["columns"]["y"]["std"] == pytest.approx(y.std())
    assert "40.0%" in railbus_here("dataset", "stats", "squares", cwd=folder).out


def test_an_export_is_told_and_comes_back(layout: Layout) -> None:
    folder = layout.root.parent
    done = railbus_here("dataset", "export", "squares", "out", "--to", "webdataset", "--json", cwd=folder)
    assert done.json() == {"dataset": "squares", "format": "webdataset", "path": "out", "samples": 10}
    assert railbus_here("dataset", "import", "out", "--name", "again", cwd=folder).status == 0
    one, other = (
        railbus_here("dataset", "sample", name, "-n", "10", "--json", cwd=folder).json()
        for name in ("squares", "again")
    )
    assert one == other


def test_a_damaged_shard_is_repaired_from_its_source_and_from_no_other(tmp_path: Path) -> None:
    text_file(tmp_path, "t.csv", "x\n" + "".join(f"{n}\n" for n in range(1000)))
    assert railbus_here("dataset", "import", "t.csv", "--shard-bytes", "1kB", cwd=tmp_path).status == 0
    assert "needs no repair" in railbus_here("dataset", "repair", "t", "--from", "t.csv", cwd=tmp_path).out
    shards = sorted((tmp_path / "learning/datasets/t/shards").iterdir())
    before = [path.read_bytes() for path in shards]
    shards[1].write_bytes(before[1][:-1] + bytes([before[1][-1] ^ 1]))
    shards[3].unlink()
    done = railbus_here("dataset", "verify", "t", cwd=tmp_path)
    assert (done.status, done.err.count("shard-0000")) == (6, 2)
    words = ("dataset", "repair", "t", "--shard-bytes", "1kB", "--from")
    text_file(tmp_path, "other.csv", "x\n" + "".join(f"{n + 1}\n" for n in range(1000)))
    assert railbus_here(*words, "other.csv", cwd=tmp_path).status != 0
    done = railbus_here(*words, "t.csv", cwd=tmp_path)
    assert (done.status, "repaired t: 2 of" in done.out) == (0, True), done.err
    assert [path.read_bytes() for path in shards] == before


def test_a_dataset_that_was_appended_to_is_repaired_from_all_its_sources_or_from_a_copy(tmp_path: Path) -> None:
    for number, name in enumerate(("a.csv", "b.csv", "c.csv")):
        text_file(tmp_path, name, "x\n" + "".join(f"{n * 3 + number}\n" for n in range(300)))
    size = ("--shard-bytes", "1kB")
    assert railbus_here("dataset", "import", "a.csv", "--name", "t", *size, cwd=tmp_path).status == 0
    for name in ("b.csv", "c.csv"):
        assert railbus_here("dataset", "append", "t", name, *size, cwd=tmp_path).status == 0
    folder = tmp_path / "learning/datasets/t"
    shutil.copytree(folder, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
    names = sorted(before)

    def damage() -> None:
        for name in (names[0], names[-1], names[len(names) // 2]):
            (folder / "shards" / name).write_bytes(b"x")

    damage()
    words = ("dataset", "repair", "t", *size, "--from")
    one = railbus_here(*words, "b.csv", cwd=tmp_path)
    assert (one.status, f"do not give {names[0]}, {names[-1]}" in one.err) == (6, True), one.err
    assert (folder / "shards" / names[len(names) // 2]).read_bytes() == before[names[len(names) // 2]]
    rest = railbus_here(*words, "a.csv", "--from", "b.csv", "--from", "c.csv", cwd=tmp_path)
    assert (rest.status, "repaired t: 2 of" in rest.out) == (0, True), rest.err
    assert {path.name: path.read_bytes() for path in (folder / "shards").iterdir()} == before
    damage()
    assert railbus_here(*words, "copy", cwd=tmp_path).status == 0
    assert {path.name: path.read_bytes() for path in (folder / "shards").iterdir()} == before


def test_more_samples_make_a_new_version(layout: Layout) -> None:
    folder = layout.root.parent
    text_file(folder, "more.jsonl", '{"x": [1.5, 2], "y": 1}\n{"x": [0, 0], "y": 2}\n')
    done = railbus_here("dataset", "append", "squares", "more.jsonl", cwd=folder)
    assert (done.status, "appended 2 samples to squares: version 2, 12 samples" in done.out) == (0, True), done.err
    found = railbus_here("dataset", "sample", "squares", "--from", "8", "--split", "train", "--json", cwd=folder).json()
    assert found == [{"sample": 10, "x": [1.5, 2], "y": 1}, {"sample": 11, "x": [0, 0], "y": 2}]
    assert railbus_here("dataset", "verify", "squares", cwd=folder).status == 0
