"""Round trips with other people's formats: their writers and our readers, our writers and their readers.

What they wrote lies in `fixtures/`, so reading it is always tested. The tests that run their code are marked `peers`,
and skip where `make bench-peers` has not been run.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from importers_for_tests import imported, kinds, samples, sizes
from interop.write_with_peers import COUNT, NAMES, png, sample
from railbus.exporting import export_dataset
from railbus.importing import import_dataset
from railbus_shared.data.index import DatasetIndex
from railbus_shared.layout import Layout

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
PYTHON = HERE.parents[1] / ".venv-peers/bin/python"
FORMATS = ("webdataset", "mds", "mds-zstd", "saved", "parquet")
KEPT = ("id", "text", "fix", "var", "label", "image")
"""Columns that every format has."""

peers = [
    pytest.mark.peers,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-peers, which `make bench-peers` makes"),
    pytest.mark.timeout(120),  # importing their packages takes seconds, and several times that on a busy machine
]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def expected() -> dict[str, list[Any]]:
    """What the columns of a format hold after an import."""
    rows = [sample(number) for number in range(COUNT)]
    plain = {name: [row[name] for row in rows] for name in KEPT}
    return {name: [np.asarray(one).tolist() if name in {"fix", "var"} else one for one in values]
            for name, values in plain.items()}  # fmt: skip


def check(index: DatasetIndex, found: Mapping[str, list[Any]]) -> None:
    assert {name: found[name] for name in KEPT} == expected()
    told = kinds(index)
    assert (told["text"], told["fix"], told["var"], told["image"]) == (
        "uint8… utf-8", "float32[3]", "int32…", "uint8… png"
    )  # fmt: skip
    assert index.schema.columns["label"].num_classes == 3


@pytest.mark.parametrize("name", FORMATS)
def test_what_their_writers_wrote_is_read_by_ours(name: str, layout: Layout) -> None:
    index, found = imported(layout, FIXTURES / name)
    check(index, found)
    if name in {"saved", "parquet"}:
        assert sizes(index) == {"train": 3, "test": 2}
        assert index.schema.columns["label"].labels == tuple(NAMES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=peers) for name in FORMATS])
def test_what_their_writers_write_now_is_read_by_ours(name: str, tmp_path: Path, layout: Layout) -> None:
    run("write_with_peers.py", name, tmp_path / "in", cwd=tmp_path)
    check(*imported(layout, tmp_path / "in"))


@pytest.mark.parametrize("to", [pytest.param(to, marks=peers) for to in ("webdataset", "mds", "parquet")])
def test_what_ours_write_is_read_by_their_readers(to: str, tmp_path: Path, layout: Layout) -> None:
    index = import_dataset(layout, str(FIXTURES / "saved"), name="d")
    export_dataset(layout, index, to=to, target=tmp_path / "out")
    found = json.loads(run("read_with_peers.py", to, tmp_path / "out", cwd=tmp_path))
    mine = samples(layout, index, "train")
    assert len(found) == len(mine["id"])
    for row, number in zip(found, mine["id"], strict=True):
        one = sample(number)
        assert (row["id"], row["f"], row["text"], row["fix"]) == (number, one["f"], one["text"], one["fix"].tolist())
        assert row["var"] == one["var"].tolist()
        assert row["label"] == (NAMES[one["label"]] if to == "parquet" else one["label"])
        assert np.unique(row["image"]).tolist() == [number]


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-peers, which `make bench-peers` makes")
@pytest.mark.timeout(120)
def test_folders_of_images_that_ours_write_are_read_by_their_reader(tmp_path: Path, layout: Layout) -> None:
    index = import_dataset(layout, str(FIXTURES / "saved"), name="d")
    export_dataset(layout, index, to="images", target=tmp_path / "out")
    found = json.loads(run("read_with_peers.py", "images", tmp_path / "out", cwd=tmp_path))
    assert sorted((row["label"], np.unique(row["image"]).tolist()) for row in found) == sorted(
        (NAMES[number % 3], [number]) for number in samples(layout, index, "train")["id"]
    )
    assert png(1) in samples(layout, index)["image"]


def run(script: str, *arguments: object, cwd: Path) -> str:
    """Run a script by the Python of the peers, away from every network."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "PYTHONWARNINGS": "ignore"}
    words = [str(PYTHON), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
