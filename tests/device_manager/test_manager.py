"""The device_manager's view: who has which device, which attempts are lost, when a device may be granted again."""

from __future__ import annotations

import pytest

from cluster_for_tests import active, device, host_report, job, lease, mark, runner
from railbus_device_manager.manager import DeviceManager, LostAttempt
from railbus_shared.contracts.devices import Lease
from railbus_shared.contracts.jobs import JobRecord

TTL_S = 10.0
LONG_AGO = 0.0


def manager(*records: JobRecord, devices: tuple[str, ...] = ("a-gpu0", "a-gpu1")) -> DeviceManager:
    """A manager that has just seen host `a` with a ready runner, and the records."""
    made = DeviceManager()
    made.facts.apply_host("a", host_report("a", *(device(device_id) for device_id in devices)))
    made.facts.apply_runner("a", runner("a"), now=0)
    for record in records:
        made.facts.apply_record(record.id, record, now=0)
    return made


def hear_host(made: DeviceManager, *, at: float, **changes: object) -> None:
    """Host `a` reports again, with these fields of its first device changed."""
    first, *rest = made.facts.hosts["a"].devices
    made.facts.apply_host("a", host_report("a", first.changed(**changes), *rest), heard_at=at)


def lost(made: DeviceManager, now: float, *, contact_since: float = LONG_AGO) -> list[LostAttempt]:
    return made.lost(now, contact_since=contact_since, ttl_s=TTL_S, grace_s=1, placed_grace_s=5)


def states(made: DeviceManager) -> dict[str, tuple[str, str | None]]:
    return {state.device.id: (state.state, state.holder) for state in made.device_states()}


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_healthy", [True, False])
@pytest.mark.parametrize("is_cordoned", [True, False])
@pytest.mark.parametrize("is_draining", [True, False])
@pytest.mark.parametrize("has_lease", [True, False])
@pytest.mark.parametrize("has_mark", [True, False])
@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("is_haunted", [True, False])
def test_a_device_is_leased_else_reclaiming_else_cordoned_else_unhealthy_else_draining_else_free(
    *,
    is_healthy: bool,
    is_cordoned: bool,
    is_draining: bool,
    has_lease: bool,
    has_mark: bool,
    is_named: bool,
    is_haunted: bool,
) -> None:
    made = DeviceManager()
    one = device("a-gpu0", healthy=is_healthy).changed(cordoned=is_cordoned, compute_pids=(4711,) if is_haunted else ())
    made.facts.apply_host("a", host_report("a", one, draining=is_draining))
    if has_lease:
        made.facts.apply_lease("a-gpu0", lease("a-gpu0", "j-1"), now=0)
    if has_mark:
        made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-2"), now=0)
    if is_named:
        made.facts.apply_record("j-3", active("j-3", "a-gpu0"), now=0)
    words = {
        "leased": has_lease,
        "reclaiming": is_named or has_mark,
        "cordoned": is_cordoned,
        "unhealthy": not is_healthy,
        "draining": is_draining,
    }
    expected = next((word for word, holds in words.items() if holds), "reclaiming" if is_haunted else "free")
    holder = "j-1" if has_lease else "j-3" if is_named else "j-2" if has_mark else None
    assert states(made) == {"a-gpu0": (expected, holder)}


def share(device_id: str, holder: str, number: int, *, of: int) -> Lease:
    return lease(device_id, holder).changed(share=number, shares=of)


def test_a_shared_gpu_is_free_while_a_share_is_and_names_its_holders() -> None:
    made = manager(active("j-1", "a-gpu0"))
    hear_host(made, at=1, shares=3, compute_pids=[4711])
    seen = []
    for number, holder in ((1, "j-1"), (2, "j-2"), (3, "j-2")):
        made.facts.apply_lease(f"a-gpu0.{number}", share("a-gpu0", holder, number, of=3), now=1)
        state = made.device_states()[0]
        seen.append((state.state, state.free_shares, state.holders, state.holder))
    assert seen == [
        ("free", 2, ("j-1",), None),
        ("free", 1, ("j-1", "j-2"), None),
        ("leased", 0, ("j-1", "j-2"), "j-1"),
    ]
    made.facts.apply_lease("a-gpu0.1", None, now=2)
    assert states(made)["a-gpu0"] == ("reclaiming", "j-1")  # its record names the device still
    made.facts.apply_record("j-1", None, now=3)
    assert made.device_states()[0].free_shares == 1


