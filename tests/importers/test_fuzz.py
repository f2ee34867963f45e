"""Files that were damaged anywhere are refused by an error of ours, or read; no other error, nothing that hangs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from importers_for_tests import picture_file
from railbus.importers.choosing import opened
from railbus.importers.source import Options, num_samples
from railbus_shared.errors import RailbusError

FIXTURES = Path(__file__).parents[1] / "interop/fixtures"
BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same damage every time: what a longer search finds becomes a test of its own
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def source(name: str, folder: Path) -> tuple[Path, Path]:
    """A source in a folder, and the file of it that is damaged."""
    if name in {"t.npz", "t.npy", "t.csv", "t.jsonl", "t.txt", "images"}:
        return made(name, folder)
    path, damaged = name.split("/", 1)
    shutil.copytree(FIXTURES / path, folder / path)
    return folder / path, folder / path / damaged


def made(name: str, folder: Path) -> tuple[Path, Path]:
    path = folder / name
    match name:
        case "t.npz":
            np.savez(path, a=np.arange(20), b=np.ones((20, 3), np.float32))
        case "t.npy":
            np.save(path, np.arange(20))
        case "t.csv":
            path.write_text("a,word,label\n" + "".join(f"{number},w{number},x\n" for number in range(9)))
        case "t.jsonl":
            path.write_text("".join(f'{{"a": {number}, "v": [{number}, 1.5], "t": "x"}}\n' for number in range(9)))
        case "t.txt":
            path.write_text("some text, ä little of it\n" * 20)
        case _:
            picture_file(folder / "images/a/1.png")
            return path, folder / "images/a/1.png"
    return path, path


SOURCES = (
    "t.npz",
    "t.npy",
    "t.csv",
    "t.jsonl",
    "t.txt",
    "images",
    "webdataset/train-000000.tar.gz",
    "mds/index.json",
    "mds/shard.00000.mds",
    "mds-zstd/shard.00001.mds.zstd",
    "saved/dataset_dict.json",
    "saved/train/state.json",
    "saved/train/data-00000-of-00001.arrow",
    "parquet/train-00000-of-00001.parquet",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.mark.parametrize("name", SOURCES)
@BOUNDED
@given(data=st.data())
def test_damage_anywhere_is_an_error_of_ours_or_none(name: str, data: st.DataObject, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        path, damaged = source(name, Path(inside))
        whole = damaged.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1), label="at")
        new = data.draw(st.binary(max_size=8), label="new")
        cut = data.draw(st.sampled_from([len(new), len(new), 1, 0, len(whole)]), label="instead of")
        damaged.write_bytes(whole[:at] + new + whole[at + cut :])
        scratch = Path(inside) / "scratch"
        scratch.mkdir()
        try:
            found = opened(path, Options(scratch=scratch, max_bytes=1 << 22, block=8, decode=(4, 4)))
            assert sum(map(num_samples, found.chunks())) == found.outline.samples
        except RailbusError:
            pass
