"""Ending attempts with and without a control group, and what a restarted runner sweeps."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus_runner import processes
from railbus_runner.cgroups import AttemptGroup, GroupTree, discover
from railbus_runner.forked import COOKIE
from railbus_runner.processes import ProcessId
from railbus_runner.reaping import AttemptLedger, AttemptState, ProcessGroup, reap
from railbus_shared.contracts.devices import AttemptRef
from until import PATIENCE_S

REF = AttemptRef(job="j-1", lease_epoch=3)
OTHER = AttemptRef(job="j-2", lease_epoch=1)

FAMILY = """
import os, subprocess, sys, time
child = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
def forked():
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.write(writing, b"!")
        time.sleep(60)
    os.read(reading, 1)
    return pid
pids = [os.getpid(), subprocess.Popen(child).pid, subprocess.Popen(child, start_new_session=True).pid, forked()]
sys.stdout.write(" ".join(map(str, pids)) + "\\n")
sys.stdout.flush()
sys.stdout.close()
os.close(1)
sys.stdin.readline()
"""


class Family:
    """A trainer with a child, a child that left its session, and one that did so without an exec."""

    def __init__(self, *, cookie: str = "", group: AttemptGroup | None = None) -> None:
        def join() -> None:
            for path in group.procs_files if group is not None else ():
                Path(path).write_text("0")

        env = {"PATH": os.environ["PATH"], **({COOKIE: cookie} if cookie else {})}
        command = [sys.executable, "-I", "-S", "-c", FAMILY]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=env,
            start_new_session=True,
            preexec_fn=join,  # noqa: PLW1509 - joins before its first fork
        )
        assert self.process.stdout is not None
        with self.process.stdout:
            self.pids = [int(pid) for pid in self.process.stdout.readline().split()]
        self.ids = {info.id for pid in self.pids if (info := processes.process_info(pid)) is not None}
        assert len(self.ids) == 4

    @property
    def alive(self) -> list[int]:
        return [process.pid for process in self.ids if (i := processes.process_info(process.pid)) and i.id == process]

    def kill_leader(self) -> None:
        """As when the trainer dies and leaves its children."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for process in self.ids:
            processes.kill_exactly(process)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def family(*, cookie: str = "", group: AttemptGroup | None = None) -> Iterator[Family]:
    made = Family(cookie=cookie, group=group)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def ledger(tmp_path: Path) -> AttemptLedger:
    return AttemptLedger(tmp_path / "attempts")


@pytest.fixture
def tree() -> Iterator[GroupTree]:
    found = discover(f"test-reaping-{os.getpid()}", controllers=("freezer", "pids"))
    if found is None:
        pytest.skip("no control group can be written here")
    yield found
    for group in found.groups().values():
        group.kill()
        group.remove()
    for folder in found.folders:
        folder.rmdir()


def test_without_a_group_the_whole_family_of_a_living_trainer_dies(ledger: AttemptLedger) -> None:
    with family() as trainer:
        state = ledger.add(REF, pid=trainer.pids[0], group=None)
        assert reap(state, deadline_s=PATIENCE_S).is_gone
        assert trainer.alive == []


def test_without_a_group_or_a_cookie_the_session_of_a_dead_trainer_dies(ledger: AttemptLedger) -> None:
    with family() as trainer:
        state = ledger.add(REF, pid=trainer.pids[0], group=None)
        trainer.kill_leader()
        assert reap(state, deadline_s=PATIENCE_S).is_gone
        assert sorted(trainer.alive) == sorted(trainer.pids[2:])  # what left the session, nothing can tell


def test_by_the_cookie_those_that_left_the_session_of_a_dead_trainer_die_too(ledger: AttemptLedger) -> None:
    with family(cookie="c0ffee/j-1.3") as trainer:
        trainer.kill_leader()
        state = AttemptState(
            job="j-1",
            lease_epoch=3,
            pid=trainer.pids[0],
            start_ticks=min(trainer.ids).start_ticks,
            cookie="c0ffee",
            started_at="2026-01-01T00:00:00.000000000Z",
            boot=processes.boot_id(),
        )
        assert reap(state, deadline_s=PATIENCE_S).is_gone
        assert trainer.alive == []