def test_an_attempt_with_a_live_lease_of_a_share_is_not_lost() -> None:
    made = manager(active("j-1", "a-gpu0"))
    made.facts.apply_lease("a-gpu0.2", share("a-gpu0", "j-1", 2, of=2), now=0)
    assert lost(made, 1000) == []
    made.facts.apply_lease("a-gpu0.2", None, now=1000)
    assert [found.record.id for found in lost(made, 1001)] == ["j-1"]


def test_a_gpu_leased_under_another_division_has_no_free_shares() -> None:
    made = manager()
    hear_host(made, at=1, shares=4)
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", "j-1"), now=1)
    assert states(made)["a-gpu0"] == ("leased", "j-1")


@pytest.mark.parametrize("state", ["placed", "running", "checkpointing"])
def test_an_expired_lease_frees_nothing_while_a_record_names_the_device(state: str) -> None:
    made = manager(active("j-1", "a-gpu0", state=state), job("j-2", kind="gpu", count=2))
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", "j-1"), now=0)
    assert states(made)["a-gpu0"] == ("leased", "j-1")
    made.facts.apply_lease("a-gpu0", None, now=1)
    assert states(made)["a-gpu0"] == ("reclaiming", "j-1")
    assert made.plan(1).placements == []


@pytest.mark.parametrize("state", ["queued", "succeeded", "failed", "cancelled"])
def test_a_record_that_is_not_active_holds_no_devices(state: str) -> None:
    made = manager(active("j-1", "a-gpu0"))
    made.facts.apply_record("j-1", active("j-1", "a-gpu0").changed(state=state), now=1)
    assert states(made)["a-gpu0"] == ("free", None)


def test_a_host_whose_report_is_gone_has_no_devices() -> None:
    made = manager()
    made.facts.apply_host("a", None)
    assert made.device_states() == []


# --- the plan --------------------------------------------------------------------------------------------------------


def placed(made: DeviceManager, now: float = 0) -> dict[str, tuple[str, ...]]:
    return {placement.job_id: tuple(placement.device_ids) for placement in made.plan(now).placements}


def test_queued_jobs_are_placed_on_what_is_free() -> None:
    made = manager(job("j-1"), job("j-2"), job("j-3"))
    assert placed(made) == {"j-1": ("a-gpu0",), "j-2": ("a-gpu1",)}
    assert made.reasons(0) == {"j-3": "waits for 1 gpu device: a has 1 given to j-1, 1 given to j-2"}


def test_a_job_that_is_being_cancelled_is_not_placed() -> None:
    made = manager(job("j-1").changed(cancel_requested=True))
    assert placed(made) == {}
    assert made.reasons(0) == {"j-1": "is being cancelled"}


def test_a_job_is_placed_once_those_before_it_have_succeeded() -> None:
    made = manager(job("j-1"), job("j-2", after=("j-1",)))
    assert placed(made) == {"j-1": ("a-gpu0",)}
    assert made.reasons(0) == {"j-2": "waits for job to succeed: j-1 (queued)"}
    made.facts.apply_record("j-1", job("j-1").changed(state="succeeded"), now=1)
    assert placed(made, 1) == {"j-2": ("a-gpu0",)}


def test_a_retry_stands_for_the_job_that_others_come_after() -> None:
    made = manager(job("j-1"), job("j-2", after=("j-1",)))
    made.facts.apply_record("j-1", job("j-1").changed(state="failed"), now=1)
    assert made.reasons(1) == {
        "j-2": "waits for job to succeed: j-1 (failed); j-1 will not succeed unless it is retried"
    }
    for number, state in ((9, "cancelled"), (10, "running")):
        again = job(f"j-{number}").changed(retry_of="j-1", state=state)
        made.facts.apply_record(again.id, again, now=2)
    assert made.reasons(2) == {"j-2": "waits for job to succeed: j-1 (running)"}
    made.facts.apply_record(again.id, again.changed(state="succeeded"), now=3)
    assert placed(made, 3) == {"j-2": ("a-gpu0",)}


