"""Control groups: the parsing as tables, the rest with real groups where they can be made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from railbus_runner import oom
from railbus_runner.cgroups import AttemptGroup, GroupTree, discover
from railbus_runner.hierarchies import parse_memberships, parse_mounts, places
from until import PATIENCE_S

UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
FREEZER = "33 24 0:29 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer"
CPU = "34 24 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
NAMESPACED = "30 23 0:26 /docker/ab /sys/fs/cgroup ro - cgroup2 cgroup rw"
BLANK = r"30 23 0:26 / /mnt/a\040b rw - cgroup2 cgroup2 rw"
DISK = "25 1 254:0 / / rw,relatime - ext4 /dev/root rw"


@pytest.mark.parametrize(
    ("mounts", "memberships", "controller", "found"),
    [
        (UNIFIED, "0::/user.slice/a", "", ["/sys/fs/cgroup/user.slice/a", "/sys/fs/cgroup"]),
        (UNIFIED, "0::/", "", ["/sys/fs/cgroup"]),
        (UNIFIED, "0::/../other", "", ["/sys/fs/cgroup"]),
        (UNIFIED, "0::/user.slice/a", "freezer", []),
        (NAMESPACED, "0::/docker/ab", "", ["/sys/fs/cgroup"]),
        (NAMESPACED, "0::/docker/ab/c", "", ["/sys/fs/cgroup/c", "/sys/fs/cgroup"]),
        (NAMESPACED, "0::/docker/xy", "", ["/sys/fs/cgroup"]),
        (BLANK, "0::/g", "", ["/mnt/a b/g", "/mnt/a b"]),
        (f"{FREEZER}\n{HYBRID}", "3:freezer:/f\n0::/u", "", ["/sys/fs/cgroup/unified/u", "/sys/fs/cgroup/unified"]),
        (
            f"{FREEZER}\n{HYBRID}",
            "3:freezer:/f\n0::/u",
            "freezer",
            ["/sys/fs/cgroup/freezer/f", "/sys/fs/cgroup/freezer"],
        ),
        (CPU, "4:cpu,cpuacct:/c:d", "cpu", ["/sys/fs/cgroup/cpu,cpuacct/c:d", "/sys/fs/cgroup/cpu,cpuacct"]),
        (DISK, "0::/", "", []),
        ("", "", "", []),
    ],
)
def test_the_own_group_is_found_and_then_the_root(
    mounts: str, memberships: str, controller: str, found: list[str]
) -> None:
    parsed = list(parse_mounts(f"{DISK}\n{mounts}"))
    assert places(controller, mounts=parsed, memberships=parse_memberships(memberships)) == [Path(p) for p in found]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("low 0\noom 3\noom_kill 2\noom_group_kill 0\n", 2),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n", 5),
        ("oom 3\n", None),
    ],
)
def test_kills_for_memory_are_counted_from_the_group_itself(tmp_path: Path, text: str, count: int | None) -> None:
    (tmp_path / "memory.events").write_text(text)
    assert oom.read_oom_kills(tmp_path / "memory.events") == count
    before = oom.baseline([tmp_path])
    assert before is None or (before.counter.parent == tmp_path) == (count is not None)


def test_only_kills_since_the_group_was_made_count_and_they_outlive_it(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 2\n")
    group = AttemptGroup((), oom.baseline([tmp_path]))
    assert group.oom_kills() == 0
    events.write_text("oom_kill 3\n")
    group.remove()
    events.unlink()
    assert group.oom_kills() == 1


def test_without_a_counter_of_its_own_the_surroundings_count(tmp_path: Path) -> None:
    before = oom.baseline([tmp_path])
    assert before is not None
    assert before.counter.parent != tmp_path
    assert oom.kills_since(before) == 0


# --- with real groups ------------------------------------------------------------------------------------------------

VERSIONS: dict[str, tuple[Literal[1, 2], tuple[str, ...]]] = {
    "version 2": (2, ()),
    "version 2 with memory from where it is": (2, ("memory",)),
    "version 1": (1, ("freezer", "pids")),
    "version 1 without freezer": (1, ("pids",)),
}

FAMILY = """
import os, subprocess, sys, time
child = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
pids = [os.getpid(), subprocess.Popen(child).pid, subprocess.Popen(child, start_new_session=True).pid]
sys.stdout.write(" ".join(map(str, pids)) + "\\n")
sys.stdout.flush()
time.sleep(60)
"""


@pytest.fixture(params=VERSIONS)
def tree(request: pytest.FixtureRequest) -> Iterator[GroupTree]:
    version, controllers = VERSIONS[request.param]
    found = discover(f"test-{os.getpid()}", versions=[version], controllers=controllers)
    if found is None:
        pytest.skip(f"no control group of {request.param} can be written here")
    yield found
    for name, group in found.groups().items():
        group.kill()
        group.remove()
        assert name not in found.groups()
    for folder in found.folders:
        folder.rmdir()


def family(group: AttemptGroup) -> tuple[subprocess.Popen[str], list[int]]:
    """A process in the group with a child and another child that left its session."""

    def join() -> None:
        for path in group.procs_files:
            Path(path).write_text("0")

    command = [sys.executable, "-I", "-S", "-c", FAMILY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=join)  # noqa: PLW1509 - joins before its first fork
    assert process.stdout is not None
    with process.stdout:
        return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.root
def test_a_group_knows_all_its_processes_and_kills_them(tree: GroupTree) -> None:
    group = tree.create("j-1.1")
    assert not group.pids()
    process, pids = family(group)
    with process:
        assert group.pids() == set(pids)
        assert group.pids()
        began_s = time.monotonic()
        assert group.kill(deadline_s=2 * PATIENCE_S) == set()
        assert time.monotonic() - began_s < PATIENCE_S
        assert not group.pids()
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    group.remove()
    assert not any(path.exists() for path in group.paths)
    group.remove()
    assert (group.pids(), group.kill(), group.oom_kills()) == (set(), set(), 0)


@pytest.mark.root
def test_a_group_of_a_former_runner_is_found_by_its_name(tree: GroupTree) -> None:
    process, pids = family(tree.create("j-1.1"))
    with process:
        tree.create("j-2.1")
        found = tree.groups()
        assert sorted(found) == ["j-1.1", "j-2.1"]
        assert found["j-1.1"].pids() == set(pids)
        assert found["j-1.1"].kill() == set()


@pytest.mark.root
def test_groups_that_user_code_made_below_are_killed_and_removed_too(tree: GroupTree) -> None:
    group = tree.create("j-1.1")
    below = AttemptGroup(tuple(path / "own" for path in group.paths))
    for path in below.paths:
        path.mkdir()
    process, pids = family(below)
    with process:
        assert group.pids() == set(pids)
        assert group.kill() == set()
    group.remove()
    assert not any(path.exists() for path in group.paths)


@pytest.mark.root
def test_what_has_left_one_hierarchy_is_killed_by_the_other(tree: GroupTree) -> None:
    if len(tree.folders) < 2:
        pytest.skip("there is one hierarchy")
    group = tree.create("j-1.1")
    process, pids = family(group)
    with process:
        (tree.folders[0] / "cgroup.procs").write_text(str(pids[1]))
        assert group.pids() == set(pids)
        assert group.kill() == set()
        assert process.wait(PATIENCE_S) == -signal.SIGKILL


@pytest.mark.root
def test_a_group_that_is_in_use_is_not_removed(tree: GroupTree) -> None:
    group = tree.create("j-1.1")
    process, _ = family(group)
    with process:
        with pytest.raises(OSError, match="busy"):
            group.remove(deadline_s=0.05)
        assert all(path.exists() for path in group.paths)
        group.kill()


@pytest.mark.root
def test_a_fork_bomb_is_killed(tree: GroupTree) -> None:
    """Processes that replace themselves as fast as they can."""
    group = tree.create("j-1.1")
    code = "import os\nfor _ in range(3): os.fork()\nwhile os.fork() == 0: pass\n"

    def join() -> None:
        for path in group.procs_files:
            Path(path).write_text("0")

    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], preexec_fn=join):  # noqa: PLW1509 - as above
        time.sleep(0.1)
        assert group.kill(deadline_s=PATIENCE_S) == set()
        assert not group.pids()


def test_where_nothing_can_be_made_there_is_no_tree_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert discover("x" * 5000, controllers=("freezer",)) is None  # too long for any file system
    assert "no control group can be used" in caplog.text
