"""Linux processes, named so that a reused pid is never taken for the process it once was.

A `ProcessId` is a pid with the start time the kernel gave it; together they are unique within one boot. Everything
here reads `/proc` and asks nobody else. Zombies count as gone: they hold neither memory nor devices.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_PDEATHSIG: Final = 2
_PR_SET_NO_NEW_PRIVS: Final = 38
_MAX_DESCRIPTORS: Final = 1 << 16
_PR_SET_CHILD_SUBREAPER: Final = 36
_PROC: Final = Path("/proc")
_LIBC: Final = ctypes.CDLL(None, use_errno=True)  # at import, so that nothing is loaded between a fork and a prctl


class ProcessId(NamedTuple):
    """One process of this boot."""

    pid: int
    start_ticks: int
    """When it started, in the kernel's clock ticks since boot."""


@dataclass(frozen=True)
class ProcessInfo:
    """What `/proc/<pid>/stat` says of a process that is alive."""

    id: ProcessId
    parent: int
    group: int
    session: int


def boot_id() -> str:
    """The kernel's random name of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def process_info(pid: int) -> ProcessInfo | None:
    """The process that has this pid now; None if there is none, or only a zombie."""
    fields = _stat(pid)
    if not fields or fields[0] in (b"Z", b"X"):
        return None
    return ProcessInfo(
        id=ProcessId(pid, int(fields[19])), parent=int(fields[1]), group=int(fields[2]), session=int(fields[3])
    )


def start_ticks(pid: int) -> int | None:
    """When the process started, also of a zombie; None if there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[bytes]:
    """The fields of `/proc/<pid>/stat` from the state on; empty if there is no such process."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return stat[stat.rindex(b")") + 2 :].split()  # the name before may hold spaces and brackets


def all_processes() -> Iterator[ProcessInfo]:
    """Every process that can be seen and is alive; costs about 20 µs each."""
    for name in os.listdir(_PROC):  # noqa: PTH208 - names are all we need, thousands of times
        if name.isdigit() and (info := process_info(int(name))) is not None:
            yield info


def descendants(roots: Iterable[int], *, among: Iterable[ProcessInfo]) -> list[ProcessInfo]:
    """The processes in `among` that are children of `roots`, of their children, and so on; without the roots."""
    children: dict[int, list[ProcessInfo]] = {}
    for info in among:
        children.setdefault(info.parent, []).append(info)
    found: list[ProcessInfo] = []
    pending = list(roots)
    while pending:
        below = children.pop(pending.pop(), [])
        found += below
        pending += [info.id.pid for info in below]
    return found


def environment_value(pid: int, name: str) -> str | None:
    """A variable that the process was executed with; None where it has none or may not be read."""
    try:
        entries = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    prefix = os.fsencode(name) + b"="
    return next((os.fsdecode(entry[len(prefix) :]) for entry in entries if entry.startswith(prefix)), None)


def command_line(pid: int) -> str:
    """How the process was started, its arguments joined by blanks; empty where it is gone or may not be read."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal; False if it is gone."""
    try:
        lines = (_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next((line.partition(":")[2] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def thread_states(pid: int) -> list[str]:
    """What the kernel says of each thread: its number, name, state and, where it may be told, where it waits."""
    found: list[str] = []
    for task in sorted((_PROC / str(pid) / "task").glob("*"), key=lambda path: int(path.name)):
        try:
            stat = (task / "stat").read_bytes()
            waits = (task / "wchan").read_text(encoding="ascii", errors="replace")
        except OSError:  # it has ended meanwhile, or may not be looked at
            continue
        name = stat[stat.index(b"(") + 1 : stat.rindex(b")")].decode("utf-8", "replace")
        state = stat[stat.rindex(b")") + 2 :].split()[0].decode()
        found.append(f"thread {task.name} ({name}): {state}{f' in {waits}' if waits not in ('', '0') else ''}")
    return found


def kill_exactly(process: ProcessId) -> bool:
    """SIGKILL to this process and no later holder of its pid; False if it is gone."""
    return signal_exactly(process, signal.SIGKILL)


def signal_exactly(process: ProcessId, number: int) -> bool:
    """A signal to this process and no later holder of its pid; False if it is gone.

    The descriptor is opened before the start time is read, so that both speak of one process.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        info = process_info(process.pid)
        if info is None or info.id != process:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def die_with_parent(expected_parent: int) -> None:
    """SIGKILL for this process once its parent dies; exits at once if the parent is gone already.

    The signal comes when the *thread* that made this process ends, so a parent must do that in its main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected_parent:
        os._exit(128 + signal.SIGKILL)


def death_signal() -> int:
    """The signal that this process gets when its parent ends; 0 for none. A change of user takes it back."""
    number = ctypes.c_int()
    _prctl(_PR_GET_PDEATHSIG, ctypes.addressof(number))
    return number.value


def set_death_signal(number: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def confine(*, may_gain_privileges: bool) -> None:
    """Leave this process and all that it starts fewer rights: no dump of its memory in a file, a bound on descriptors.

    Unless it `may_gain_privileges`, no program gives it more than it has now, `sudo` among them.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, limit), limit))
    if not may_gain_privileges:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
