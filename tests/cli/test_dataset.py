"""`railbus dataset` on real files, without a bus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from commands import railbus
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
