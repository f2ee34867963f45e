"""The life of a job: from its record and what happens to the record as it is then, and what is to be done. Pure.

    queued -> placed -> running -> succeeded | failed | cancelled
                          |-> checkpointing -> queued

`TRANSITIONS` says all of it: what may happen in which state, and which states may follow. A final state is never left.
Whoever writes records takes them from `decide`, writes by compare-and-set, and then carries out the effects; so of two
that happen at the same time one is decided again on what the other left.

Whatever happens may be told late, twice or out of order: what an attempt says that the record no longer names raises
StaleLeaseEpoch, what cannot happen in the record's state raises Conflict, and what was told already changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from railbus_shared.conclusion import concluded, end_told
from railbus_shared.contracts.jobs import EndCause, ErrorBody, JobRecord, JobState
from railbus_shared.errors import Conflict, StaleLeaseEpoch
from railbus_shared.happenings import (
    CancelAsked,
    Effect,
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
    Saved,
    Started,
    StartRefused,
    StartTrainer,
    Stopping,
    StopTrainer,
    Tell,
)
from railbus_shared.layout import checkpoint_stem
from railbus_shared.repeats import is_told_already

_LOSSES: Final = frozenset[JobState]({"queued", "failed", "cancelled"})
_ENDS: Final = _LOSSES | frozenset[JobState]({"succeeded"})


def _stays(*happenings: type[Happening], state: JobState) -> dict[type[Happening], frozenset[JobState]]:
    return {happening: frozenset({state}) for happening in happenings}


TRANSITIONS: Final[Mapping[JobState, Mapping[type[Happening], frozenset[JobState]]]] = {
    "queued": {
        Placed: frozenset({"placed"}),
        CancelAsked: frozenset({"cancelled"}),
        **_stays(Held, Released, PrioritySet, state="queued"),
    },
    "placed": {
        Started: frozenset({"running", "queued", "cancelled"}),
        StartRefused: _LOSSES,
        Lost: _LOSSES,
        **_stays(CancelAsked, PreemptAsked, PrioritySet, state="placed"),
    },
    "running": {
        Stopping: frozenset({"checkpointing"}),
        Ended: _ENDS,
        Lost: _LOSSES,
        **_stays(Saved, Paused, CancelAsked, PreemptAsked, PrioritySet, state="running"),
    },
    "checkpointing": {
        Ended: _ENDS,
        Lost: _LOSSES,
        **_stays(Saved, CancelAsked, PrioritySet, state="checkpointing"),
    },
    "succeeded": {},
    "failed": {},
    "cancelled": {},
}
"""What may happen in each state, and the states that may follow. What was told already is not in it: that changes
nothing in any state."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a record."""

    before: JobRecord
    record: JobRecord
    """As it is to be written; the one before where nothing changes."""
    effects: tuple[Effect, ...] = ()
    """To be carried out once the record is written."""

    @property
    def is_changed(self) -> bool:
        return self.record is not self.before

    @property
    def told(self) -> tuple[Tell, ...]:
        """The events that are to be told."""
        return tuple(effect for effect in self.effects if isinstance(effect, Tell))


def decide(record: JobRecord, happening: Happening, now: str) -> Decision:
    """What becomes of the record, `now` being RFC 3339.

    Raises StaleLeaseEpoch for an attempt that the record does not name any more, Conflict for what cannot happen in
    the record's state.
    """
    if is_told_already(record, happening):
        return Decision(record, record, _told_again(record, happening))
    if isinstance(happening, OfAttempt):
        check_names(record, lease_epoch=happening.lease_epoch, host=getattr(happening, "host", None))
    if type(happening) not in TRANSITIONS[record.state]:
        raise _impossible(record, happening)
    return _DECIDED[type(happening)](record, happening, now)


# --- what is refused, and what is known already -----------------------------------------------------------------------


def check_names(record: JobRecord, *, lease_epoch: int, host: str | None = None) -> None:
    """Raises StaleLeaseEpoch unless the attempt is the one that the record names."""
    if record.is_active and record.lease_epoch == lease_epoch and (host is None or record.host == host):
        return
    raise StaleLeaseEpoch(
        f"job {record.id!r} is {record.state} with lease epoch {record.lease_epoch}, "
        f"so the attempt with epoch {lease_epoch} is over",
        hint="the attempt ends; nothing of it counts any more",
    )


def _impossible(record: JobRecord, happening: Happening) -> Conflict:
    hint = ""
    if isinstance(happening, Held):
        hint = "only a job that is queued can be held; `railbus cancel` ends one that runs"
    what = _SPELLED.get(type(happening), type(happening).__name__)
    return Conflict(
        f"job {record.id!r} is {record.state} and cannot {what}", hint=hint, details={"state": record.state}
    )


_SPELLED: Final[Mapping[type[Happening], str]] = {
    Placed: "be placed",
    Started: "be started",
    StartRefused: "be refused a start",
    Saved: "save a checkpoint",
    Paused: "pause",
    Stopping: "make room",
    Ended: "end an attempt",
    PreemptAsked: "make room",
    Held: "be held",
    Released: "be released",
    PrioritySet: "be given a priority",
}


