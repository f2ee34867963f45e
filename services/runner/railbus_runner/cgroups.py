"""One control group per attempt, where the system lets us make one: what is in it can be killed without a miss.

Used in this order: version 2, the controllers `freezer`, `pids` and `memory` of version 1, nothing. In a hybrid set-up
version 2 has no controllers; then it kills, and `memory` of version 1 limits and counts. A group is
`railbus/<scope>/<attempt>` below the group of this process, or below the root of the hierarchy where that cannot be
written. `discover` believes nothing that it has not tried.

The functions block, for milliseconds as a rule: call them in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from railbus_runner import hierarchies, memory_limit, oom

logger = logging.getLogger(__name__)

V1_CONTROLLERS: Final = ("freezer", "pids", "memory")
_POLL_MIN_S: Final = 0.001
_POLL_MAX_S: Final = 0.02
_TRIAL_S: Final = 5.0


@dataclass
class AttemptGroup:
    """The group of one attempt: one folder in version 2, one per controller in version 1."""

    paths: tuple[Path, ...]
    oom_baseline: oom.Baseline | None = None
    memory_bytes: int | None = None
    """What its processes are held to together, where that is so."""
    _oom_kills: int = 0

    @property
    def procs_files(self) -> tuple[str, ...]:
        """The files that a process writes itself into to join."""
        return tuple(str(path / "cgroup.procs") for path in self.paths)

    def pids(self) -> set[int]:
        """Processes in the group and below it; a zombie is in none."""
        return {pid for path in self.paths for folder in _folders(path) for pid in _pids_in(folder)}

    def kill(self, *, deadline_s: float = 5.0) -> set[int]:
        """SIGKILL to everything inside, until it is empty; gives what is left at the deadline."""
        until = time.monotonic() + deadline_s
        pause_s = _POLL_MIN_S
        while left := self.pids():
            _kill_once(self)
            if time.monotonic() > until:
                return left
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_MAX_S)
        return set()

    def remove(self, *, deadline_s: float = 1.0) -> None:
        """Remove the empty group; one that is gone already is no error. Raises OSError (EBUSY) if it is in use.

        A process that has just died leaves its group a moment after it left the list of pids.
        """
        self.oom_kills()
        until = time.monotonic() + deadline_s
        for path in self.paths:
            while not _removed(path, is_last=time.monotonic() > until):
                time.sleep(_POLL_MAX_S)

    def limit_memory(self, num_bytes: int) -> None:
        """Hold it to so many bytes, where the system lets us."""
        if memory_limit.limit_memory(self.paths, num_bytes):
            self.memory_bytes = num_bytes

    def oom_kills(self) -> int:
        """Processes that the kernel killed for want of memory: in the group, or near it where it cannot count.

        See `oom`: without a memory controller the count is of the whole surroundings since the group was made. Known
        also after `remove`.
        """
        if self.oom_baseline is not None:
            self._oom_kills = max(self._oom_kills, oom.kills_since(self.oom_baseline))
        return self._oom_kills


@dataclass(frozen=True)
class GroupTree:
    """Where groups can be made: `railbus/<scope>` in one hierarchy, or in several of version 1."""

    folders: tuple[Path, ...]

    def create(self, name: str) -> AttemptGroup:
        """A new group, or the one of that name that a former runner left; raises OSError."""
        paths = tuple(folder / name for folder in self.folders)
        for path in paths:
            path.mkdir(exist_ok=True)
        return AttemptGroup(paths, oom.baseline(paths))

    def groups(self) -> dict[str, AttemptGroup]:
        """All groups that are there now, by their names; after a restart, those of the former runner."""
        names = {path.name for folder in self.folders for path in _subfolders(folder)}
        return {name: AttemptGroup(tuple(folder / name for folder in self.folders)) for name in sorted(names)}


def discover(
    scope: str, *, versions: Sequence[Literal[1, 2]] = (2, 1), controllers: Sequence[str] = V1_CONTROLLERS
) -> GroupTree | None:
    """The best that works here, tried with a real process, some 30 ms for each place; None where nothing works.

    Args:
        scope: a name that this runner shares with nobody but its former and later starts: whatever stands below it is
            swept after a crash. Made of host and root, for instance.
    """
    for version in versions:
        found = _version_2(scope, controllers) if version == 2 else _version_1(scope, controllers)
        if found is not None:
            return found
    logger.warning("no control group can be used: a trainer's stray processes are found by session and environment")
    return None


def _version_2(scope: str, controllers: Iterable[str]) -> GroupTree | None:
    """With the memory controller of version 1 beside it where it has none itself."""
    found = _first_usable(hierarchies.own_places(""), scope)
    if found is None or "memory" not in controllers or _counts_memory(found):
        return found
    memory = _version_1(scope, ("memory",))
    return GroupTree((*found.folders, *memory.folders)) if memory is not None else found


def _counts_memory(tree: GroupTree) -> bool:
    """Whether the groups below can be limited."""
    try:
        return all("memory" in (folder / "cgroup.subtree_control").read_text().split() for folder in tree.folders)
    except OSError:
        return False


def _version_1(scope: str, controllers: Iterable[str]) -> GroupTree | None:
    each = [_first_usable(hierarchies.own_places(name), scope) for name in controllers]
    folders = tuple(folder for one in each if one is not None for folder in one.folders)
    return GroupTree(tuple(dict.fromkeys(folders))) if folders else None


def _first_usable(parents: Iterable[Path], scope: str) -> GroupTree | None:
    candidates = (GroupTree((parent / "railbus" / scope,)) for parent in parents)
    return next((cgroups for cgroups in candidates if _works(cgroups)), None)


def _works(cgroups: GroupTree) -> bool:
    """Whether a process of ours can be put into a group, killed by it, and the group be removed."""
    try:
        for folder in cgroups.folders:
            folder.mkdir(parents=True, exist_ok=True)
            _pass_memory_down(folder)
        group = cgroups.create(f"trial-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            return _kills(group)
        finally:
            group.remove()
    except OSError as exc:
        logger.debug(
            "a control group cannot be used", extra={"paths": [str(p) for p in cgroups.folders], "why": str(exc)}
        )
        return False


def _kills(group: AttemptGroup) -> bool:
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]) as process:
        try:
            for path in group.procs_files:
                Path(path).write_text(str(process.pid), encoding="ascii")
            if group.pids() != {process.pid} or group.kill(deadline_s=_TRIAL_S):
                return False
            return process.wait(_TRIAL_S) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.kill()


def _pass_memory_down(folder: Path) -> None:
    """Let groups below count their memory, where version 2 and those above allow it; the count is a comfort."""
    for level in (folder.parent, folder):
        with contextlib.suppress(OSError):
            if "memory" in (level / "cgroup.controllers").read_text(encoding="ascii").split():
                (level / "cgroup.subtree_control").write_text("+memory", encoding="ascii")


def _kill_once(group: AttemptGroup) -> None:
    """By the kernel in one step, else each one while all stand still, so that none can fork in between."""
    killers = [path / "cgroup.kill" for path in group.paths if (path / "cgroup.kill").exists()]
    if killers:
        for killer in killers:
            _write_if_there(killer, "1")
        _kill_each(group)  # what has left that hierarchy and is still in another
        return
    _freeze(group, is_frozen=True)
    try:
        _kill_each(group)
    finally:
        _freeze(group, is_frozen=False)  # version 1 lets a frozen process die only once it is thawed


def _freeze(group: AttemptGroup, *, is_frozen: bool) -> None:
    for path in group.paths:
        _write_if_there(path / "cgroup.freeze", "1" if is_frozen else "0")
        _write_if_there(path / "freezer.state", "FROZEN" if is_frozen else "THAWED")


def _kill_each(group: AttemptGroup) -> None:
    """SIGKILL to every member; a pid that left the group since it was listed is left alone."""
    with contextlib.ExitStack() as stack:
        descriptors: dict[int, int] = {}
        for pid in group.pids():
            with contextlib.suppress(ProcessLookupError):
                descriptors[pid] = os.pidfd_open(pid)
                stack.callback(os.close, descriptors[pid])
        for pid in group.pids() & descriptors.keys():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptors[pid], signal.SIGKILL)


def _write_if_there(path: Path, text: str) -> None:
    """Write to a file of the kernel's; a group that was removed meanwhile is what we want."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # no O_CREAT: the kernel makes these files
    except FileNotFoundError:
        return
    try:
        os.write(descriptor, text.encode("ascii"))
    except OSError as exc:
        if exc.errno != errno.ENODEV:
            raise
    finally:
        os.close(descriptor)


def _pids_in(folder: Path) -> set[int]:
    try:
        listed = (folder / "cgroup.procs").read_text(encoding="ascii").split()
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV):
            return set()
        raise
    return {int(pid) for pid in listed} - {0}  # 0 is a process of another pid namespace, and to kill 0 is suicide


def _folders(path: Path) -> Iterator[Path]:
    """A group and all below it, the deepest first."""
    for folder in _subfolders(path):
        yield from _folders(folder)
    yield path


def _subfolders(path: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _removed(path: Path, *, is_last: bool) -> bool:
    """Try to remove a group and those below it; False if it is still in use."""
    try:
        for folder in _folders(path):
            folder.rmdir()
    except FileNotFoundError:
        return not path.exists()
    except OSError as exc:
        if exc.errno != errno.EBUSY or is_last:
            raise
        return False
    return True
