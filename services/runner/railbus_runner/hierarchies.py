"""Which control groups this process is in, and where they are mounted.

Reads `/proc/self/cgroup` and `/proc/self/mountinfo`; the parsing is plain functions of their text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_PROC_SELF: Final = Path("/proc/self")


@dataclass(frozen=True)
class Mount:
    """One mounted hierarchy; `controllers` is empty for version 2."""

    version: int
    root: str
    """The group that stands at the mount point; not `/` in some containers."""
    point: Path
    controllers: frozenset[str]


def parse_mounts(mountinfo: str) -> Iterator[Mount]:
    """The hierarchies in the text of a `mountinfo`."""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if kind and kind[0] in ("cgroup", "cgroup2"):
            version = 2 if kind[0] == "cgroup2" else 1
            options = frozenset(kind[-1].split(",")) if version == 1 else frozenset[str]()
            yield Mount(
                version=version, root=_unescaped(fields[3]), point=Path(_unescaped(fields[4])), controllers=options
            )


def parse_memberships(cgroup: str) -> dict[str, str]:
    """The group's path by controller in the text of a `/proc/<pid>/cgroup`; version 2 by the empty name."""
    paths: dict[str, str] = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def places(controller: str, *, mounts: list[Mount], memberships: dict[str, str]) -> list[Path]:
    """The folder of the own group, then that of the root, of one controller of version 1 or, if empty, version 2."""
    found: list[Path] = []
    for mount in mounts:
        if (mount.version == 2) if controller == "" else (controller in mount.controllers):
            own = _below(memberships.get(controller, "/"), root=mount.root)
            found += [mount.point / own, mount.point] if own not in ("", None) else [mount.point]
    return list(dict.fromkeys(found))


def own_places(controller: str) -> list[Path]:
    """`places` of this process."""
    return places(
        controller,
        mounts=list(parse_mounts((_PROC_SELF / "mountinfo").read_text(encoding="utf-8"))),
        memberships=parse_memberships((_PROC_SELF / "cgroup").read_text(encoding="utf-8")),
    )


def _below(path: str, *, root: str) -> str | None:
    """A group's path below the group that is mounted; None if it lies elsewhere."""
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(root):
        return None
    return str(group.relative_to(root)).removeprefix(".")


def _unescaped(text: str) -> str:
    """Mountinfo writes blanks and backslashes as octal numbers."""
    for code in ("040", "011", "012", "134"):
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text