def _told_again(record: JobRecord, happening: Happening) -> tuple[Effect, ...]:
    """A person who cancels again may mean: quicker."""
    return (_stop(record, happening),) if isinstance(happening, CancelAsked) and record.is_active else ()


# --- an attempt -------------------------------------------------------------------------------------------------------


def _placed(record: JobRecord, event: Placed, now: str) -> Decision:
    if event.lease_epoch != record.lease_epoch + 1:
        raise StaleLeaseEpoch(f"job {record.id!r} has lease epoch {record.lease_epoch}, not {event.lease_epoch - 1}")
    if record.held_by is not None:
        raise Conflict(f"job {record.id!r} is held by {record.held_by!r} and cannot be placed")
    after = record.changed(
        state="placed",
        lease_epoch=event.lease_epoch,
        host=event.host,
        devices=event.devices,
        reason="",
        backoff_s=0.0,
        changed_at=now,
    )
    told = {"placed_on": event.host, "devices": list(event.devices)}
    return Decision(record, after, (Tell("job.placed", told), StartTrainer()))


def _started(record: JobRecord, _: Started, now: str) -> Decision:
    """A job that is to end is not begun."""
    if record.cancel_requested:
        return _over(record, "cancelled", None, now)
    if record.preempted_by is not None:
        return _over(record, "preempted", None, now)
    began = record.started_at or now
    after = record.changed(state="running", attempt=record.attempt + 1, reason="", started_at=began, changed_at=now)
    return Decision(record, after, (Tell("job.started", {"devices": list(record.devices)}),))


def _saved(record: JobRecord, event: Saved, now: str) -> Decision:
    """The row of losses is over: the job gets on. So it does if it was paused."""
    told = Tell("job.checkpointed", {"checkpoint": checkpoint_stem(event.ref.number), "sha256": event.ref.sha256})
    return Decision(record, record.changed(checkpoint=event.ref, retries=0, reason="", changed_at=now), (told,))


def _paused(record: JobRecord, event: Paused, now: str) -> Decision:
    """Its event is the trainer's own, `checkpoint.paused`."""
    return Decision(record, record.changed(reason=event.reason, changed_at=now))


def _stopping(record: JobRecord, _: Stopping, now: str) -> Decision:
    return Decision(record, record.changed(state="checkpointing", changed_at=now))


def _start_refused(record: JobRecord, event: StartRefused, now: str) -> Decision:
    return _over(record, "start_refused", event.error, now)


def _ended(record: JobRecord, event: Ended, now: str) -> Decision:
    return _over(record, event.cause, event.error, now, exit_code=event.exit_code)


def _lost(record: JobRecord, event: Lost, now: str) -> Decision:
    return _over(record, event.cause, event.error, now)


def _over(
    record: JobRecord, cause: EndCause, error: ErrorBody | None, now: str, *, exit_code: int | None = None
) -> Decision:
    after = concluded(record, cause, error, now, exit_code=exit_code)
    return Decision(record, after, (end_told(after), ReleaseLeases()))


# --- what people and the placer ask -----------------------------------------------------------------------------------


def _cancel_asked(record: JobRecord, event: CancelAsked, now: str) -> Decision:
    asked = record.changed(cancel_requested=True, cancelled_by=event.by, changed_at=now)
    if record.state == "queued":
        after = concluded(asked, "cancelled", None, now)
        return Decision(record, after, (end_told(after),))
    tell = Tell("job.cancel_requested", {} if event.by is None else {"by": event.by})
    return Decision(record, asked, (tell, _stop(record, event)))


def _stop(record: JobRecord, event: CancelAsked) -> StopTrainer:
    return StopTrainer("cancelled", 0.0 if event.at_once else record.spec.stop_grace_s)


def _preempt_asked(record: JobRecord, event: PreemptAsked, now: str) -> Decision:
    if not record.spec.preemptible:
        raise Conflict(f"job {record.id!r} has 'preemptible' false and makes no room")
    effects = (Tell("job.preempting", {"by": event.by}), StopTrainer("preempted", record.spec.stop_grace_s))
    return Decision(record, record.changed(preempted_by=event.by, changed_at=now), effects)


def _held(record: JobRecord, event: Held, now: str) -> Decision:
    return Decision(record, record.changed(held_by=event.by, changed_at=now), (Tell("job.held", {"by": event.by}),))


def _released(record: JobRecord, _: Released, now: str) -> Decision:
    return Decision(record, record.changed(held_by=None, changed_at=now), (Tell("job.released"),))


def _priority_set(record: JobRecord, event: PrioritySet, now: str) -> Decision:
    told = Tell("job.priority_set", {"priority": event.priority, "before": record.priority})
    return Decision(record, record.changed(priority=event.priority, changed_at=now), (told,))


_DECIDED: Final[Mapping[type[Happening], Callable[[JobRecord, Any, str], Decision]]] = {
    Placed: _placed,
    Started: _started,
    StartRefused: _start_refused,
    Saved: _saved,
    Paused: _paused,
    Stopping: _stopping,
    Ended: _ended,
    Lost: _lost,
    CancelAsked: _cancel_asked,
    PreemptAsked: _preempt_asked,
    Held: _held,
    Released: _released,
    PrioritySet: _priority_set,
}
