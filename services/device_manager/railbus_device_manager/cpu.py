"""CPU slots: which cores and how much memory of this host a trainer may have.

A slot is a run of neighbouring cores and its share of the memory. By default there is one slot for each NUMA node. Only
what this process may really use is counted: its affinity, the cores that are online, and the quota and memory limit of
its cgroups (version 1, 2 or both). A quota is rounded down to whole cores, at least one: one thread more than the quota
is throttled, and the others wait for it at every step, while the rest is well used by our own processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

from railbus_device_manager.inventory import device_id
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.errors import BadSetting

SETTING: Final = "RAILBUS_DEVICE_MANAGER_CPU_SLOTS"
_SYS: Final = Path("/sys")
_PROC: Final = Path("/proc")


@dataclass(frozen=True)
class NumaNode:
    """Cores that are near one memory."""

    number: int | None
    """None where the host names no nodes."""
    cores: tuple[int, ...]


@dataclass(frozen=True)
class CpuTopology:
    """What this process may use of its host."""

    nodes: tuple[NumaNode, ...]
    """Cores that are online and in our affinity."""
    memory_bytes: int
    """The least of the host's memory and the limits of our cgroups."""
    quota_cpus: float | None = None
    """CPU time per time that our cgroups allow; None without a limit."""
    model: str = "CPU"


@dataclass(frozen=True)
class CoreTimes:
    """Seconds since boot that one core was busy, and all together."""

    busy_s: float
    total_s: float


# --- slots -----------------------------------------------------------------------------------------------------------


def slots(topology: CpuTopology, *, host: str, cpu_slots: int | None) -> list[DeviceInfo]:
    """The CPU slots of a host: one for each NUMA node, or `cpu_slots` of them, 0 for none.

    Raises BadSetting if there are fewer cores than slots.
    """
    nodes = within_quota(topology)
    cores = [core for node in nodes for core in node.cores]
    groups = [node.cores for node in nodes] if cpu_slots is None else split(cores, cpu_slots)
    return [
        DeviceInfo(
            id=device_id(host, f"cpu{index}"),
            host=host,
            kind="cpu",
            name=f"{topology.model}, {len(group)} {'core' if len(group) == 1 else 'cores'}",
            index=index,
            cores=group,
            numa_node=_node_of(group, nodes),
            memory_bytes=topology.memory_bytes * len(group) // len(cores),
        )
        for index, group in enumerate(groups)
    ]


def within_quota(topology: CpuTopology) -> tuple[NumaNode, ...]:
    """The nodes with the cores that the quota pays for, the first nodes first; a node without any is left out."""
    room = sum(len(node.cores) for node in topology.nodes)
    if topology.quota_cpus is not None:
        room = min(room, max(1, int(topology.quota_cpus)))
    taken: list[NumaNode] = []
    for node in topology.nodes:
        cores = node.cores[:room]
        room -= len(cores)
        if cores:
            taken.append(NumaNode(node.number, cores))
    return tuple(taken)


