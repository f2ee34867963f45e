"""Memory of an attempt: how much it may have, and that the kernel ends one that takes more and counts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus_runner.cgroups import GroupTree, discover
from railbus_runner.memory_limit import limit_memory, memory_of
from railbus_runner.premises import make_premises
from railbus_runner.workdirs import Workdirs
from railbus_shared.contracts.devices import DeviceInfo
from until import PATIENCE_S

LIMIT = 64 << 20
HOARD = "held = []\nwhile True: held.append(b'z' * (4 << 20))"


def device(kind: str, memory_bytes: int) -> DeviceInfo:
    return DeviceInfo.model_validate(
        {"id": "h-x", "host": "h", "kind": kind, "name": "x", "index": 0, "memory_bytes": memory_bytes}
    )


def test_cpu_slots_bring_their_memory_and_gpus_bring_none_of_the_hosts() -> None:
    assert memory_of([device("cpu", 3), device("cpu", 4)]) == 7
    assert memory_of([device("cpu", 3), device("gpu", 4)]) is None
    assert memory_of([device("cpu", 0)]) is None
    assert memory_of([]) is None


@pytest.mark.parametrize(
    ("files", "written"),
    [
        (("memory.max", "memory.swap.max"), ("100", "0")),
        (("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), ("100", "100")),
    ],
)
def test_the_limit_is_on_memory_and_swap_together_in_either_version(
    tmp_path: Path, files: tuple[str, str], written: tuple[str, str]
) -> None:
    for name in files:
        (tmp_path / name).write_text("max")
    assert limit_memory([tmp_path / "other", tmp_path], 100)
    assert tuple((tmp_path / name).read_text() for name in files) == written


def test_where_nothing_can_be_limited_that_is_said(tmp_path: Path) -> None:
    assert not limit_memory([tmp_path], 100)


@pytest.fixture
def tree() -> Iterator[GroupTree]:
    found = discover(f"test-memory-{os.getpid()}")
    if found is None:
        pytest.skip("no control group can be written here")
    yield found
    for group in found.groups().values():
        group.kill()
        group.remove()
    for folder in found.folders:
        folder.rmdir()


@pytest.mark.root
def test_an_attempt_that_takes_more_than_its_slot_has_is_killed_by_the_kernel_and_counted(
    tree: GroupTree, tmp_path: Path
) -> None:
    workdirs = Workdirs(tmp_path / "work", allowed=())
    place = make_premises("j-1.1", workdirs=workdirs, wanted=None, groups=tree, devices=[device("cpu", LIMIT)])
    if place.memory_bytes is None:
        pytest.skip("no control group here limits memory")

    def join() -> None:
        for path in place.procs_files:
            Path(path).write_text("0")

    assert place.oom_kills() == 0
    command = [sys.executable, "-I", "-S", "-c", HOARD]
    with subprocess.Popen(command, preexec_fn=join) as process:  # noqa: PLW1509 - joins before it runs
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert place.memory_bytes == LIMIT
    assert place.oom_kills() == 1
    place.clear(deadline_s=PATIENCE_S)
    assert tree.groups() == {}
    assert place.oom_kills() == 1