@pytest.mark.parametrize(("cookie", "is_orphaned"), [("c0ffee/j-2.1", False), ("c0ffee", False), ("decaf/j-1.3", True)])
def test_what_belongs_to_another_attempt_or_runner_is_left_alone(cookie: str, is_orphaned: bool) -> None:
    with family(cookie=cookie) as bystander:
        state = AttemptState(
            job="j-1",
            lease_epoch=3,
            pid=2**22 - 1,
            start_ticks=1,
            cookie="c0ffee",
            started_at="2026-01-01T00:00:00.000000000Z",
            boot=processes.boot_id(),
        )
        assert reap(state, deadline_s=1, is_orphaned=is_orphaned).is_gone
        assert sorted(bystander.alive) == sorted(bystander.pids)


def test_a_process_that_merely_has_the_pid_is_left_alone(ledger: AttemptLedger) -> None:
    with family() as bystander:
        pid = bystander.pids[0]
        ticks = processes.start_ticks(pid)
        assert ticks is not None
        state = ledger.add(REF, pid=pid, group=None).changed(start_ticks=ticks - 100)
        assert reap(state, deadline_s=1).is_gone
        assert not processes.kill_exactly(ProcessId(pid, ticks - 100))
        assert sorted(bystander.alive) == sorted(bystander.pids)


def test_a_member_that_was_seen_is_remembered_when_its_parent_is_gone() -> None:
    with family() as trainer:
        pid = trainer.pids[0]
        group = ProcessGroup(ProcessId(pid, processes.start_ticks(pid) or 0))
        assert {process.pid for process in group.members()} == set(trainer.pids)
        trainer.kill_leader()
        assert {process.pid for process in group.members()} == set(trainer.pids[1:])
        group.kill()
        until_s = time.monotonic() + PATIENCE_S
        while group.members():
            assert time.monotonic() < until_s
            time.sleep(0.01)
        assert trainer.alive == []


def test_a_process_that_outlives_sigkill_is_named_and_its_attempt_is_kept(ledger: AttemptLedger) -> None:
    """A deadline that has passed already stands in for a process that is stuck in the kernel."""
    with family() as trainer:
        ledger.add(REF, pid=trainer.pids[0], group=None)
        report = ledger.reap(REF, deadline_s=-1)
        assert set(report.stuck) == set(trainer.pids)
        assert not report.is_gone
        assert [state.ref for state in ledger.states()] == [REF]
        assert ledger.reap(REF, deadline_s=PATIENCE_S).is_gone
        assert ledger.states() == []


def test_what_an_attempt_leaves_behind_is_named_but_not_helpers_that_end_by_themselves(ledger: AttemptLedger) -> None:
    helper = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)", "multiprocessing.spawn"]
    with family() as trainer, subprocess.Popen(helper, start_new_session=True) as away:
        ledger.add(REF, pid=trainer.pids[0], group=None)
        report = ledger.reap(REF, deadline_s=PATIENCE_S)
        assert {one.pid for one in report.leaked} == set(trainer.pids[1:])
        assert all("time.sleep(60)" in one.command for one in report.leaked)
        assert all(len(one.command) <= 300 for one in report.leaked)
        away.kill()
    assert ledger.reap(REF, deadline_s=0).leaked == ()


def test_an_attempt_that_is_not_recorded_has_nothing_to_reap(ledger: AttemptLedger) -> None:
    assert ledger.reap(REF, deadline_s=0).is_gone


def test_a_trainer_that_died_before_it_was_recorded_can_be_reaped(ledger: AttemptLedger) -> None:
    with family() as trainer:
        trainer.kill_leader()
        state = ledger.add(REF, pid=trainer.pids[0], group=None)
        assert (state.start_ticks, state.cookie) == (0, "")
        assert ledger.reap(REF, deadline_s=PATIENCE_S).is_gone
        assert trainer.pids[1] not in trainer.alive


def test_an_attempt_is_one_file_that_only_its_owner_reads(ledger: AttemptLedger, tmp_path: Path) -> None:
    with family(cookie="c0ffee") as trainer:
        state = ledger.add(REF, pid=trainer.pids[0], group=AttemptGroup((tmp_path / "group",)))
        path = tmp_path / "attempts" / "j-1.3.json"
        assert list(path.parent.iterdir()) == [path]
        assert path.stat().st_mode & 0o777 == 0o600
        assert AttemptState.parse(json.loads(path.read_bytes())) == state
        assert (state.pid, state.cookie, state.cgroups) == (trainer.pids[0], "c0ffee", (str(tmp_path / "group"),))
        assert ledger.states() == [state]
        ledger.remove(REF)
        ledger.remove(REF)
        assert list(path.parent.iterdir()) == []