def test_a_job_that_waits_for_others_keeps_no_devices_from_those_behind_it() -> None:
    made = manager(job("j-1", priority=9, after=("j-0",), count=2), job("j-2"))
    assert placed(made) == {"j-2": ("a-gpu0",)}


def queued_again(backoff_s: float, *, lease_epoch: int = 1) -> JobRecord:
    return job("j-1").changed(backoff_s=backoff_s, lease_epoch=lease_epoch)


def test_a_job_waits_out_its_backoff_from_when_it_was_first_seen() -> None:
    made = manager(active("j-1", "b-gpu0"))
    made.facts.apply_record("j-1", queued_again(5), now=10)
    made.facts.apply_record("j-1", queued_again(5).changed(priority=3), now=14)
    assert placed(made, 14.5) == {}
    assert made.reasons(12.5) == {"j-1": "is tried again in 3 s"}
    assert placed(made, 15) == {"j-1": ("a-gpu0",)}


def test_each_backoff_is_counted_anew() -> None:
    made = manager(active("j-1", "b-gpu0"))
    made.facts.apply_record("j-1", queued_again(5), now=10)
    made.facts.apply_record("j-1", queued_again(5, lease_epoch=2), now=14)
    assert placed(made, 18) == {}
    made.facts.apply_record("j-1", queued_again(0, lease_epoch=2), now=18)
    assert placed(made, 18) == {"j-1": ("a-gpu0",)}


def test_a_job_that_a_person_holds_is_not_placed() -> None:
    made = manager(job("j-1").changed(held_by="ada"))
    assert placed(made) == {}
    assert made.reasons(0) == {"j-1": "is held by ada, until `railbus release`"}


def test_the_records_priority_counts_and_not_the_specs() -> None:
    made = manager(job("j-1", count=2), job("j-2", priority=-5, count=2).changed(priority=5))
    assert list(placed(made)) == ["j-2"]


def test_a_runner_whose_report_is_gone_gets_no_jobs() -> None:
    made = manager(job("j-1"))
    made.facts.apply_runner("a", None, now=1)
    assert placed(made, 1) == {}


# --- lost attempts ---------------------------------------------------------------------------------------------------


def with_lapsed_lease(*, at: float) -> DeviceManager:
    made = manager(active("j-1", "a-gpu0", lease_epoch=3))
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", "j-1", lease_epoch=3), now=0)
    made.facts.apply_lease("a-gpu0", None, now=at)
    return made


def test_an_attempt_is_lost_once_it_has_been_without_a_lease_for_the_grace() -> None:
    made = with_lapsed_lease(at=20)
    assert lost(made, 20.9) == []
    (found,) = lost(made, 21)
    assert found.record.id == "j-1"


def test_an_attempt_with_a_live_lease_is_never_lost() -> None:
    made = manager(active("j-1", "a-gpu0", "a-gpu1"))
    for device_id in ("a-gpu0", "a-gpu1"):
        made.facts.apply_lease(device_id, lease(device_id, "j-1"), now=0)
    made.facts.apply_lease("a-gpu0", None, now=20)
    assert lost(made, 1000) == []
    made.facts.apply_lease("a-gpu1", None, now=1000)
    assert [found.record.id for found in lost(made, 1001)] == ["j-1"]


@pytest.mark.parametrize(("holder", "lease_epoch"), [("j-1", 2), ("j-2", 3), ("ann", 0)])
def test_a_lease_of_an_older_attempt_or_of_another_holder_does_not_keep_an_attempt_alive(
    holder: str, lease_epoch: int
) -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", holder, lease_epoch=lease_epoch), now=20.5)
    assert [found.record.id for found in lost(made, 21)] == ["j-1"]


def test_a_lease_that_is_taken_up_again_saves_the_attempt() -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", "j-1", lease_epoch=3), now=20.5)
    assert lost(made, 1000) == []
    made.facts.apply_lease("a-gpu0", None, now=1000)
    assert lost(made, 1000.5) == []


