"""Job records and happenings for tests of the life of a job, by name and by Hypothesis."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from railbus_shared.contracts.jobs import CheckpointRef, EndCause, ErrorBody, JobRecord, JobSpec, JobState
from railbus_shared.happenings import (
    CancelAsked,
    Ended,
    Happening,
    Held,
    Lost,
    Paused,
    Placed,
    PreemptAsked,
    PrioritySet,
    Released,
    Saved,
    Started,
    StartRefused,
    Stopping,
)

STATES: tuple[JobState, ...] = get_args(JobState)
CAUSES: tuple[EndCause, ...] = get_args(EndCause)
LOSSES = tuple(cause for cause in CAUSES if cause not in {"ok", "cancelled"})
T0, T1, T2 = (f"2026-11-26T00:00:0{second}.000000000Z" for second in range(3))
ERROR = ErrorBody(code="TRAINER_LOST", message="the trainer was killed")


def spec(**fields: object) -> JobSpec:
    return JobSpec.parse({"model": "m", "dataset": "d", "entrypoint": "classifier", **fields})


def record(state: JobState = "queued", *, of: JobSpec | None = None, **fields: object) -> JobRecord:
    """A record as it may stand in the bucket; an active one has epoch 1 on host `a`."""
    wanted = of or spec()
    active: dict[str, object] = {"lease_epoch": 1, "host": "a", "devices": ("a-cpu0",)}
    extra: dict[str, object] = active if state in {"placed", "running", "checkpointing"} else {}
    if state in {"running", "checkpointing"}:
        extra = {**extra, "attempt": 1, "started_at": T0}
    made = JobRecord(
        id="j-1", spec=wanted, spec_sha256=wanted.digest, sequence=1, incarnation="i", submitted_at=T0, changed_at=T0
    )
    return made.changed(state=state, **{**extra, **fields})


def saved(number: int = 1, *, lease_epoch: int = 1, host: str = "a") -> Saved:
    return Saved(lease_epoch, host, CheckpointRef(number=number, step=number, sha256="0" * 64))


_EPOCHS = st.integers(0, 3)
_HOSTS = st.sampled_from(["a", "b"])
_DEVICES = st.sampled_from([("a-cpu0",), ("b-cpu0",)])
_ERRORS = st.sampled_from([ERROR, ErrorBody(code="RUNNER_LOST", message="gone", hint="wait")])
_NAMES = st.sampled_from(["ada", "ben"])
_POLICIES = st.fixed_dictionaries(
    {},
    optional={
        "also_on": st.lists(st.sampled_from(LOSSES), max_size=2),
        "never_on": st.lists(st.sampled_from(LOSSES), max_size=2),
        "backoff_s": st.sampled_from([0.0, 2.0]),
        "max_backoff_s": st.sampled_from([0.0, 5.0]),
    },
)
_SPECS = st.builds(
    lambda attempts, policy, preemptible: spec(max_attempts=attempts, retry=policy, preemptible=preemptible),
    st.integers(1, 3),
    _POLICIES,
    st.booleans(),
)
_HAPPENINGS: dict[type[Happening], st.SearchStrategy[Happening]] = {
    Placed: st.builds(Placed, _EPOCHS, _HOSTS, _DEVICES),
    Started: st.builds(Started, _EPOCHS, _HOSTS),
    StartRefused: st.builds(StartRefused, _EPOCHS, _ERRORS),
    Saved: st.builds(lambda n, e, h: saved(n, lease_epoch=e, host=h), st.integers(1, 3), _EPOCHS, _HOSTS),
    Paused: st.builds(Paused, _EPOCHS, _HOSTS, st.sampled_from(["", "paused for storage"])),
    Stopping: st.builds(Stopping, _EPOCHS, _HOSTS),
    Ended: st.builds(Ended, _EPOCHS, _HOSTS, st.sampled_from(CAUSES), st.none() | _ERRORS, st.sampled_from([None, 0])),
    Lost: st.builds(Lost, _EPOCHS, st.sampled_from(["lease_lost", "runner_lost", "host_lost"]), _ERRORS),
    CancelAsked: st.builds(CancelAsked, st.none() | _NAMES, st.booleans()),
    PreemptAsked: st.builds(PreemptAsked, _EPOCHS, st.just("j-2")),
    Held: st.builds(Held, _NAMES),
    Released: st.just(Released()),
    PrioritySet: st.builds(PrioritySet, st.integers(-2, 2)),
}
HAPPENING_KINDS = tuple(_HAPPENINGS)


def happenings() -> st.SearchStrategy[Happening]:
    return st.one_of(*_HAPPENINGS.values())


def happenings_of(kind: type[Happening]) -> st.SearchStrategy[Happening]:
    return _HAPPENINGS[kind]


@st.composite
def records(draw: st.DrawFn, *, states: tuple[JobState, ...] = STATES) -> JobRecord:
    """Any record that may be found."""
    state = draw(st.sampled_from(states))
    made = record(state, of=draw(_SPECS), priority=draw(st.integers(-2, 2)), retries=draw(st.integers(0, 14)))
    made = made.changed(attempt=draw(st.integers(made.attempt, made.spec.max_attempts)))
    if made.is_active:
        host = draw(_HOSTS)
        asked = {"cancel_requested": draw(st.booleans()), "preempted_by": draw(st.none() | st.just("j-2"))}
        return made.changed(host=host, devices=(f"{host}-cpu0",), lease_epoch=draw(st.integers(1, 3)), **asked)
    return made.changed(lease_epoch=draw(_EPOCHS), held_by=draw(st.none() | _NAMES) if state == "queued" else None)
