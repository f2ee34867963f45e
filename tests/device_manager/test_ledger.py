"""What placement remembers of jobs, on the clock of its process."""

from __future__ import annotations

import math

import pytest

from cluster_for_tests import active, device, host_report, job, lease, runner
from railbus_device_manager.cluster import Cluster
from railbus_device_manager.ledger import Ledger
from railbus_device_manager.manager import ClusterFacts, DeviceManager
from railbus_device_manager.run_times import RunTimes
from railbus_device_manager.wishes import Waiting
from railbus_shared import clock
from railbus_shared.contracts.jobs import JobRecord

HALF_LIFE_S = 100.0


def told(*changes: tuple[float, JobRecord], ledger: Ledger | None = None) -> Ledger:
    """A ledger that was told changes of records at these times."""
    made = ledger or Ledger(half_life_s=HALF_LIFE_S)
    before: dict[str, JobRecord] = {}
    for now, record in changes:
        made.observe(record.id, before.get(record.id), record, now=now)
        before[record.id] = record
        if record.is_final:
            del before[record.id]
    return made


def of(owner: str, record: JobRecord) -> JobRecord:
    return record.changed(spec=record.spec.changed(owner=owner))


# --- what owners used ------------------------------------------------------------------------------------------------

RUNS = of("ann", active("j-1", "a-gpu0"))
ENDED = RUNS.changed(state="failed", devices=())


@pytest.mark.parametrize(
    ("held_s", "since_s", "expected"),
    [(100, 0, 0.5), (100, 100, 0.25), (200, 0, 0.75), (1, 0, 0.0069), (100_000, 0, 1.0), (100_000, 200, 0.25)],
)
def test_what_an_owner_used_fades_by_its_half_life(held_s: float, since_s: float, expected: float) -> None:
    ledger = told((0, RUNS), (held_s, ENDED))
    assert ledger.recent(held_s + since_s).get("ann", 0.0) == pytest.approx(expected, abs=1e-4)


def test_two_attempts_of_one_job_and_two_jobs_of_one_owner_add_up() -> None:
    again = RUNS.changed(lease_epoch=2)
    other = of("ann", active("j-2", "a-gpu1"))
    ledger = told((0, RUNS), (0, other), (100, again), (100, other.changed(state="failed")), (100, ENDED))
    assert ledger.recent(100)["ann"] == pytest.approx(1.0)


def test_a_job_that_runs_is_a_holder_and_one_that_has_ended_is_none() -> None:
    ledger = told((0, RUNS))
    assert ledger.holders({"j-1": RUNS}, 5)["j-1"].owner == "ann"
    ledger.observe("j-1", RUNS, ENDED, now=9)
    assert ledger.holders({}, 9) == {}


# --- ends ------------------------------------------------------------------------------------------------------------


def limited(record: JobRecord, limit_s: float) -> JobRecord:
    return record.changed(spec=record.spec.changed(time_limit_s=limit_s))


def test_a_job_with_a_time_limit_ends_by_it_at_the_latest_counted_from_its_start() -> None:
    placed = limited(active("j-1", "a-gpu0", state="placed"), 60)
    ledger = told((0, placed))
    assert ledger.holders({"j-1": placed}, 0)["j-1"].ends_at == math.inf
    runs = placed.changed(state="running")
    ledger.observe("j-1", placed, runs, now=7)
    found = ledger.holders({"j-1": runs}, 9)["j-1"]
    assert (found.ends_at, found.is_certain) == (67, True)


def test_a_job_that_ran_before_this_process_did_is_known_by_its_record_unless_it_was_tried_again() -> None:
    runs = limited(active("j-1", "a-gpu0"), 60).changed(started_at=clock.rfc3339(1_010 * clock.NS_PER_S), attempt=1)
    offset = Ledger(wall_offset_s=1_000.0)
    assert told((30, runs), ledger=offset).holders({"j-1": runs}, 30)["j-1"].ends_at == 70
    assert told((30, runs)).holders({"j-1": runs}, 30)["j-1"].ends_at == math.inf
    again = runs.changed(attempt=2)
    later = Ledger(wall_offset_s=1_000.0)
    assert told((30, again), ledger=later).holders({"j-1": again}, 30)["j-1"].ends_at == math.inf


def test_what_a_preemption_may_lose_begins_anew_with_every_checkpoint() -> None:
    saved = RUNS.changed(checkpoint={"number": 1, "step": 5, "sha256": "0" * 64})
    ledger = told((0, RUNS), (40, saved))
    assert ledger.holders({"j-1": saved}, 50)["j-1"].unsaved_s == 10


# --- who made room ---------------------------------------------------------------------------------------------------


