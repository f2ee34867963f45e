"""A host's look at its own GPUs, replayed: faults, memory that is not given back, leaked processes, divisions."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cluster_for_tests import GIB, TIME, device, mark
from fakes import FakeGpus
from railbus_device_manager.faults import xid_fault
from railbus_device_manager.inventory import Reading
from railbus_device_manager.watch import CLEAR_S, SLACK_BYTES, DeviceWatch, Findings, Use, in_use, is_clear
from railbus_shared.contracts.devices import Cordon, DeviceInfo, Lease

GPU = "GPU-0f1e2d3c-1111-2222-3333-444455556666"
OTHER = "GPU-aabbccdd-1111-2222-3333-444455556666"
ID, OTHER_ID = "a-gpu-0f1e2d3c", "a-gpu-aabbccdd"


def lease(holder: str = "j-1", *, epoch: int = 3, share: int = 0, shares: int = 1, on: str = ID) -> Lease:
    return Lease(
        device=on,
        host="a",
        holder=holder,
        lease_epoch=epoch,
        share=share,
        shares=shares,
        nonce="n",
        granted_at=TIME,
    )


@dataclass
class Watched:
    """A watch, the GPUs that it reads, and the keys that it writes."""

    gpus: FakeGpus = field(default_factory=lambda: FakeGpus("a", {GPU: 16 * GIB, OTHER: 16 * GIB}))
    watch: DeviceWatch = field(default_factory=lambda: DeviceWatch("a"))
    cordons: dict[str, Cordon] = field(default_factory=dict)
    leases: dict[str, tuple[Lease, ...]] = field(default_factory=dict)
    marked_at: float | None = None
    shares: int = 1
    now: float = 100.0

    def look(self, *, after_s: float = 3.0) -> Findings:
        self.now += after_s
        devices = tuple(one.changed(shares=self.shares) for one in self.gpus.scan())
        marks = {} if self.marked_at is None else {ID: (mark(ID, "j-1"), self.marked_at)}
        use = Use(leases=self.leases, marks=marks, cordons=self.cordons)
        found = self.watch.look(Reading(devices, tuple(self.gpus.faults())), use, now=self.now, at=TIME)
        self.cordons = {**self.cordons, **{cordon.device: cordon for cordon in found.cordons}}
        for lifted in found.lifted:
            del self.cordons[lifted]
        return found


def told(found: Findings) -> list[str]:
    return [one.what for one in found.told]


def gpu_of(found: Findings) -> DeviceInfo:
    return found.devices[0]


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_gpu_with_a_fatal_xid_is_cordoned_once_with_the_reason_and_what_runs_on_it_is_stopped_until_it_has() -> None:
    watched = Watched(leases={ID: (lease(),), OTHER_ID: (lease("j-2", on=OTHER_ID),)})
    assert told(watched.look()) == []
    watched.gpus.told = [xid_fault(GPU, 79)]
    found = watched.look()
    (cordon,) = found.cordons
    assert (cordon.device, cordon.cause, cordon.by) == (ID, "fault", "a")
    assert cordon.reason == "XID 79: it has fallen off the bus"
    assert [(one.what, one.job) for one in found.told] == [("device.xid", "j-1"), ("device.cordoned", "j-1")]
    (stop,) = found.stops
    assert (stop.job, stop.lease_epoch, stop.reason) == ("j-1", 3, "device_fault")
    assert stop.why == f"device {ID}: XID 79: it has fallen off the bus"
    again = watched.look()
    assert (again.cordons, told(again), [one.job for one in again.stops]) == ([], [], ["j-1"])
    watched.leases = {}
    assert watched.look().stops == []


def test_a_lost_gpu_is_cordoned_and_stays_so_after_it_has_come_back() -> None:
    watched = Watched()
    watched.look()
    watched.gpus.lost.add(GPU)
    assert [cordon.reason for cordon in watched.look().cordons] == ["GPU is lost"]
    assert watched.look().cordons == []
    watched.gpus.lost.clear()
    assert told(watched.look()) == []
    assert ID in watched.cordons


def test_a_fault_that_lasts_is_not_cordoned_again_after_a_person_has_lifted_it_but_a_new_one_is() -> None:
    watched = Watched()
    watched.gpus.lost.add(GPU)
    watched.look()
    watched.cordons.clear()
    assert watched.look().cordons == []
    watched.gpus.told = [xid_fault(GPU, 48)]
    assert len(watched.look().cordons) == 1


def test_a_cordon_of_before_a_restart_is_kept_as_it_was_and_its_attempt_is_stopped() -> None:
    watched = Watched(leases={ID: (lease(),)})
    watched.gpus.lost.add(GPU)
    watched.look()
    before = dict(watched.cordons)
    watched.watch = DeviceWatch("a")
    found = watched.look()
    assert (watched.cordons, told(found), len(found.stops)) == (before, [], 1)


def test_what_runs_on_a_broken_gpu_that_a_restart_no_longer_finds_is_stopped_too() -> None:
    watched = Watched(leases={ID: (lease(),)})
    watched.cordons[ID] = Cordon(device=ID, cause="fault", reason="GPU is lost", by="a", cordoned_at=TIME)
    del watched.gpus.memory_bytes[GPU]
    assert [stop.job for stop in watched.look().stops] == ["j-1"]


@pytest.mark.parametrize(("xid", "is_cordoned"), [(63, True), (92, True), (13, False), (43, False), (999, False)])
def test_what_does_not_break_a_gpu_stops_nobody(xid: int, *, is_cordoned: bool) -> None:
    watched = Watched(leases={ID: (lease(),)})
    watched.gpus.told = [xid_fault(GPU, xid)]
    found = watched.look()
    assert ([cordon.cause for cordon in found.cordons], found.stops) == (["worn"] if is_cordoned else [], [])
    assert told(found)[0] == "device.xid"


def test_a_cordon_by_a_person_stops_nobody_and_a_fault_on_top_of_it_does() -> None:
    watched = Watched(leases={ID: (lease(),)})
    watched.cordons[ID] = Cordon(device=ID, reason="noisy", by="ann", cordoned_at=TIME)
    assert watched.look().stops == []
    watched.gpus.told = [xid_fault(GPU, 95)]
    assert len(watched.look().stops) == 1
    assert watched.cordons[ID].cause == "fault"


def test_a_lease_by_hand_is_its_holders_to_end_and_all_sharers_of_a_broken_gpu_are_stopped() -> None:
    shared = tuple(lease(f"j-{number}", share=number, shares=4) for number in (1, 1, 2))
    watched = Watched(leases={ID: (*shared, lease("ann", epoch=0, share=4, shares=4))}, shares=4)
    watched.gpus.told = [xid_fault(GPU, 79)]
    found = watched.look()
    assert [stop.job for stop in found.stops] == ["j-1", "j-2"]
    assert {one.job for one in found.told} == {None}


def test_a_fault_of_a_gpu_that_is_not_known_is_left_out() -> None:
    watched = Watched()
    watched.gpus.told = [xid_fault("GPU-ffffffff-0", 79)]
    assert told(watched.look()) == []


# --- memory that is not given back -----------------------------------------------------------------------------------


def test_the_idle_use_of_a_gpu_is_the_least_that_was_seen() -> None:
    watched = Watched()
    seen = []
    for used in (5 * GIB, GIB, 3 * GIB, 2 * GIB):
        watched.gpus.used_bytes[GPU] = used
        seen.append(gpu_of(watched.look()).memory_idle_bytes)
    assert seen == [5 * GIB, GIB, GIB, GIB]


@pytest.mark.parametrize(
    ("used", "pids", "clear"),
    [(0, [], True), (SLACK_BYTES, [], True), (SLACK_BYTES + 1, [], False), (0, [7], False), (GIB, [7], False)],
)
def test_a_gpu_is_clear_when_nobody_computes_on_it_and_its_memory_is_back(
    used: int, pids: list[int], *, clear: bool
) -> None:
    watched = Watched()
    watched.look()
    watched.gpus.used_bytes[GPU], watched.gpus.pids[GPU] = used, pids
    assert is_clear(gpu_of(watched.look())) == clear


def test_a_gpu_that_is_not_clear_in_time_is_cordoned_as_dirty_and_comes_back_by_itself() -> None:
    watched = Watched()
    watched.look()
    watched.marked_at = watched.now
    watched.gpus.used_bytes[GPU], watched.gpus.pids[GPU] = 3 * GIB, [4711]
    assert watched.look(after_s=CLEAR_S - 0.1).cordons == []
    found = watched.look(after_s=0.1)
    (cordon,) = found.cordons
    assert (cordon.cause, told(found), found.stops) == ("dirty", ["device.cordoned"], [])
    assert "j-1" in cordon.reason
    assert "3072 MiB" in cordon.reason
    assert "4711" in cordon.reason
    assert told(watched.look()) == []
    watched.gpus.used_bytes[GPU], watched.gpus.pids[GPU] = 0, []
    assert (told(watched.look()), watched.cordons) == (["device.uncordoned"], {})


def test_memory_without_a_process_is_told_as_such_and_a_person_may_declare_it_idle() -> None:
    watched = Watched()
    watched.look()
    watched.marked_at = watched.now
    watched.gpus.used_bytes[GPU] = GIB
    (cordon,) = watched.look(after_s=CLEAR_S).cordons
    assert "1024 MiB of its memory are in use and the driver names no process" in cordon.reason
    watched.cordons.clear()
    found = watched.look()
    assert (found.cordons, is_clear(gpu_of(found))) == ([], True)


def test_a_gpu_that_others_share_is_not_cordoned_for_their_use_of_it() -> None:
    watched = Watched(shares=2)
    watched.look()
    watched.leases[ID] = (lease("j-2", share=2, shares=2),)
    watched.marked_at = watched.now
    watched.gpus.pids[GPU] = [12]
    assert watched.look(after_s=CLEAR_S + 1).cordons == []


def test_a_cpu_slot_is_never_dirty() -> None:
    slot = device("a-cpu0").changed(memory_used_bytes=8 * GIB)
    use = Use(marks={slot.id: (mark(slot.id, "j-1"), 0.0)})
    assert DeviceWatch("a").look(Reading((slot,)), use, now=10 * CLEAR_S, at=TIME) == Findings(devices=[slot])


def test_a_gpu_in_use_is_described_by_at_most_eight_processes() -> None:
    watched = Watched()
    watched.gpus.pids[GPU] = list(range(1, 20))
    assert in_use(gpu_of(watched.look())).endswith("1, 2, 3, 4, 5, 6, 7, 8")


# --- leaks and divisions ---------------------------------------------------------------------------------------------


def test_processes_on_a_gpu_that_nobody_has_are_told_once_for_each_set_of_them() -> None:
    watched = Watched(leases={ID: (lease(),)})
    watched.gpus.pids[GPU] = [11, 12]
    assert told(watched.look()) == []
    watched.leases = {}
    found = watched.look()
    assert [(one.what, one.data) for one in found.told] == [("device.leaked", {"device": ID, "pids": [11, 12]})]
    assert told(watched.look()) == []
    watched.gpus.pids[GPU] = [12]
    assert told(watched.look()) == ["device.leaked"]
    watched.gpus.pids[GPU] = []
    assert told(watched.look()) == []


def test_strangers_that_are_tolerated_do_not_count_and_what_a_job_leaves_behind_does() -> None:
    watched = Watched(watch=DeviceWatch("a", tolerates_strangers=True))
    watched.gpus.pids[GPU] = [1, 2]
    found = watched.look()
    assert (told(found), gpu_of(found).compute_pids) == ([], ())
    watched.leases[ID] = (lease(),)
    watched.gpus.pids[GPU] = [1, 4711]
    assert gpu_of(watched.look()).compute_pids == (4711,)
    watched.leases.clear()
    watched.marked_at = watched.now
    (cordon,) = watched.look(after_s=CLEAR_S).cordons
    assert cordon.reason.endswith("these processes compute on it: 4711")
    watched.gpus.pids[GPU], watched.gpus.used_bytes[GPU] = [1], 3 * GIB  # the strangers' own
    assert told(watched.look()) == ["device.uncordoned"]


def test_a_new_division_of_a_gpu_waits_until_nobody_has_it() -> None:
    watched = Watched(shares=4)
    assert gpu_of(watched.look()).shares == 4
    watched.leases[ID] = (lease(share=2, shares=4),)
    watched.shares = 1
    assert gpu_of(watched.look()).shares == 4
    watched.leases.clear()
    assert gpu_of(watched.look()).shares == 1
    watched.leases[ID] = (lease(),)
    watched.shares = 8
    assert gpu_of(watched.look()).shares == 1
