"""CPU slots: splitting cores, and reading a host's files from small real trees."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from railbus_device_manager.cpu import (
    CoreTimes,
    CpuTopology,
    HostCpus,
    NumaNode,
    busy_frac,
    parse_cores,
    read_core_times,
    read_topology,
    slots,
)
from railbus_shared.errors import BadSetting
from until import PATIENCE_S

GIB = 1 << 30
ONE = (NumaNode(0, (0,)),)
TWO = (NumaNode(0, (0, 1)),)
FIVE = (NumaNode(0, (0, 1, 2, 3, 4)),)
TWO_NODES = (NumaNode(0, (0, 1, 2, 3)), NumaNode(1, (4, 5, 6, 7)))
HOLES = (NumaNode(0, (0, 2, 3, 7)),)


@pytest.mark.parametrize(
    ("nodes", "quota_cpus", "cpu_slots", "cores", "numa_nodes"),
    [
        (ONE, None, None, [(0,)], [0]),
        (ONE, None, 1, [(0,)], [0]),
        (TWO, None, None, [(0, 1)], [0]),
        (TWO, None, 2, [(0,), (1,)], [0, 0]),
        (FIVE, None, 2, [(0, 1), (2, 3, 4)], [0, 0]),
        (FIVE, None, 3, [(0,), (1, 2), (3, 4)], [0, 0, 0]),
        (TWO_NODES, None, None, [(0, 1, 2, 3), (4, 5, 6, 7)], [0, 1]),
        (TWO_NODES, None, 4, [(0, 1), (2, 3), (4, 5), (6, 7)], [0, 0, 1, 1]),
        (TWO_NODES, None, 1, [(0, 1, 2, 3, 4, 5, 6, 7)], [None]),
        (TWO_NODES, None, 3, [(0, 1), (2, 3, 4), (5, 6, 7)], [0, None, 1]),
        (HOLES, None, 2, [(0, 2), (3, 7)], [0, 0]),
        (TWO, 1.5, None, [(0,)], [0]),
        (TWO, 0.2, None, [(0,)], [0]),
        (TWO_NODES, 5.0, None, [(0, 1, 2, 3), (4,)], [0, 1]),
        (TWO_NODES, 3.9, None, [(0, 1, 2)], [0]),
        (TWO_NODES, 64.0, 2, [(0, 1, 2, 3), (4, 5, 6, 7)], [0, 1]),
        ((NumaNode(None, (0, 1)),), None, None, [(0, 1)], [None]),
        (TWO, None, 0, [], []),
    ],
)
def test_cores_are_split_evenly_and_contiguously(
    nodes: tuple[NumaNode, ...],
    quota_cpus: float | None,
    cpu_slots: int | None,
    cores: list[tuple[int, ...]],
    numa_nodes: list[int | None],
) -> None:
    topology = CpuTopology(nodes, memory_bytes=16 * GIB, quota_cpus=quota_cpus)
    found = slots(topology, host="a", cpu_slots=cpu_slots)
    assert [slot.cores for slot in found] == cores
    assert [slot.numa_node for slot in found] == numa_nodes
    assert [slot.id for slot in found] == [f"a-cpu{index}" for index in range(len(cores))]


@pytest.mark.parametrize("cores", range(1, 12))
def test_every_possible_split_uses_each_core_once_and_shares_the_memory_by_cores(cores: int) -> None:
    topology = CpuTopology((NumaNode(0, tuple(range(cores))),), memory_bytes=cores * GIB)
    for cpu_slots in range(1, cores + 1):
        found = slots(topology, host="a", cpu_slots=cpu_slots)
        assert [core for slot in found for core in slot.cores] == list(range(cores))
        sizes = {len(slot.cores) for slot in found}
        assert max(sizes) - min(sizes) <= 1
        assert [slot.memory_bytes for slot in found] == [len(slot.cores) * GIB for slot in found]


@pytest.mark.parametrize(("quota_cpus", "cpu_slots"), [(None, 3), (1.5, 2), (None, -1)])
def test_more_slots_than_cores_are_refused_by_the_name_of_the_setting(quota_cpus: float | None, cpu_slots: int) -> None:
    topology = CpuTopology(TWO, memory_bytes=GIB, quota_cpus=quota_cpus)
    with pytest.raises(BadSetting, match=f"RAILBUS_DEVICE_MANAGER_CPU_SLOTS has value {cpu_slots}") as raised:
        slots(topology, host="a", cpu_slots=cpu_slots)
    assert "use 0 to" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "cores"), [("0", [0]), ("0-3\n", [0, 1, 2, 3]), ("0,2-3,8\n", [0, 2, 3, 8]), ("\n", [])]
)
def test_a_kernel_list_names_its_cores(text: str, cores: list[int]) -> None:
    assert parse_cores(text) == cores


# --- reading ---------------------------------------------------------------------------------------------------------


class Tree:
    """A small `/sys` and `/proc`."""

    def __init__(self, folder: Path) -> None:
        self.sys = folder / "sys"
        self.proc = folder / "proc"
        self.put("proc/meminfo", "MemTotal:       16777216 kB\nMemFree:  1 kB\n")
        self.put("proc/cpuinfo", "processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\n")
        self.put("sys/devices/system/cpu/online", "0-3\n")
        self.put("proc/self/cgroup", "0::/\n")

    def put(self, path: str, text: str) -> None:
        file = self.sys.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def read(self, affinity: frozenset[int] = frozenset(range(8))) -> CpuTopology:
        return read_topology(self.sys, proc_root=self.proc, affinity=affinity)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_host_without_nodes_and_limits_is_one_node_with_all_its_memory(tree: Tree) -> None:
    expected = CpuTopology((NumaNode(None, (0, 1, 2, 3)),), memory_bytes=16 * GIB, model="Fast CPU @ 3 GHz")
    assert tree.read() == expected


def test_cores_that_are_offline_or_outside_the_affinity_are_not_counted(tree: Tree) -> None:
    tree.put("sys/devices/system/cpu/online", "0,2-3\n")
    assert tree.read(frozenset({0, 1, 2})).nodes == (NumaNode(None, (0, 2)),)


def test_a_host_that_does_not_say_what_is_online_is_believed_about_its_affinity(tree: Tree) -> None:
    (tree.sys / "devices/system/cpu/online").unlink()
    assert tree.read(frozenset({1, 5})).nodes == (NumaNode(None, (1, 5)),)


def test_nodes_come_in_the_order_of_their_numbers_and_those_without_cores_are_left_out(tree: Tree) -> None:
    tree.put("sys/devices/system/node/node10/cpulist", "2-3\n")
    tree.put("sys/devices/system/node/node2/cpulist", "0-1\n")
    tree.put("sys/devices/system/node/node3/cpulist", "\n")
    tree.put("sys/devices/system/node/online", "2-3,10\n")
    assert tree.read().nodes == (NumaNode(2, (0, 1)), NumaNode(10, (2, 3)))


def test_a_core_that_no_node_names_is_not_lost(tree: Tree) -> None:
    tree.put("sys/devices/system/node/node0/cpulist", "0-2\n")
    assert tree.read().nodes == (NumaNode(0, (0, 1, 2)), NumaNode(None, (3,)))


def test_a_processor_without_a_name_is_called_cpu(tree: Tree) -> None:
    tree.put("proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert tree.read().model == "CPU"


V2 = {"proc/self/cgroup": "0::/jobs/mine\n"}
V1 = {"proc/self/cgroup": "5:memory:/jobs/mine\n3:cpu,cpuacct:/jobs/mine\n1:name=systemd:/\n"}
MIXED = {"proc/self/cgroup": "5:memory:/jobs\n3:cpu:/jobs\n0::/jobs\n"}
V2_JOB = "sys/fs/cgroup/jobs/mine"


@pytest.mark.parametrize(
    ("files", "quota_cpus", "memory_gib"),
    [
        (V2, None, 16),
        ({**V2, f"{V2_JOB}/cpu.max": "150000 100000\n", f"{V2_JOB}/memory.max": f"{GIB}\n"}, 1.5, 1),
        ({**V2, f"{V2_JOB}/cpu.max": "max 100000\n", f"{V2_JOB}/memory.max": "max\n"}, None, 16),
        # the least limit on the way up to the root holds
        ({**V2, f"{V2_JOB}/cpu.max": "400000 100000\n", "sys/fs/cgroup/jobs/cpu.max": "50000 100000\n"}, 0.5, 16),
        ({**V2, f"{V2_JOB}/memory.max": "max\n", "sys/fs/cgroup/jobs/memory.max": f"{2 * GIB}\n"}, None, 2),
        # in a container the named path is not mounted, and the root of the mount is its own group
        ({**V2, "sys/fs/cgroup/cpu.max": "200000 100000\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, 2.0, 1),
        ({"proc/self/cgroup": "0::/../../mine\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0, 16),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/jobs/mine/memory.limit_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            2.5,
            3,
        ),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/jobs/mine/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
            16,
        ),
        (
            {
                **MIXED,
                "sys/fs/cgroup/unified/jobs/cpu.max": "100000 100000\n",
                "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": f"{4 * GIB}\n",
            },
            1.0,
            4,
        ),
    ],
)
def test_limits_of_cgroups_of_both_versions_are_found(
    tree: Tree, files: dict[str, str], quota_cpus: float | None, memory_gib: int
) -> None:
    for path, text in files.items():
        tree.put(path, text)
    topology = tree.read()
    assert topology.quota_cpus == quota_cpus
    assert topology.memory_bytes == memory_gib * GIB


def test_a_limit_above_the_memory_of_the_host_does_not_count(tree: Tree) -> None:
    tree.put("sys/fs/cgroup/memory.max", f"{64 * GIB}\n")
    assert tree.read().memory_bytes == 16 * GIB


def test_a_host_without_memory_information_is_a_clear_error(tree: Tree) -> None:
    tree.put("proc/meminfo", "nothing here\n")
    with pytest.raises(BadSetting, match="MemTotal"):
        tree.read()


# --- live figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "expected"),
    [((0,), 0.5), ((1,), 1.0), ((0, 1), 0.75), ((2,), None), ((0, 2), 0.5), ((), None)],
)
def test_use_is_the_mean_of_the_cores_that_both_readings_have(cores: tuple[int, ...], expected: float | None) -> None:
    before = {0: CoreTimes(1.0, 10.0), 1: CoreTimes(0.0, 10.0)}
    after = {0: CoreTimes(2.0, 12.0), 1: CoreTimes(2.0, 12.0), 2: CoreTimes(1.0, 2.0)}
    assert busy_frac(cores, before=before, after=after) == expected


def test_two_readings_at_one_moment_give_no_use() -> None:
    times = {0: CoreTimes(1.0, 10.0)}
    assert busy_frac((0,), before=times, after=times) is None


def test_the_real_cores_of_this_host_are_slots_with_live_figures() -> None:
    cpus = HostCpus("a", cpu_slots=1)
    (first,) = cpus.scan()
    assert set(first.cores) <= os.sched_getaffinity(0)
    assert first.utilisation_frac is None
    assert 0 < first.memory_used_bytes <= first.memory_bytes
    before = busy_s(first.cores)
    deadline_s = time.monotonic() + PATIENCE_S
    while busy_s(first.cores) == before and time.monotonic() < deadline_s:
        pass  # the kernel counts in hundredths of a second, and we keep a core busy
    (second,) = cpus.scan()
    assert second.utilisation_frac is not None
    assert second.utilisation_frac > 0


def busy_s(cores: Iterable[int]) -> float:
    times = read_core_times()
    return sum(times[core].busy_s for core in cores)
