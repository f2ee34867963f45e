"""What an attempt has on its host: a folder to work in, and a control group that holds it to its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from railbus_runner.cgroups import AttemptGroup, GroupTree
from railbus_runner.memory_limit import memory_of
from railbus_runner.workdirs import Workdirs
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.errors import BadSetting


@dataclass(frozen=True)
class Premises:
    """Of one attempt."""

    workdir: Path
    group: AttemptGroup | None

    @property
    def procs_files(self) -> tuple[str, ...]:
        """The files that its trainer writes itself into."""
        return self.group.procs_files if self.group is not None else ()

    @property
    def memory_bytes(self) -> int | None:
        """What its processes are held to together, if they are."""
        return self.group.memory_bytes if self.group is not None else None

    def oom_kills(self) -> int:
        return self.group.oom_kills() if self.group is not None else 0

    def clear(self, *, deadline_s: float) -> None:
        """End what is in the group of an attempt that is not in the ledger, and remove the group."""
        if self.group is not None and not self.group.kill(deadline_s=deadline_s):
            self.group.remove()


def make_premises(
    name: str, *, workdirs: Workdirs, wanted: str | None, groups: GroupTree | None, devices: Iterable[DeviceInfo]
) -> Premises:
    """For an attempt of this name; blocks for a moment.

    Raises InvalidField for a folder that is not allowed, BadSetting where the system refuses.
    """
    try:
        workdir = workdirs.make(name, wanted=wanted)
        group = groups.create(name) if groups is not None else None
    except OSError as exc:
        raise BadSetting(
            f"no working directory or control group for an attempt: {exc}",
            hint="see who else changes the root's .railbus folder or the host's control groups",
        ) from exc
    memory_bytes = memory_of(devices)
    if group is not None and memory_bytes is not None:
        group.limit_memory(memory_bytes)
    return Premises(workdir, group)
