"""The life of a job: what may happen in which state, told late, twice and out of order."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from railbus_shared.contracts.jobs import FINAL_STATES, EndCause, ErrorBody, JobRecord, JobState
from railbus_shared.errors import Conflict, InvalidField, StaleLeaseEpoch
from railbus_shared.happenings import (
    HAPPENINGS,
    CancelAsked,
    Ended,
    Happening,
    Held,
    Lost,
    OfAttempt,
    Paused,
    Placed,
    PreemptAsked,
    PrioritySet,
    Released,
    ReleaseLeases,
    Started,
    StartRefused,
    StartTrainer,
    Stopping,
    StopTrainer,
    Tell,
)
from railbus_shared.lifecycle import TRANSITIONS, Decision, decide
from records_for_tests import (
    CAUSES,
    ERROR,
    HAPPENING_KINDS,
    STATES,
    T0,
    T1,
    T2,
    happenings,
    record,
    records,
    saved,
    spec,
)

ACTIVE: tuple[JobState, ...] = ("placed", "running", "checkpointing")
RUNNING: tuple[JobState, ...] = ("running", "checkpointing")
REFUSED = (Conflict, StaleLeaseEpoch)


def after(made: JobRecord, *happened: Happening) -> JobRecord:
    for one in happened:
        made = decide(made, one, T1).record
    return made


# --- whatever happens ------------------------------------------------------------------------------------------------


def test_the_table_and_the_code_know_the_same_states_and_happenings() -> None:
    assert set(TRANSITIONS) == set(STATES)
    assert set(HAPPENING_KINDS) == set(HAPPENINGS) == {kind for row in TRANSITIONS.values() for kind in row}


@given(records(), happenings())
def test_nothing_leads_where_the_table_does_not(made: JobRecord, happening: Happening) -> None:
    followers = TRANSITIONS[made.state].get(type(happening), frozenset())
    try:
        decision = decide(made, happening, T1)
    except REFUSED:
        return
    assert decision.before is made
    if decision.is_changed:
        assert decision.record.state in followers
        assert decision.record != made
        assert decision.record.changed_at == T1


def test_the_table_promises_nothing_that_cannot_be() -> None:
    """Every state that the table lets follow does follow in some case."""
    found: dict[tuple[JobState, type[Happening]], set[JobState]] = {}
    for made in _variants():
        for one in _one_of_each(made):
            with contextlib.suppress(*REFUSED):
                decision = decide(made, one, T1)
                if decision.is_changed:
                    found.setdefault((made.state, type(one)), set()).add(decision.record.state)
    listed = {(state, kind): set(states) for state, row in TRANSITIONS.items() for kind, states in row.items()}
    assert found == listed


def _variants() -> list[JobRecord]:
    once = spec(max_attempts=1, retry={"never_on": ["start_refused", "runner_lost"]})
    asked: tuple[dict[str, object], ...] = ({}, {"cancel_requested": True}, {"preempted_by": "j-2"})
    active = [
        record(state, of=of, **fields)
        for state in ACTIVE
        for of in (spec(), once)
        for fields in asked
    ]  # fmt: skip
    return [record("queued"), record("queued", held_by="ada"), *active]


def _one_of_each(made: JobRecord) -> list[Happening]:
    epoch, host = made.lease_epoch, made.host or "a"
    return [
        Placed(epoch + 1, "a", ("a-cpu0",)), Started(epoch, host), StartRefused(epoch, ERROR), Stopping(epoch, host),
        saved(lease_epoch=epoch, host=host), Lost(epoch, "runner_lost", ERROR), CancelAsked(), Released(),
        Paused(epoch, host, "paused for storage"), PreemptAsked(epoch, "j-2"), Held("ada"), PrioritySet(9),
        *(Ended(epoch, host, cause, None if cause in {"ok", "cancelled"} else ERROR) for cause in CAUSES),
    ]  # fmt: skip


def test_a_paused_job_says_so_until_its_next_checkpoint() -> None:
    paused = decide(record("running"), Paused(1, "a", "paused for storage: no space"), T1)
    assert (paused.record.state, paused.record.reason, paused.effects) == (
        "running",
        "paused for storage: no space",
        (),
    )
    assert not decide(paused.record, Paused(1, "a", "paused for storage: no space"), T2).is_changed
    assert decide(paused.record, saved(), T2).record.reason == ""


@given(records(states=("succeeded", "failed", "cancelled")), happenings())
def test_a_final_state_is_never_left(made: JobRecord, happening: Happening) -> None:
    with contextlib.suppress(*REFUSED):
        decision = decide(made, happening, T1)
        assert decision.record is made
        assert decision.effects == ()


@given(records(), happenings())
def test_an_attempt_that_the_record_does_not_name_changes_nothing(made: JobRecord, happening: Happening) -> None:
    if not isinstance(happening, OfAttempt):
        return
    host = getattr(happening, "host", None)
    is_named = made.is_active and made.lease_epoch == happening.lease_epoch and host in {None, made.host}
    if not is_named:
        with contextlib.suppress(StaleLeaseEpoch):
            assert not decide(made, happening, T1).is_changed


@given(records(), happenings())
def test_told_twice_is_told_once(made: JobRecord, happening: Happening) -> None:
    try:
        first = decide(made, happening, T1)
    except REFUSED:
        return
    second = _quietly(first.record, happening)
    if second is not None:
        assert second.record is first.record
        assert [effect for effect in second.effects if not isinstance(effect, StopTrainer)] == []


def _quietly(made: JobRecord, happening: Happening) -> Decision | None:
    try:
        return decide(made, happening, T2)
    except REFUSED:
        return None


@given(st.lists(happenings(), max_size=40))
def test_epochs_never_fall_and_attempts_stay_within_their_limit(happened: list[Happening]) -> None:
    made = record("queued", of=spec(max_attempts=2))
    ends = 0
    for one in happened:
        before, decision = made, _quietly(made, one)
        made = decision.record if decision is not None else made
        assert made.lease_epoch >= before.lease_epoch
        assert 0 <= made.attempt <= 2
        assert (made.host is not None) >= made.is_active
        assert JobRecord.parse(made.to_map()) == made
        ends += made.is_final and not before.is_final
    assert ends <= 1


# --- the way through -------------------------------------------------------------------------------------------------


def test_a_job_that_meets_no_trouble() -> None:
    placed = decide(record(), Placed(1, "a", ("a-cpu0",)), T1)
    assert placed.effects == (Tell("job.placed", {"placed_on": "a", "devices": ["a-cpu0"]}), StartTrainer())
    started = decide(placed.record, Started(1, "a"), T1)
    assert (started.record.attempt, started.record.started_at) == (1, T1)
    ended = decide(after(started.record, saved(4)), Ended(1, "a", "ok", None, 0), T2)
    assert (ended.record.state, ended.record.ended_at, ended.record.exit_code) == ("succeeded", T2, 0)
    told = {"cause": "ok", "exit_code": 0, "checkpoint": "checkpoint-000004"}
    assert ended.effects == (Tell("job.succeeded", told), ReleaseLeases())


def test_a_slower_placer_is_refused() -> None:
    placed = after(record(), Placed(1, "a", ("a-cpu0",)))
    for late in (Placed(1, "b", ("b-cpu0",)), Placed(2, "b", ("b-cpu0",))):
        with pytest.raises(REFUSED):
            decide(placed, late, T1)
    again = after(placed, StartRefused(1, ERROR))
    with pytest.raises(StaleLeaseEpoch, match="has lease epoch 1, not 0"):
        decide(again, Placed(1, "b", ("b-cpu0",)), T1)
    assert after(again, Placed(2, "b", ("b-cpu0",))).lease_epoch == 2


def test_of_two_placers_with_the_same_leases_one_starts() -> None:
    placed = after(record(), Placed(1, "a", ("a-cpu0",)))
    assert decide(placed, Placed(1, "a", ("a-cpu0",)), T1).effects == ()


@pytest.mark.parametrize("state", RUNNING)
@pytest.mark.parametrize("late", [saved(lease_epoch=1), saved(host="b", lease_epoch=2)])
def test_a_checkpoint_of_another_attempt_does_not_count(state: JobState, late: Happening) -> None:
    with pytest.raises(StaleLeaseEpoch, match="is over"):
        decide(record(state, lease_epoch=2), late, T1)


def test_a_refused_start_counts_as_nothing_and_waits() -> None:
    again = decide(record("placed"), StartRefused(1, ERROR), T1)
    assert (again.record.state, again.record.attempt, again.record.backoff_s) == ("queued", 0, 2.0)
    assert again.record.reason == "to be placed again: the trainer was killed"
    assert ReleaseLeases() in again.effects


def test_the_wait_ends_with_the_next_placement() -> None:
    again = after(record("placed"), StartRefused(1, ERROR))
    assert after(again, Placed(2, "a", ("a-cpu0",))).backoff_s == 0


# --- tried again -----------------------------------------------------------------------------------------------------

FINAL_CAUSES: tuple[EndCause, ...] = ("user_error", "bad_input", "device_oom", "host_oom", "time_limit", "hang")
COUNTED: tuple[EndCause, ...] = ("signal", "runner_lost", "lease_lost", "start_refused", "setup_failed", "storage_full")
UNCOUNTED: tuple[EndCause, ...] = ("device_fault", "host_lost", "preempted")


def ended(made: JobRecord, cause: EndCause) -> JobRecord:
    return after(made, Ended(made.lease_epoch, "a", cause, ERROR))


def run_again(made: JobRecord) -> JobRecord:
    epoch = made.lease_epoch + 1
    return after(made, Placed(epoch, "a", ("a-cpu0",)), Started(epoch, "a"))


def test_every_cause_is_one_of_these() -> None:
    assert {*FINAL_CAUSES, *COUNTED, *UNCOUNTED, "ok", "cancelled"} == set(CAUSES)


@pytest.mark.parametrize("state", RUNNING)
@pytest.mark.parametrize("cause", FINAL_CAUSES)
def test_what_would_come_again_ends_the_job(state: JobState, cause: EndCause) -> None:
    found = ended(record(state), cause)
    assert (found.state, found.end_cause, found.attempt) == ("failed", cause, 1)
    assert found.reason == "the trainer was killed"


@pytest.mark.parametrize("cause", COUNTED)
def test_a_loss_is_tried_again_until_the_attempts_are_used_up(cause: EndCause) -> None:
    made = record("running", of=spec(max_attempts=3))
    for attempt in (1, 2):
        made = ended(made, cause)
        assert (made.state, made.attempt, made.retries) == ("queued", attempt, attempt)
        made = run_again(made)
    made = ended(made, cause)
    assert (made.state, made.reason) == ("failed", "the trainer was killed (attempt 3 of 3)")


@pytest.mark.parametrize("cause", UNCOUNTED)
def test_what_is_not_the_jobs_fault_does_not_count(cause: EndCause) -> None:
    made = record("running", of=spec(max_attempts=1))
    for _ in range(3):
        made = ended(made, cause)
        assert (made.state, made.attempt, made.backoff_s) == ("queued", 0, 0)
        made = run_again(made)
    assert made.attempt == 1


@pytest.mark.parametrize(("cause", "limit"), [("device_fault", 5), ("host_lost", 13)])
def test_a_job_that_might_break_what_it_runs_on_does_not_go_round_for_ever(cause: EndCause, limit: int) -> None:
    made, count = record("running", of=spec(max_attempts=3)), 0
    while made.state == "running":
        made, count = ended(made, cause), count + 1
        made = run_again(made) if made.state == "queued" else made
    assert (made.state, made.end_cause, count) == ("failed", cause, limit + 1)
    assert f"{limit + 1} losses in a row" in made.reason


def test_a_checkpoint_ends_the_row() -> None:
    made = record("running", of=spec(max_attempts=1))
    for number in range(1, 20):
        made = run_again(ended(after(made, saved(number, lease_epoch=made.lease_epoch)), "device_fault"))
    assert made.state == "running"


def test_the_wait_doubles_up_to_its_limit_and_begins_anew_after_a_checkpoint() -> None:
    policy = {"backoff_s": 2, "max_backoff_s": 10}
    made, waits = record("running", of=spec(max_attempts=9, retry=policy)), []
    for _ in range(4):
        made = ended(made, "setup_failed")
        waits.append(made.backoff_s)
        made = run_again(made)
    assert waits == [2, 4, 8, 10]
    made = ended(after(made, saved(lease_epoch=made.lease_epoch)), "setup_failed")
    assert (made.backoff_s, made.retries) == (2, 1)


@pytest.mark.parametrize("cause", ["signal", "runner_lost", "lease_lost"])
def test_what_mostly_happens_once_is_tried_again_at_once_the_first_time(cause: EndCause) -> None:
    made = ended(record("running", of=spec(max_attempts=9, retry={"backoff_s": 2})), cause)
    assert made.backoff_s == 0
    assert ended(run_again(made), cause).backoff_s == 2


def test_a_job_may_say_what_is_tried_again() -> None:
    also = spec(retry={"also_on": ["user_error"]})
    assert ended(record("running", of=also), "user_error").state == "queued"
    never = spec(retry={"never_on": ["signal"], "also_on": ["signal"]})
    found = ended(record("running", of=never), "signal")
    assert (found.state, found.reason) == ("failed", "the trainer was killed")


@pytest.mark.parametrize("field", ["also_on", "never_on"])
@pytest.mark.parametrize("cause", ["ok", "cancelled"])
def test_what_always_ends_a_job_cannot_be_asked_to_be_tried_again(field: str, cause: str) -> None:
    with pytest.raises(InvalidField, match=f"'{cause}' always ends a job"):
        spec(retry={field: [cause]})


@pytest.mark.parametrize("cause", ["device_oom", "host_oom"])
def test_out_of_memory_comes_with_advice(cause: EndCause) -> None:
    found = ended(record("running"), cause)
    assert found.error is not None
    assert "smaller batch" in found.error.hint
    said = ErrorBody(code="OUT_OF_MEMORY", message="m", hint="the trainer knows better")
    assert after(record("running"), Ended(1, "a", cause, said)).error == said


@pytest.mark.parametrize("state", ACTIVE)
@pytest.mark.parametrize("cause", ["lease_lost", "runner_lost", "host_lost"])
def test_a_lost_attempt_counts_only_if_it_had_begun(state: JobState, cause: EndCause) -> None:
    found = after(record(state), Lost(1, cause, ERROR))
    expected = 1 if state != "placed" and cause != "host_lost" else 0
    assert (found.state, found.attempt, found.host, found.devices) == ("queued", expected, None, ())


# --- cancelled -------------------------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once() -> None:
    found = decide(record(held_by="ben"), CancelAsked(by="ada"), T1)
    assert (found.record.state, found.record.reason, found.record.ended_at) == ("cancelled", "cancelled by ada", T1)
    assert found.effects == (Tell("job.cancelled", {"cause": "cancelled", "by": "ada"}),)


@pytest.mark.parametrize("state", ACTIVE)
def test_an_active_job_is_asked_to_end_and_again_means_sooner(state: JobState) -> None:
    asked = decide(record(state, of=spec(stop_grace_s=7)), CancelAsked(by="ada"), T1)
    assert (asked.record.state, asked.record.cancel_requested, asked.record.cancelled_by) == (state, True, "ada")
    assert asked.effects == (Tell("job.cancel_requested", {"by": "ada"}), StopTrainer("cancelled", 7))
    again = decide(asked.record, CancelAsked(by="ben", at_once=True), T2)
    assert (again.record, again.effects) == (asked.record, (StopTrainer("cancelled", 0),))


@pytest.mark.parametrize("cause", CAUSES)
def test_whoever_was_promised_a_cancellation_gets_it(cause: EndCause) -> None:
    asked = after(record("running"), CancelAsked())
    found = after(asked, Ended(1, "a", cause, ERROR))
    assert (found.state, found.end_cause, found.error) == ("cancelled", "cancelled", None)


@pytest.mark.parametrize("happening", [Started(1, "a"), StartRefused(1, ERROR), Lost(1, "runner_lost", ERROR)])
def test_a_cancelled_job_ends_whatever_becomes_of_its_start(happening: Happening) -> None:
    asked = after(record("placed"), CancelAsked())
    found = decide(asked, happening, T1)
    assert (found.record.state, found.record.attempt) == ("cancelled", 0)
    assert ReleaseLeases() in found.effects


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_a_cancel_that_comes_too_late_finds_the_real_end(state: JobState) -> None:
    made = record(state)
    assert decide(made, CancelAsked(), T1) == Decision(made, made)


# --- making room -----------------------------------------------------------------------------------------------------


def test_a_preempted_attempt_saves_ends_and_is_placed_again() -> None:
    asked = decide(record("running"), PreemptAsked(1, "j-2"), T1)
    assert asked.effects == (Tell("job.preempting", {"by": "j-2"}), StopTrainer("preempted", 30.0))
    stopping = after(asked.record, Stopping(1, "a"))
    assert stopping.state == "checkpointing"
    found = after(stopping, saved(3), Ended(1, "a", "preempted"))
    assert (found.state, found.attempt, found.preempted_by, found.backoff_s) == ("queued", 0, None, 0)
    assert found.reason == "to be placed again: preempted by j-2"
    assert found.checkpoint is not None


def test_a_placed_job_that_is_to_make_room_is_not_begun() -> None:
    found = after(record("placed"), PreemptAsked(1, "j-2"), Started(1, "a"))
    assert (found.state, found.attempt, found.end_cause) == ("queued", 0, "preempted")


def test_a_job_that_may_not_be_preempted_is_left_alone() -> None:
    with pytest.raises(Conflict, match="'preemptible' false"):
        decide(record("running", of=spec(preemptible=False)), PreemptAsked(1, "j-2"), T1)


def test_a_job_that_ends_anyway_is_not_asked_to_make_room() -> None:
    asked = after(record("running"), CancelAsked())
    assert not decide(asked, PreemptAsked(1, "j-2"), T1).is_changed


# --- what people ask -------------------------------------------------------------------------------------------------


def test_a_held_job_is_not_placed_until_it_is_released() -> None:
    held = after(record(), Held("ada"))
    assert held.held_by == "ada"
    with pytest.raises(Conflict, match="held by 'ada'"):
        decide(held, Placed(1, "a", ("a-cpu0",)), T1)
    assert after(held, Held("ben")).held_by == "ada"
    assert after(held, Released(), Placed(1, "a", ("a-cpu0",))).state == "placed"


@pytest.mark.parametrize("state", [state for state in STATES if state != "queued"])
def test_only_a_waiting_job_can_be_held(state: JobState) -> None:
    with pytest.raises(Conflict, match=f"is {state} and cannot be held"):
        decide(record(state), Held("ada"), T1)


@pytest.mark.parametrize("state", STATES)
def test_a_job_can_be_given_another_priority_until_it_has_ended(state: JobState) -> None:
    if state in FINAL_STATES:
        with pytest.raises(Conflict, match="cannot be given a priority"):
            decide(record(state), PrioritySet(5), T1)
    else:
        assert after(record(state), PrioritySet(5)).priority == 5


def test_a_refusal_tells_the_state() -> None:
    with pytest.raises(Conflict) as caught:
        decide(record("placed"), Ended(1, "a", "ok"), T0)
    assert caught.value.details == {"state": "placed"}
