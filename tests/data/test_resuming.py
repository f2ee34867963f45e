"""An import that was killed goes on from the shards it had finished, and ends as one that nothing stopped."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import small_datasets
from railbus_shared.contracts.artifacts import DatasetSchema
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.writer import Chunk, write_dataset
from railbus_shared.errors import InvalidField, StorageFull
from railbus_shared.layout import Layout

SAMPLES = 1000
SHARD_BYTES = 3300
"""A tenth of the samples."""


KILLED = """
import json, os, signal, sys
from pathlib import Path
import small_datasets
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout

def chunks(samples, journal, due):
    held = small_datasets.arrays(samples)
    for at in range(0, samples, 30):
        yield {name: array[at : at + 30] for name, array in held.items()}
    while len(list(journal.glob("shard-*.json"))) < due:
        os.sched_yield()
    os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    wanted = json.loads(line)
    layout = Layout(Path(wanted["root"]))
    if (pid := os.fork()) == 0:
        journal = layout.dataset("d") / ".import" / "journal"
        given = chunks(wanted["after"], journal, wanted["due"])
        write_dataset(layout, small_datasets.schema(10), given, shard_bytes=wanted["shard_bytes"])
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""
Kill = Callable[..., list[str]]


@pytest.fixture(scope="module")
def kill() -> Iterator[Kill]:
    """Begins a write in a process that is killed once so many samples were taken, and the shards of them written."""
    environment = os.environ | {"PYTHONPATH": str(Path(small_datasets.__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answered = process.stdin, process.stdout

        def killed(layout: Layout, *, after: int) -> list[str]:
            """The names of the shards that were finished."""
            due = max(0, (after - 150) // 100)
            wanted = {"root": str(layout.root), "after": after, "due": due, "shard_bytes": SHARD_BYTES}
            print(json.dumps(wanted), file=asked, flush=True)
            assert int(answered.readline()) == signal.SIGKILL
            return [f"shard-{number:05d}.data" for number in range(due)]

        yield killed


def cut(held: small_datasets.Arrays, *, chunk: int = 30) -> Iterator[Chunk]:
    for at in range(0, len(held["id"]), chunk):
        yield {name: array[at : at + chunk] for name, array in held.items()}


def write(layout: Layout, held: small_datasets.Arrays, *, chunk: int = 30) -> DatasetIndex:
    return write_dataset(layout, small_datasets.schema(10), cut(held, chunk=chunk), shard_bytes=SHARD_BYTES)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "killed")


@pytest.fixture
def whole(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "whole")


def assert_alike(layout: Layout, whole: Layout) -> None:
    """Both trees hold the same, and nothing hidden."""
    assert tree(layout.datasets) == tree(whole.datasets)
    assert not [name for name in tree(layout.datasets) if "/." in name]


@pytest.mark.parametrize("after", [0, 100, 251, 500, 740, 1000])
def test_finished_shards_stay_and_the_result_is_that_of_an_import_that_nothing_stopped(
    after: int, kill: Kill, layout: Layout, whole: Layout
) -> None:
    held = small_datasets.arrays(SAMPLES)
    finished = kill(layout, after=after)
    assert len(finished) == max(0, int(after / 100 - 1.5))
    before = inodes(layout.dataset("d") / ".import" / "shards")
    assert not layout.index("d").exists()
    write(layout, held, chunk=41)
    write(whole, held)
    assert_alike(layout, whole)
    after_all = inodes(layout.shards("d"))
    assert {name: after_all[name] for name in finished} == {name: before[name] for name in finished}


@pytest.mark.parametrize("changed", [0, 99, 100, 350, 499, 600])
def test_a_source_that_gives_another_sample_is_imported_as_it_is_now(
    changed: int, kill: Kill, layout: Layout, whole: Layout
) -> None:
    held = small_datasets.arrays(SAMPLES)
    kill(layout, after=700)
    held["id"][changed] = -7
    write(layout, held, chunk=64)
    write(whole, held)
    assert_alike(layout, whole)


@pytest.mark.parametrize("samples", [10, 100, 130, 499, 500, 510, 520, 640, 660, 700, 1234])
def test_a_source_that_ends_elsewhere_is_imported_as_it_is_now(
    samples: int, kill: Kill, layout: Layout, whole: Layout
) -> None:
    kill(layout, after=700)
    held = small_datasets.arrays(samples)
    write(layout, held)
    write(whole, held)
    assert_alike(layout, whole)


@pytest.mark.parametrize("damage", ["flip", "gone", "entry"])
def test_a_finished_shard_that_is_damaged_is_made_again(damage: str, kill: Kill, layout: Layout, whole: Layout) -> None:
    held = small_datasets.arrays(SAMPLES)
    kill(layout, after=700)
    path = layout.dataset("d") / ".import" / "shards" / "shard-00001.data"
    if damage == "flip":
        small_datasets.flip(path)
    elif damage == "gone":
        path.unlink()
    else:
        (layout.dataset("d") / ".import" / "journal" / "shard-00001.data.json").write_text('{"weight": "x"')
    write(layout, held)
    write(whole, held)
    assert_alike(layout, whole)


def test_another_plan_starts_anew(kill: Kill, layout: Layout, whole: Layout) -> None:
    held = small_datasets.arrays(SAMPLES)
    kill(layout, after=700)
    for one in (layout, whole):
        write_dataset(one, small_datasets.schema(10), cut(held), shard_bytes=2 * SHARD_BYTES)
    assert_alike(layout, whole)


def test_an_import_that_is_killed_again_and_again_comes_to_its_end(kill: Kill, layout: Layout, whole: Layout) -> None:
    held = small_datasets.arrays(SAMPLES)
    counts = [len(kill(layout, after=after)) for after in (300, 300, 520, 810, 990)]
    assert counts == sorted(counts)
    write(layout, held)
    write(whole, held)
    assert_alike(layout, whole)


def test_what_was_finished_stays_after_an_interrupt_and_the_spool_goes(layout: Layout, whole: Layout) -> None:
    held = small_datasets.arrays(SAMPLES)

    def chunks() -> Iterator[Chunk]:
        yield from itertools.islice(cut(held), 20)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_dataset(layout, small_datasets.schema(10), chunks(), shard_bytes=SHARD_BYTES)
    hidden = layout.dataset("d") / ".import"
    assert sorted(path.name for path in hidden.iterdir()) == ["journal", "plan.json", "shards"]
    before = inodes(hidden / "shards")
    assert len(before) == 4
    write(layout, held)
    write(whole, held)
    assert_alike(layout, whole)
    assert {name: inodes(layout.shards("d"))[name] for name in before} == before


def test_bad_input_leaves_nothing_of_what_was_finished(layout: Layout) -> None:
    held = small_datasets.arrays(SAMPLES)

    def chunks() -> Iterator[Chunk]:
        yield from cut(held)
        yield {"id": held["id"]}

    with pytest.raises(InvalidField):
        write_dataset(layout, small_datasets.schema(10), chunks(), shard_bytes=SHARD_BYTES)
    assert list(layout.datasets.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["/bin/umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("samples", [20_000, 31_000])
def test_a_full_disk_leaves_nothing_new_and_all_that_is_older(samples: int, small_disk: Path) -> None:
    layout = Layout(small_disk)
    small_datasets.write(layout, 1000, name="older")
    before = tree(layout.datasets)
    schema = DatasetSchema.parse(small_datasets.schema(10).to_map() | {"name": "new"})
    with pytest.raises(StorageFull):
        write_dataset(layout, schema, cut(small_datasets.arrays(samples)), shard_bytes=100_000)
    assert tree(layout.datasets) == before
    assert [path.name for path in layout.datasets.iterdir()] == ["older"]
    assert np.array_equal(
        small_datasets.read(layout, DatasetIndex.load(layout.dataset("older")))["id"], np.arange(1000)
    )
