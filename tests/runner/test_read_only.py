"""A folder of checkpoints that turns read-only between two steps of a write, as when its file system has failed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints_for_tests import describer, names, pair, store, write
from railbus_runner.checkpointing.disk import write_draft
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.errors import BadSetting
from railbus_shared.layout import Layout, checkpoint_stem


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own for the models."""
    folder = Layout(tmp_path).models
    folder.mkdir()
    done = subprocess.run(["/bin/mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["/bin/umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("moment", ["claimed", "data_published", "committed", "written"])
def test_whatever_a_folder_refuses_from_some_moment_on_it_is_named(tmp_path: Path, mounted: Path, moment: str) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    made = store(tmp_path)

    def reach(step: str) -> None:
        if step == moment:
            subprocess.run(["/bin/mount", "-o", "remount,ro", str(mounted)], check=True)

    def produce(number: int) -> tuple[CheckpointFile]:
        reach("claimed")
        path = made.folder / f"{checkpoint_stem(number)}.pt"
        sha256 = write_draft(path, memoryview(b"data"), nbytes=4)
        files.publish(files.temporary_path(path), path)
        return (CheckpointFile(file=path.name, bytes=4, sha256=sha256),)

    def describe(number: int, data: tuple[CheckpointFile, ...]) -> CheckpointMeta:
        reach("data_published")
        return describer(step=3)(number, *data)

    def write_and_retain() -> None:
        made.write_files(produce, describe=describe, commit=lambda _meta: reach("committed"))
        reach("written")
        made.retain(lambda _metas: {1})

    with pytest.raises(BadSetting, match=str(made.folder)):
        write_and_retain()
    assert names(tmp_path) >= pair(1) | pair(2)