def test_a_job_that_made_room_is_left_alone_for_a_while_and_its_devices_are_kept_for_the_other() -> None:
    leaving = RUNS.changed(preempted_by="j-2")
    queued = job("j-1").changed(lease_epoch=1)
    again = active("j-1", "a-gpu0", lease_epoch=2)
    ledger = told((0, job("j-2")), (0, RUNS), (10, leaving))
    assert not ledger.holders({"j-1": leaving}, 10)["j-1"].can_be_preempted
    assert ledger.cleared_for(10) == {"a-gpu0": "j-2"}
    ledger.observe("j-1", leaving, queued, now=20)
    assert ledger.cleared_for(20) == {"a-gpu0": "j-2"}
    ledger.observe("j-1", queued, again, now=30)
    assert not ledger.holders({"j-1": again}, 500)["j-1"].can_be_preempted
    assert ledger.holders({"j-1": again}, 620)["j-1"].can_be_preempted
    assert ledger.cleared_for(500) == {}


def test_devices_are_kept_no_longer_once_the_other_job_does_not_wait_any_more() -> None:
    ledger = told((0, job("j-2")), (0, RUNS), (10, RUNS.changed(preempted_by="j-2")))
    ledger.observe("j-2", job("j-2"), active("j-2", "b-gpu0"), now=11)
    assert ledger.cleared_for(11) == {}


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({}, True),
        ({"state": "placed"}, False),
        ({"state": "checkpointing"}, False),
        ({"cancel_requested": True}, False),
        ({"spec": RUNS.spec.changed(preemptible=False)}, False),
    ],
)
def test_only_a_running_job_that_allows_it_can_be_preempted(changes: dict[str, object], *, can: bool) -> None:
    record = RUNS.changed(**changes)
    assert told((0, record)).holders({"j-1": record}, 0)["j-1"].can_be_preempted == can


# --- run times -------------------------------------------------------------------------------------------------------


def took(seconds: float, *, state: str = "succeeded", attempt: int = 1, model: str = "m") -> JobRecord:
    record = job("j-1")
    return record.changed(
        state=state,
        attempt=attempt,
        spec=record.spec.changed(model=model),
        started_at=clock.rfc3339(0),
        ended_at=clock.rfc3339(round(seconds * clock.NS_PER_S)),
    )


def times(*records: JobRecord) -> RunTimes:
    made = RunTimes()
    for record in records:
        made.add(record)
    return made


@pytest.mark.parametrize(
    ("past", "limit_s", "latest", "expected", "basis"),
    [
        ((), None, math.inf, math.inf, ""),
        ((), 60.0, 160, 60, "its time limit"),
        ((10, 20), None, math.inf, math.inf, ""),
        ((10, 20, 60), None, 160, 20, "how long the last 3 jobs like it took"),
        ((10, 20, 60), 30.0, 130, 20, "how long the last 3 jobs like it took"),
        ((10, 20, 60), 15.0, 115, 15, "its time limit"),
    ],
)
def test_run_times_come_from_the_limit_and_from_three_or_more_jobs_like_it(
    past: tuple[float, ...], limit_s: float | None, latest: float, expected: float, basis: str
) -> None:
    known, waits = times(*map(took, past)), job("j-9", time_limit_s=limit_s)
    assert (known.expected_s(waits.spec), known.basis(waits.spec)) == (expected, basis)
    assert Cluster((), {}, now=100.0, run_times=known).latest_end(Waiting.of(waits)) == latest


def test_failed_and_repeated_jobs_and_those_of_another_model_tell_nothing() -> None:
    others = [took(5, state="failed"), took(5, attempt=2), took(5, model="other")]
    assert times(*others * 3).expected_s(job("j-9").spec) == math.inf


def test_old_run_times_are_forgotten() -> None:
    known = times(*[took(1000)] * 5, *[took(10)] * 20)
    assert known.longest_s(("classifier", "m")) == 10


# --- in the facts ----------------------------------------------------------------------------------------------------


def test_an_owner_who_used_much_goes_behind_one_who_used_nothing() -> None:
    made = DeviceManager(ClusterFacts(ledger=Ledger(half_life_s=HALF_LIFE_S)))
    made.facts.apply_host("a", host_report("a", device("a-gpu0")))
    made.facts.apply_runner("a", runner("a"), now=0)
    made.facts.apply_record("j-1", RUNS, now=0)
    made.facts.apply_lease("a-gpu0", lease("a-gpu0", "j-1"), now=0)
    for waiting in (of("ann", job("j-2")), of("bob", job("j-3"))):
        made.facts.apply_record(waiting.id, waiting, now=1)
    made.facts.apply_lease("a-gpu0", None, now=50)
    made.facts.apply_record("j-1", ENDED, now=50)
    assert [placement.job_id for placement in made.plan(50).placements] == ["j-3"]


def test_what_a_job_was_held_for_is_no_waiting() -> None:
    waits = job("j-1")
    assert told((3, waits), (5, waits.changed(reason="waits"))).queued_since == {"j-1": 3}
    held = waits.changed(held_by="ann")
    assert told((3, held)).queued_since == {}
    assert told((3, held), (60, waits)).queued_since == {"j-1": 60}
    assert told((3, waits), (60, held), (70, waits)).queued_since == {"j-1": 70}
