"""Making sure that nothing of an attempt is left, and remembering attempts for the runner that comes after a crash.

An attempt has a control group where one can be made; then the kernel knows every member. Else its processes are found
by session, by descent and by the cookie in their environment; the writer of its checkpoints, which is none of these, by
its pid. Both are killed until nothing is left or a deadline
passes; what is left then (a process in uninterruptible sleep) is named, and its device must not be granted.

`AttemptLedger` keeps one file per running attempt, written before user code runs and removed once nothing is left.
The functions block: call them in a thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from railbus_runner import processes
from railbus_runner.cgroups import AttemptGroup, GroupTree
from railbus_runner.forked import COOKIE
from railbus_runner.processes import ProcessId, ProcessInfo
from railbus_shared import clock
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.model import Contract, Id, Items, Time
from railbus_shared.errors import WireError
from railbus_shared.files import fsync_dir, to_json, write_whole

logger = logging.getLogger(__name__)

_POLL_MIN_S: Final = 0.002
_POLL_MAX_S: Final = 0.05
_MAX_COMMAND: Final = 300
_HELPERS: Final = ("railbus_runner.warm", "multiprocessing.", "torch/_inductor/compile_worker")
"""In the command lines of forks of a trainer, and of processes of `multiprocessing` and of torch.compile."""


class AttemptState(Contract):
    """What a runner must know to end an attempt that it did not start itself."""

    job: Id
    lease_epoch: int
    pid: int
    """Of the trainer, which leads its session."""
    start_ticks: int
    """When it started, by which a later holder of the pid is told apart; 0 if it was reaped before we asked."""
    writer_pid: int = 0
    """Of the process that writes its checkpoints, a sibling of the trainer; 0 if there is none."""
    writer_start_ticks: int = 0
    cgroups: Items[str] = ()
    """Folders of its control group; none where the system allows none."""
    cookie: str = ""
    """Of the pre-warmed process that forked it."""
    started_at: Time
    boot: str

    @property
    def ref(self) -> AttemptRef:
        return AttemptRef(job=self.job, lease_epoch=self.lease_epoch)

    @property
    def group(self) -> AttemptGroup:
        return AttemptGroup(tuple(Path(path) for path in self.cgroups))

    @property
    def writer(self) -> ProcessId | None:
        return ProcessId(self.writer_pid, self.writer_start_ticks) if self.writer_pid else None


@dataclass(frozen=True)
class Leaked:
    """A process that an attempt left behind."""

    pid: int
    command: str
    """Its arguments, cut."""


@dataclass(frozen=True)
class ReapReport:
    """What became of an attempt's processes."""

    stuck: tuple[int, ...]
    """Pids that outlive SIGKILL; their devices must stay out of use."""
    leaked: tuple[Leaked, ...] = ()
    """What there was beside the trainer, its writer and helpers that would have ended by themselves."""

    @property
    def is_gone(self) -> bool:
        return not self.stuck


class ProcessGroup:
    """The processes of an attempt as far as they can be told without a control group.

    Whatever was seen once as a member is remembered, so that it is killed even after its parent has died.
    """

    def __init__(
        self, leader: ProcessId, *, writer: ProcessId | None = None, is_ours: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._leader = leader
        self._is_ours = is_ours
        self._seen: set[ProcessId] = {leader} if writer is None else {leader, writer}

    def members(self) -> set[ProcessId]:
        """Those alive now: of the session or group, below one of these, or with the cookie."""
        everyone = {info.id.pid: info for info in processes.all_processes()}
        known = [info for info in everyone.values() if self._is_known(info, everyone.get(self._leader.pid))]
        below = processes.descendants([info.id.pid for info in known], among=everyone.values())
        found = {info.id for info in (*known, *below)} - {everyone[os.getpid()].id}
        self._seen |= found
        return found

    def kill(self) -> None:
        """SIGKILL to every member; none is a process that merely has a pid of theirs."""
        for process in self.members():
            processes.kill_exactly(process)

    def _is_known(self, info: ProcessInfo, holder: ProcessInfo | None) -> bool:
        if info.id in self._seen:
            return True
        if self._is_ours(processes.environment_value(info.id.pid, COOKIE) or ""):
            return True
        # A pid is not given away while a session or group has its number: another holder means they are empty.
        is_reused = holder is not None and holder.id != self._leader
        is_member = self._leader.pid in (info.session, info.group) and info.id.start_ticks >= self._leader.start_ticks
        return is_member and not is_reused


def attempt_name(ref: AttemptRef) -> str:
    """`<job>.<lease_epoch>`: of its file, its group, and in frames."""
    return f"{ref.job}.{ref.lease_epoch}"


def reap(
    state: AttemptState, *, deadline_s: float, group: AttemptGroup | None = None, is_orphaned: bool = False
) -> ReapReport:
    """Kill everything of the attempt until nothing is left, and remove its control group.

    Args:
        state: of an attempt of this boot.
        deadline_s: seconds after which what is left counts as stuck.
        group: its group as it was made, which knows how many were killed for memory; else the one of the state.
        is_orphaned: whether the pre-warmed process is dead too, so that all that carries its cookie may die.

    The caller removes the attempt's file if the report says that all is gone.
    """
    leader = ProcessId(state.pid, state.start_ticks)
    others = ProcessGroup(leader, writer=state.writer, is_ours=_is_ours(state, is_orphaned=is_orphaned))
    until, pause_s = time.monotonic() + deadline_s, _POLL_MIN_S
    group = group or state.group
    # Before the first kill, while every parent is there to show its children.
    leaked = _leaked(leader, state.writer, {process.pid for process in others.members()} | group.pids())
    stuck = group.kill(deadline_s=deadline_s)
    while left := others.members():
        others.kill()
        if time.monotonic() > until:
            stuck |= {process.pid for process in left}
            break
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _POLL_MAX_S)
    if not stuck:
        group.remove()
    return ReapReport(tuple(sorted(stuck)), leaked)


