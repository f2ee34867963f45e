"""Versions of a dataset: an append adds shards, older versions stay, and a reader always finds a whole one."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import small_datasets
from railbus_shared.contracts.artifacts import SampleRange, Split
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.shard_paths import ShardPaths
from railbus_shared.data.writer import append_dataset
from railbus_shared.errors import DatasetNotFound, IndexInvalid, InvalidField, InvalidName, NotFound
from railbus_shared.layout import Layout
from until import PATIENCE_S


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def further(start: int, stop: int) -> small_datasets.Arrays:
    return {name: array[start:stop] for name, array in small_datasets.arrays(stop).items()}


def append(layout: Layout, start: int, stop: int, *, split: str = "train", num_shards: int = 1) -> DatasetIndex:
    """Samples that go on with the numbers of those that are there."""
    held = further(start, stop)
    size = sum(array.nbytes for array in held.values())
    return append_dataset(layout, "d", [held], split=split, shard_bytes=-(-size // num_shards))


def test_appended_samples_follow_the_others_in_shards_of_their_own(layout: Layout) -> None:
    small_datasets.write(layout, 30, num_shards=2)
    index = append(layout, 30, 75, num_shards=3)
    assert [shard.file for shard in index.file.shards] == [f"shard-{number:05d}.data" for number in range(5)]
    assert [shard.first_sample for shard in index.file.shards] == [0, 15, 30, 45, 60]
    found = small_datasets.read(layout, index)
    for name, expected in small_datasets.arrays(75).items():
        assert np.array_equal(found[name], expected)
    assert DatasetIndex.load(layout.dataset("d")) == index


def test_an_append_is_a_new_version_that_names_the_one_before(layout: Layout) -> None:
    first = small_datasets.write(layout, 30)
    second = append(layout, 30, 40)
    third = append(layout, 40, 50)
    assert [index.file.version for index in (first, second, third)] == [1, 2, 3]
    assert [index.file.parent_sha256 for index in (first, second, third)] == [None, first.sha256, second.sha256]


def test_older_versions_stay_as_they_were_and_can_be_read(layout: Layout) -> None:
    first = small_datasets.write(layout, 30, num_shards=2)
    before = tree(layout.dataset("d"))
    second = append(layout, 30, 40)
    append(layout, 40, 50, split="test")
    after = tree(layout.dataset("d"))
    for name, data in before.items():
        assert after[name if name.startswith("shards/") else f"versions/000001/{name}"] == data
    assert DatasetIndex.load(layout.dataset("d"), version=1) == first
    assert DatasetIndex.load(layout.dataset("d"), version=2) == second
    assert small_datasets.read(layout, first)["id"].tolist() == list(range(30))
    with pytest.raises(NotFound, match="version has value 7"):
        DatasetIndex.load(layout.dataset("d"), version=7)


def test_a_version_is_found_by_its_hash_wherever_it_lies_by_now(layout: Layout) -> None:
    versions = [small_datasets.write(layout, 10), append(layout, 10, 14), append(layout, 14, 20)]
    for version in versions:
        found = DatasetIndex.read_exactly(layout.schema("d"), layout.index("d"), sha256=version.sha256)
        assert (found.sha256, found.schema) == (version.sha256, version.schema)
        paths = ShardPaths(found.file, layout.shards("d"))
        assert all(path.exists() for path in paths.values())
        assert len(paths) == len(version.file.shards)
    with pytest.raises(IndexInvalid, match="it was replaced meanwhile"):
        DatasetIndex.read_exactly(layout.schema("d"), layout.index("d"), sha256="0" * 64)


@pytest.mark.parametrize("number", [-1, 1])
def test_a_shard_that_the_index_does_not_have_has_no_path(layout: Layout, number: int) -> None:
    paths = ShardPaths(small_datasets.write(layout, 10).file, layout.shards("d"))
    assert number not in paths
    with pytest.raises(KeyError):
        paths[number]


def test_a_split_grows_by_a_run_or_is_new(layout: Layout) -> None:
    small_datasets.write(layout, 30, test=10)
    assert append(layout, 30, 35, split="test").schema.splits["test"] == Split(first=20, samples=15)
    grown = append(layout, 35, 42, split="train").schema.splits
    runs = (SampleRange(first=0, samples=20), SampleRange(first=35, samples=7))
    assert grown["train"] == Split(first=0, samples=27, ranges=runs)
    assert append(layout, 42, 50, split="train").schema.splits["train"].runs == (
        SampleRange(first=0, samples=20),
        SampleRange(first=35, samples=15),
    )
    splits = append(layout, 50, 51, split="validation").schema.splits
    assert splits["validation"] == Split(first=50, samples=1)
    assert splits["test"] == Split(first=20, samples=15)


@pytest.mark.parametrize("given", ["no chunk", "an empty chunk"])
def test_nothing_cannot_be_appended(given: str, layout: Layout) -> None:
    small_datasets.write(layout, 30)
    before = tree(layout.datasets)
    with pytest.raises(InvalidField, match="nothing to append"):
        append_dataset(layout, "d", [] if given == "no chunk" else [further(30, 30)], split="train")
    assert tree(layout.datasets) == before


def test_an_append_that_does_not_fit_changes_nothing(layout: Layout) -> None:
    small_datasets.write(layout, 30)
    before = tree(layout.datasets)
    with pytest.raises(InvalidField):
        append_dataset(layout, "d", [{"id": further(30, 31)["id"]}], split="train")
    with pytest.raises(InvalidName):
        append_dataset(layout, "d", [further(30, 31)], split="../x")
    assert tree(layout.datasets) == before


def test_nothing_is_appended_to_a_dataset_that_is_not_there(layout: Layout) -> None:
    with pytest.raises(DatasetNotFound):
        append(layout, 0, 10)
    assert list(layout.datasets.iterdir()) == []


def test_a_reader_finds_a_pair_while_the_schema_is_newer_than_the_index(layout: Layout) -> None:
    first = small_datasets.write(layout, 30)
    older = layout.index("d").read_bytes()
    second = append(layout, 30, 40)
    newer = layout.index("d").read_bytes()
    layout.index("d").write_bytes(older)
    assert DatasetIndex.load(layout.dataset("d")) == first
    layout.index("d").write_bytes(newer)
    assert DatasetIndex.load(layout.dataset("d")) == second


# --- crashes ---------------------------------------------------------------------------------------------------------

KILLED_AT_EVERY_STEP = """
import itertools, os, signal, sys
from pathlib import Path
import small_datasets
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.writer import append_dataset
from railbus_shared.layout import Layout