def split(cores: list[int], cpu_slots: int) -> list[tuple[int, ...]]:
    """Neighbouring cores in `cpu_slots` groups whose sizes differ by one at most; raises BadSetting."""
    if not 0 <= cpu_slots <= len(cores):
        raise BadSetting(
            f"setting {SETTING} has value {cpu_slots}: this host has {len(cores)} usable cores",
            hint=f"use 0 to {len(cores)}, or leave it out for one slot per NUMA node",
            details={"cpu_slots": cpu_slots, "cores": len(cores)},
        )
    if cpu_slots == 0:
        return []
    bounds = [len(cores) * number // cpu_slots for number in range(cpu_slots + 1)]
    return [tuple(cores[start:stop]) for start, stop in pairwise(bounds)]


def _node_of(cores: tuple[int, ...], nodes: Iterable[NumaNode]) -> int | None:
    """The node that has all of the cores, or None."""
    return next((node.number for node in nodes if set(cores) <= set(node.cores)), None)


# --- reading the topology --------------------------------------------------------------------------------------------


def read_topology(
    sys_root: Path = _SYS, *, proc_root: Path = _PROC, affinity: frozenset[int] | None = None
) -> CpuTopology:
    """What the kernel's files say; `affinity` is this process's own unless it is given."""
    usable = frozenset(os.sched_getaffinity(0)) if affinity is None else affinity
    online = _read(sys_root / "devices/system/cpu/online")
    if online is not None:
        usable &= frozenset(parse_cores(online))
    groups = _Cgroups(sys_root / "fs/cgroup", proc_root / "self/cgroup")
    return CpuTopology(
        nodes=_nodes(sys_root / "devices/system/node", usable),
        memory_bytes=min([_memory_bytes(proc_root / "meminfo"), *groups.memory_limits()]),
        quota_cpus=min(groups.quotas(), default=None),
        model=_model(proc_root / "cpuinfo"),
    )


def parse_cores(text: str) -> list[int]:
    """The numbers of a kernel list such as `0-3,8`."""
    cores: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return cores


def _nodes(folder: Path, usable: frozenset[int]) -> tuple[NumaNode, ...]:
    """Nodes with usable cores; cores that no node names make one node without a number."""
    nodes: list[NumaNode] = []
    for path in sorted(folder.glob("node[0-9]*"), key=lambda node: int(node.name[4:])):
        cores = tuple(core for core in parse_cores(_read(path / "cpulist") or "") if core in usable)
        if cores:
            nodes.append(NumaNode(int(path.name[4:]), cores))
    rest = usable.difference(*(node.cores for node in nodes))
    return (*nodes, NumaNode(None, tuple(sorted(rest)))) if rest else tuple(nodes)


def _memory_bytes(meminfo: Path) -> int:
    match = re.search(r"^MemTotal:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    if match is None:
        raise BadSetting(f"{str(meminfo)!r} has no MemTotal", hint="mount the proc file system")
    return int(match[1]) * 1024


def _model(cpuinfo: Path) -> str:
    """The product's name; Arm kernels give none."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(cpuinfo) or "", re.MULTILINE)
    return match[1].strip() if match else "CPU"


def _read(path: Path) -> str | None:
    """The text of a file that need not exist."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


@dataclass(frozen=True)
class _Cgroups:
    """Limits of the cgroups that this process is in, from its own up to the root: the least of them holds."""

    mount: Path
    membership: Path
    """`/proc/self/cgroup`."""

    def quotas(self) -> Iterator[float]:
        for folder in self._folders("cpu"):
            text = _read(folder / "cpu.max")
            if text is None:
                text = f"{_read(folder / 'cpu.cfs_quota_us') or 'max'} {_read(folder / 'cpu.cfs_period_us') or ''}"
            quota_us, *period_us = text.split()
            if quota_us.isdigit() and period_us:  # neither `max` nor -1
                yield int(quota_us) / int(period_us[0])

    def memory_limits(self) -> Iterator[int]:
        for folder in self._folders("memory"):
            for name in ("memory.max", "memory.limit_in_bytes"):
                text = (_read(folder / name) or "").strip()
                if text.isdigit():
                    yield int(text)

    def _folders(self, controller: str) -> Iterator[Path]:
        """Folders that may limit `controller`; in a container a path of the host may be named that is not mounted."""
        for line in (_read(self.membership) or "").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            parts = PurePosixPath(path).parts[1:]
            for mount in self._mounts(controllers, controller):
                depth = 0 if ".." in parts else len(parts)
                yield from (mount.joinpath(*parts[:length]) for length in range(depth, -1, -1))

    def _mounts(self, controllers: str, controller: str) -> list[Path]:
        """Where a hierarchy is mounted; version 2 has no controllers in its line, and is beside version 1 if mixed."""
        names = dict.fromkeys([controllers, controller]) if controllers else ("", "unified")
        return [self.mount / name for name in names]


# --- live figures ----------------------------------------------------------------------------------------------------


def busy_frac(cores: Iterable[int], *, before: dict[int, CoreTimes], after: dict[int, CoreTimes]) -> float | None:
    """Mean part of the time between two readings that the cores were busy; None where there is nothing to compare."""
    known = [core for core in cores if core in before and core in after]
    total_s = sum(after[core].total_s - before[core].total_s for core in known)
    if total_s <= 0:
        return None
    busy_s = sum(after[core].busy_s - before[core].busy_s for core in known)
    return min(1.0, max(0.0, busy_s / total_s))


def read_core_times(sys_root: Path = _SYS) -> dict[int, CoreTimes]:
    """Times of all online cores by number; the system lists them without numbers, in order."""
    # `guest` is counted in `user` already; a core that waits for a disk could compute.
    listed = [
        CoreTimes(busy_s=sum(times[:8]) - times.idle - times.iowait, total_s=sum(times[:8]))
        for times in psutil.cpu_times(percpu=True)
    ]
    online = _read(sys_root / "devices/system/cpu/online")
    numbers = parse_cores(online) if online is not None else range(len(listed))
    return dict(zip(numbers, listed, strict=False))  # a core may go on- or offline between the two readings


class HostCpus:
    """The CPU slots of this host with live figures; satisfies `CpuSource`."""

    def __init__(self, host: str, *, cpu_slots: int | None) -> None:
        self._host = host
        self._cpu_slots = cpu_slots
        self._before: dict[int, CoreTimes] = {}

    def scan(self) -> list[DeviceInfo]:
        """The slots as they are now; use of the cores is since the scan before, so the first has none."""
        topology = read_topology()
        before, self._before = self._before, read_core_times()
        memory = psutil.virtual_memory()
        used_bytes = min(memory.total - memory.available, topology.memory_bytes)
        return [
            slot.changed(
                utilisation_frac=busy_frac(slot.cores, before=before, after=self._before),
                memory_used_bytes=used_bytes * slot.memory_bytes // topology.memory_bytes,
            )
            for slot in slots(topology, host=self._host, cpu_slots=self._cpu_slots)
        ]
