"""The inventory of a host: ids that last, labels, shares, and what befell its GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from cluster_for_tests import GIB
from fakes import FakeGpus
from railbus_device_manager.cpu import CpuTopology, NumaNode, slots
from railbus_device_manager.faults import xid_fault
from railbus_device_manager.inventory import GpuSource, Inventory, device_id, gpu_id
from railbus_shared.contracts.devices import DeviceInfo, HostReport
from railbus_shared.names import HostId, checked_id

GPU = "GPU-0f1e2d3c-1111-2222-3333-444455556666"
MIG = "MIG-aabbccdd-1111-2222-3333-444455556666"
LONG = "h" * 64


@dataclass(frozen=True)
class TwoSlots:
    """A `CpuSource` of a host with two cores."""

    host: str

    def scan(self) -> list[DeviceInfo]:
        topology = CpuTopology((NumaNode(0, (0, 1)),), memory_bytes=8 * GIB)
        return slots(topology, host=self.host, cpu_slots=2)


def inventory(gpus: GpuSource, *, host: str = "a", labels: dict[str, str] | None = None) -> Inventory:
    return Inventory(HostId(host), cpus=TwoSlots(host), gpus=gpus, labels=labels or {})


def test_slots_gpus_and_slices_are_found_under_ids_that_name_host_and_device() -> None:
    devices = inventory(FakeGpus("a", {GPU: 16 * GIB, MIG: 5 * GIB})).read().devices
    assert [device.id for device in devices] == ["a-cpu0", "a-cpu1", "a-gpu-0f1e2d3c", "a-mig-aabbccdd"]
    assert [device.is_mig for device in devices] == [False, False, False, True]


def test_ids_do_not_depend_on_the_order_in_which_the_driver_lists_its_gpus() -> None:
    one = {device.uuid: device.id for device in inventory(FakeGpus("a", {GPU: GIB, MIG: GIB})).read().devices}
    other = {device.uuid: device.id for device in inventory(FakeGpus("a", {MIG: GIB, GPU: GIB})).read().devices}
    assert one[GPU] == other[GPU]
    assert one[MIG] == other[MIG]


@pytest.mark.parametrize("length", [1, 50, 51, 58, 59, 63, 64])
@pytest.mark.parametrize("suffix", ["cpu0", "cpu127", "gpu-0f1e2d3c"])
def test_the_id_of_a_device_is_valid_whatever_the_length_of_the_host(length: int, suffix: str) -> None:
    found = device_id("h" * length, suffix)
    assert checked_id(found) == found
    assert found.endswith(f"-{suffix}")
    assert found.startswith("h")


def test_long_hosts_that_differ_at_their_end_have_different_devices() -> None:
    assert device_id(LONG[:-1] + "a", "cpu0") != device_id(LONG[:-1] + "b", "cpu0")
    assert device_id(LONG, "cpu0") == "h" * 50 + "-52f9b948-cpu0"


@pytest.mark.parametrize(
    ("uuid", "is_mig", "expected"),
    [
        (GPU, False, "a-gpu-0f1e2d3c"),
        (MIG, True, "a-mig-aabbccdd"),
    ],
)
def test_a_gpu_is_called_by_the_first_eight_of_its_uuid(uuid: str, is_mig: bool, expected: str) -> None:
    assert gpu_id("a", uuid, is_mig=is_mig) == expected


def test_slices_that_old_drivers_name_after_their_gpu_are_told_apart() -> None:
    first = gpu_id("a", f"MIG-{GPU}/1/0", is_mig=True)
    second = gpu_id("a", f"MIG-{GPU}/2/0", is_mig=True)
    assert first != second
    assert checked_id(first).startswith("a-mig-")


def test_the_labels_of_the_host_are_on_every_device() -> None:
    devices = inventory(FakeGpus("a", {GPU: GIB}), labels={"zone": "cellar"}).read().devices
    assert [device.labels for device in devices] == [{"zone": "cellar"}] * 3


def test_a_host_with_the_longest_name_gives_a_valid_report() -> None:
    devices = inventory(FakeGpus(LONG, {GPU: GIB}), host=LONG).read().devices
    report = HostReport(host=LONG, devices=devices, reported_at="2026-01-01T00:00:00Z")
    assert len({device.id for device in HostReport.parse(report.to_map()).devices}) == 3


def test_faults_come_with_the_reading_that_found_them() -> None:
    gpus = FakeGpus("a", {GPU: GIB}, told=[xid_fault(GPU, 79)])
    found = inventory(gpus)
    assert found.read().faults == (xid_fault(GPU, 79),)
    assert found.read().faults == ()


def test_whole_gpus_are_divided_into_shares_and_slices_and_cpus_are_not() -> None:
    divided = replace(inventory(FakeGpus("a", {GPU: GIB, MIG: GIB})), gpu_shares=4)
    assert [device.shares for device in divided.read().devices] == [1, 1, 4, 1]


def test_a_lost_gpu_stays_in_the_inventory_as_unhealthy() -> None:
    gpus = FakeGpus("a", {GPU: GIB})
    found = inventory(gpus)
    assert [device.healthy for device in found.read().devices] == [True, True, True]
    gpus.lost.add(GPU)
    lost = found.read().devices[-1]
    assert (lost.id, lost.healthy, lost.health_reason) == ("a-gpu-0f1e2d3c", False, "GPU is lost")