@pytest.mark.parametrize("state", ["queued", "succeeded", "failed", "cancelled"])
def test_an_attempt_that_ended_in_time_is_not_lost(state: str) -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_record("j-1", active("j-1", "a-gpu0", lease_epoch=3).changed(state=state), now=20.5)
    assert lost(made, 1000) == []


@pytest.mark.parametrize(("since_contact_s", "is_lost"), [(0, False), (TTL_S - 0.1, False), (TTL_S, True)])
def test_lapsed_leases_prove_nothing_for_one_life_of_a_lease_after_a_reconnect(
    since_contact_s: float, is_lost: bool
) -> None:
    made = with_lapsed_lease(at=20)
    assert bool(lost(made, 100, contact_since=100 - since_contact_s)) == is_lost


@pytest.mark.parametrize(
    ("state", "after_s", "is_lost"),
    [("placed", 4.9, False), ("placed", 5, True), ("running", 0.9, False), ("running", 1, True)],
)
def test_a_placed_job_without_leases_is_given_longer_than_a_running_one(
    state: str, after_s: float, is_lost: bool
) -> None:
    made = DeviceManager()
    made.facts.apply_record("j-1", active("j-1", "a-gpu0", state=state), now=100)
    assert bool(lost(made, 100 + after_s)) == is_lost


def test_the_time_without_a_lease_begins_anew_with_every_attempt() -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_record("j-1", active("j-1", "a-gpu1", lease_epoch=4), now=100)
    assert lost(made, 100.9) == []
    assert lost(made, 101)[0].record.lease_epoch == 4


def test_a_change_of_the_record_within_an_attempt_does_not_begin_the_time_anew() -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_record("j-1", active("j-1", "a-gpu0", lease_epoch=3, state="checkpointing"), now=20.9)
    assert len(lost(made, 21)) == 1


@pytest.mark.parametrize(
    ("attempts", "heard_at", "live", "cause", "gone"),
    [
        # heard after the lapse, and without the attempt: its devices are free at once
        ((), 20.5, True, "runner_lost", True),
        ((("j-1", 2), ("j-2", 3)), 20.5, True, "runner_lost", True),
        # it still has the attempt
        ((("j-1", 3),), 20.5, True, "lease_lost", False),
        # what was said before the lapse, or came out of the store, proves nothing
        ((), 19.0, True, "runner_lost", False),
        ((), 20.0, True, "runner_lost", False),
        ((), 20.5, False, "runner_lost", False),
    ],
)
def test_only_a_report_made_after_the_lapse_and_without_the_attempt_shows_that_its_processes_are_gone(
    attempts: tuple[tuple[str, int], ...], heard_at: float, live: bool, cause: str, gone: bool
) -> None:
    made = with_lapsed_lease(at=20)
    hear_host(made, at=20.5)
    made.facts.apply_runner("a", runner("a", *attempts), now=heard_at, live=live)
    (found,) = lost(made, 21)
    assert (found.cause, found.processes_gone) == (cause, gone)
    assert found.marks == (() if gone else ("a-gpu0",))


@pytest.mark.parametrize(("host_is_there", "cause"), [(True, "runner_lost"), (False, "host_lost")])
def test_without_a_runner_report_the_devices_need_marks(host_is_there: bool, cause: str) -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_runner("a", None, now=20.5)
    if not host_is_there:
        made.facts.apply_host("a", None)
    (found,) = lost(made, 21)
    assert (found.cause, found.processes_gone, found.marks) == (cause, False, ("a-gpu0",))


# --- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts", "heard_at", "live", "is_released"),
    [
        ((), 11, True, True),
        ((("j-1", 2),), 11, True, True),
        ((("j-2", 1),), 11, True, True),
        ((("j-1", 1),), 11, True, False),
        ((), 10, True, False),
        ((), 9, True, False),
        ((), 11, False, False),
    ],
)
def test_a_mark_goes_when_the_runner_is_heard_after_it_without_the_attempt(
    attempts: tuple[tuple[str, int], ...], heard_at: float, live: bool, is_released: bool
) -> None:
    made = manager()
    made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-1"), now=10)
    hear_host(made, at=11)
    made.facts.apply_runner("a", runner("a", *attempts), now=heard_at, live=live)
    assert made.released_marks() == ([mark("a-gpu0", "j-1")] if is_released else [])