STEPS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}

def append(layout):
    held = {name: array[30:] for name, array in small_datasets.arrays(70).items()}
    return append_dataset(layout, "d", [held], split="train", shard_bytes=330)

def append_and_die(layout, at):
    seen = itertools.count()
    def hook(event, args):
        if event in STEPS and next(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    append(layout)

found = set()
for step in itertools.count():
    layout = Layout(Path(sys.argv[1]) / str(step))
    small_datasets.write(layout, 30)
    if (pid := os.fork()) == 0:
        append_and_die(layout, step)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    index = DatasetIndex.load(layout.dataset("d"))
    index.check_files(layout.shards("d"))
    ids = small_datasets.read(layout, index)["id"].tolist()
    assert (index.file.version, ids) in ((1, list(range(30))), (2, list(range(70)))), (index.file.version, ids)
    found.add(index.file.version)
    if index.file.version == 1:
        append(layout)
    assert DatasetIndex.load(layout.dataset("d"), version=1).file.samples == 30
    if status == 0:
        print(step, *sorted(found))
        break
"""

APPENDER = """
import sys
from pathlib import Path
import small_datasets
from railbus_shared.data.writer import append_dataset
from railbus_shared.layout import Layout

def chunks():
    yield {name: array[30:] for name, array in small_datasets.arrays(40).items()}
    print("halfway", flush=True)
    sys.stdin.readline()

print(append_dataset(Layout(Path(sys.argv[1])), "d", chunks(), split="train").file.version)
"""

READER = """
import sys
from pathlib import Path
from railbus_shared.data.index import DatasetIndex

seen = set()
print("ready", flush=True)
while max(seen, default=0) < 12:
    index = DatasetIndex.load(Path(sys.argv[1]) / "datasets" / "d")
    assert index.file.samples == 20 + 10 * index.file.version
    seen.add(index.file.version)
print(len(seen))
"""


def python(code: str, root: Path, *, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A process that runs a script of ours."""
    environment = os.environ | {"PYTHONPATH": str(Path(small_datasets.__file__).parent)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environment
    )


@pytest.mark.timeout(60)  # two writes and their flushes for each of some eighty steps
def test_an_append_killed_at_any_step_leaves_the_old_or_the_new_version(tmp_path: Path) -> None:
    with python(KILLED_AT_EVERY_STEP, tmp_path) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    num_steps, *versions = map(int, out.split())
    assert num_steps > 40
    assert versions == [1, 2]
    expected = tree(tmp_path / "0" / "datasets")
    for step in range(num_steps):
        found = tree(tmp_path / str(step) / "datasets")
        assert {name: data for name, data in found.items() if "/.import/" not in name} == expected


def test_two_appenders_wait_for_each_other(layout: Layout) -> None:
    small_datasets.write(layout, 30)
    with python(APPENDER, layout.root, stdin=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "halfway\n"
        with python(APPENDER, layout.root) as other:
            assert other.stdout is not None
            assert select.select([other.stdout], [], [], 1.0)[0] == []
            outs = [one.communicate("\n", timeout=PATIENCE_S)[0], other.communicate(timeout=PATIENCE_S)[0]]
    assert [out.split()[-1] for out in outs] == ["2", "3"]
    assert DatasetIndex.load(layout.dataset("d")).file.samples == 50


def test_a_reader_beside_appends_always_finds_a_whole_version(layout: Layout) -> None:
    small_datasets.write(layout, 30)
    with python(READER, layout.root) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for start in range(30, 140, 10):
            append(layout, start, start + 10)
        out, err = reader.communicate(timeout=PATIENCE_S)
    assert reader.returncode == 0, err
    assert int(out) >= 2