def _leaked(leader: ProcessId, writer: ProcessId | None, pids: set[int]) -> tuple[Leaked, ...]:
    """Who they are, but for the leader, the writer of its checkpoints, and helpers of the leader's own.

    Such helpers are forks in its session, for instance a loader's workers.
    """
    found: list[Leaked] = []
    for pid in sorted(pids - {leader.pid}):
        info, command = processes.process_info(pid), processes.command_line(pid)
        if info is None or info.id == writer:
            continue
        if info.session == leader.pid and any(word in command for word in _HELPERS):
            continue
        found.append(Leaked(pid, command if len(command) <= _MAX_COMMAND else f"{command[: _MAX_COMMAND - 1]}…"))
    return tuple(found)


def _is_ours(state: AttemptState, *, is_orphaned: bool) -> Callable[[str], bool]:
    """Which cookies mean that a process belongs to the attempt."""
    own = f"{state.cookie}/{attempt_name(state.ref)}"
    if not state.cookie:
        return lambda _: False
    if is_orphaned:
        return lambda cookie: cookie.partition("/")[0] == state.cookie
    return lambda cookie: cookie == own


class AttemptLedger:
    """One file per attempt that may have processes on this host."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups: dict[str, AttemptGroup] = {}

    def add(self, ref: AttemptRef, *, pid: int, group: AttemptGroup | None) -> AttemptState:
        """Remember a trainer that was just forked; durable on return, and to be called before it is given its plan."""
        state = AttemptState(
            job=ref.job,
            lease_epoch=ref.lease_epoch,
            pid=pid,
            start_ticks=processes.start_ticks(pid) or 0,
            cgroups=tuple(str(path) for path in group.paths) if group is not None else (),
            cookie=processes.environment_value(pid, COOKIE) or "",  # its own begins with that of its parent
            started_at=clock.now(),
            boot=processes.boot_id(),
        )
        if group is not None:
            self._groups[attempt_name(ref)] = group
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(state)
        return state

    def add_writer(self, ref: AttemptRef, *, pid: int) -> None:
        """Remember the writer of an attempt that is remembered, in place of a former one, which must be gone."""
        for state in _read(self._path(ref)):
            self._write(state.changed(writer_pid=pid, writer_start_ticks=processes.start_ticks(pid) or 0))

    def reap(self, ref: AttemptRef, *, deadline_s: float, is_orphaned: bool = False) -> ReapReport:
        """`reap` of an attempt of this runner, which is forgotten if all of it is gone; one unknown is gone."""
        states = list(_read(self._path(ref))) if self._path(ref).exists() else []
        report = ReapReport(())
        for state in states:
            report = reap(
                state, group=self._groups.get(attempt_name(ref)), deadline_s=deadline_s, is_orphaned=is_orphaned
            )
            if not report.is_gone:
                return report
            self.remove(ref)
        return report

    def remove(self, ref: AttemptRef) -> None:
        """Forget an attempt; to be called once nothing of it is left."""
        self._groups.pop(attempt_name(ref), None)
        self._path(ref).unlink(missing_ok=True)
        fsync_dir(self._folder)

    def states(self) -> list[AttemptState]:
        """All that are recorded, by name; a file that is none of ours is reported and left."""
        return [state for path in sorted(self._folder.glob("[!.]*.json")) for state in _read(path)]

    def sweep(self, *, deadline_s: float = 10.0, tree: GroupTree | None = None) -> list[AttemptRef]:
        """End what a former runner left; gives the attempts of which nothing is left, and forgets them.

        To be called before anything is forked. Those that `states` still has afterwards are stuck.
        An attempt of an earlier boot is gone by itself. With a tree, groups without a file are ended too: a
        runner may die between the fork and the record.
        """
        gone = [state.ref for state in self.states() if self._end(state, deadline_s=deadline_s)]
        for ref in gone:
            self.remove(ref)
        if tree is not None:
            _sweep_groups(tree, deadline_s=deadline_s)
        return gone

    def _end(self, state: AttemptState, *, deadline_s: float) -> bool:
        if state.boot != processes.boot_id():
            return True
        report = reap(state, deadline_s=deadline_s, is_orphaned=True)
        if report.is_gone:
            logger.info("an attempt of a former runner was swept", extra={"attempt": attempt_name(state.ref)})
        else:
            logger.error("an attempt of a former runner cannot be killed", extra={"stuck": report.stuck})
        return report.is_gone

    def _write(self, state: AttemptState) -> None:
        write_whole(self._path(state.ref), to_json(state.to_map()), mode=0o600)

    def _path(self, ref: AttemptRef) -> Path:
        return self._folder / f"{attempt_name(ref)}.json"


def _read(path: Path) -> Iterator[AttemptState]:
    try:
        yield AttemptState.parse(orjson.loads(path.read_bytes()))
    except (ValueError, WireError):
        logger.exception(
            "not the file of an attempt; remove it once its processes are known to be gone", extra={"path": str(path)}
        )


def _sweep_groups(tree: GroupTree, *, deadline_s: float) -> None:
    for name, group in tree.groups().items():
        stuck = group.kill(deadline_s=deadline_s)
        if stuck:
            logger.error("a group of a former runner cannot be emptied", extra={"group": name, "stuck": sorted(stuck)})
        else:
            group.remove()