def test_a_new_runner_sweeps_what_the_former_one_left(ledger: AttemptLedger, tmp_path: Path) -> None:
    with family(cookie="c0ffee") as first, family(cookie="c0ffee") as second:
        ledger.add(REF, pid=first.pids[0], group=None)
        ledger.add(OTHER, pid=second.pids[0], group=None)
        first.kill_leader()
        restarted = AttemptLedger(tmp_path / "attempts")
        assert restarted.sweep(deadline_s=PATIENCE_S) == [REF, OTHER]
        assert first.alive == []  # those that left the session of a dead trainer too: they carry the cookie
        assert second.alive == []
        assert restarted.states() == []
        assert restarted.sweep(deadline_s=PATIENCE_S) == []


def test_what_cannot_be_killed_is_not_reported_as_swept(ledger: AttemptLedger) -> None:
    with family() as trainer:
        ledger.add(REF, pid=trainer.pids[0], group=None)
        assert ledger.sweep(deadline_s=-1) == []
        assert [state.ref for state in ledger.states()] == [REF]


def test_an_attempt_of_an_earlier_boot_is_gone_and_nothing_is_killed_for_it(
    ledger: AttemptLedger, tmp_path: Path
) -> None:
    with family() as bystander:
        state = ledger.add(REF, pid=bystander.pids[0], group=None)
        path = tmp_path / "attempts" / "j-1.3.json"
        path.write_text(json.dumps({**state.to_map(), "boot": "another"}))
        assert ledger.sweep(deadline_s=PATIENCE_S) == [REF]
        assert sorted(bystander.alive) == sorted(bystander.pids)
        assert not path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": "j-9"}', '{"job": "../x", "lease_epoch": 1}'])
def test_a_file_that_is_none_of_ours_is_reported_and_left(
    ledger: AttemptLedger, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "attempts"
    folder.mkdir()
    (folder / "j-9.1.json").write_text(content)
    (folder / ".j-8.1.json.1-2.tmp").write_text("litter")
    assert ledger.sweep(deadline_s=1) == []
    assert "not the file of an attempt" in caplog.text
    assert (folder / "j-9.1.json").read_text() == content


def test_a_folder_that_does_not_exist_has_no_attempts(ledger: AttemptLedger) -> None:
    assert (ledger.states(), ledger.sweep(deadline_s=1)) == ([], [])


@pytest.mark.root
def test_by_its_group_everything_of_a_dead_trainer_dies(ledger: AttemptLedger, tree: GroupTree) -> None:
    group = tree.create("j-1.3")
    with family(group=group) as trainer:
        ledger.add(REF, pid=trainer.pids[0], group=group)
        trainer.kill_leader()
        assert ledger.reap(REF, deadline_s=PATIENCE_S).is_gone
        assert trainer.alive == []
    assert tree.groups() == {}


@pytest.mark.root
def test_a_new_runner_sweeps_groups_with_and_without_a_file(
    ledger: AttemptLedger, tree: GroupTree, tmp_path: Path
) -> None:
    recorded, forgotten = tree.create("j-1.3"), tree.create("j-2.1")
    with family(group=recorded) as first, family(group=forgotten) as second:
        ledger.add(REF, pid=first.pids[0], group=recorded)
        first.kill_leader()
        second.kill_leader()
        assert AttemptLedger(tmp_path / "attempts").sweep(deadline_s=PATIENCE_S, tree=tree) == [REF]
        assert (first.alive, second.alive) == ([], [])
    assert tree.groups() == {}


@pytest.mark.root
def test_a_group_that_vanished_is_no_hindrance(ledger: AttemptLedger, tree: GroupTree) -> None:
    group = tree.create("j-1.3")
    with family() as trainer:
        ledger.add(REF, pid=trainer.pids[0], group=group)
        group.remove()
        assert ledger.reap(REF, deadline_s=PATIENCE_S).is_gone
        assert trainer.alive == []