@pytest.mark.parametrize(
    ("heard_at", "changes", "is_released"),
    [
        (11, {}, True),
        (11, {"memory_used_bytes": 900 << 20, "memory_idle_bytes": 700 << 20}, True),
        (11, {"memory_used_bytes": 901 << 20, "memory_idle_bytes": 700 << 20}, False),
        (11, {"compute_pids": [4711]}, False),
        (10, {}, False),
        (None, {}, False),
    ],
)
def test_a_mark_on_a_gpu_goes_only_when_its_host_has_reported_since_that_the_memory_is_back(
    heard_at: float | None, changes: dict[str, object], *, is_released: bool
) -> None:
    made = manager()
    made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-1"), now=10)
    made.facts.apply_runner("a", runner("a"), now=11)
    if heard_at is not None:
        hear_host(made, at=heard_at, **changes)
    assert bool(made.released_marks()) == is_released


def test_a_mark_on_a_cpu_slot_needs_no_report_of_memory() -> None:
    made = manager(devices=("a-cpu0",))
    made.facts.apply_mark("a-cpu0", mark("a-cpu0", "j-1"), now=10)
    made.facts.apply_runner("a", runner("a"), now=11)
    assert len(made.released_marks()) == 1


def test_a_mark_on_a_gpu_that_others_share_goes_with_the_attempts_processes() -> None:
    made = manager()
    hear_host(made, at=11, compute_pids=[4711], shares=2)
    made.facts.apply_lease("a-gpu0.2", share("a-gpu0", "j-2", 2, of=2), now=10)
    made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-1"), now=10)
    made.facts.apply_runner("a", runner("a"), now=11)
    assert len(made.released_marks()) == 1


@pytest.mark.parametrize(("changes", "gone"), [({}, True), ({"compute_pids": [4711]}, False)])
def test_a_lost_attempt_on_a_gpu_leaves_a_mark_unless_its_memory_is_back(
    changes: dict[str, object], *, gone: bool
) -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_runner("a", runner("a"), now=20.5)
    hear_host(made, at=20.5, **changes)
    (found,) = lost(made, 21)
    assert (found.processes_gone, found.marks) == (gone, () if gone else ("a-gpu0",))


def test_a_mark_stays_while_the_runner_is_silent() -> None:
    made = manager()
    made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-1"), now=10)
    made.facts.apply_runner("a", None, now=11)
    assert made.released_marks() == []


def test_a_mark_that_is_seen_twice_keeps_its_time_and_another_one_begins_anew() -> None:
    made = manager()
    made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-1"), now=10)
    made.facts.apply_runner("a", runner("a"), now=11)
    hear_host(made, at=11)
    made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-1"), now=12)
    assert len(made.released_marks()) == 1
    made.facts.apply_mark("a-gpu0", mark("a-gpu0", "j-2"), now=13)
    assert made.released_marks() == []


def test_a_lost_host_gives_its_job_away_at_once_and_its_devices_only_after_it_has_come_back() -> None:
    made = with_lapsed_lease(at=20)
    made.facts.apply_host("b", host_report("b", device("b-gpu0")))
    made.facts.apply_runner("b", runner("b"), now=20)
    made.facts.apply_runner("a", None, now=20)
    (found,) = lost(made, 21)
    for device_id in found.marks:
        made.facts.apply_mark(device_id, mark(device_id, "j-1", lease_epoch=3), now=21)
    made.facts.apply_record("j-1", job("j-1").changed(lease_epoch=3), now=21)
    assert placed(made, 21) == {"j-1": ("b-gpu0",)}
    assert states(made)["a-gpu0"] == ("reclaiming", "j-1")
    made.facts.apply_runner("a", runner("a", ("j-1", 3)), now=30)
    assert made.released_marks() == []
    made.facts.apply_runner("a", runner("a"), now=33)
    assert made.released_marks() == []
    hear_host(made, at=33)
    (released,) = made.released_marks()
    made.facts.apply_mark(released.device, None, now=33)
    assert states(made)["a-gpu0"] == ("free", None)
