"""What can happen to a job, and what is to be done about it: the data that `lifecycle.decide` takes and gives.

What a placer or a runner says of an attempt carries its lease epoch, and where a runner says it, its host; what a
person asks carries neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from railbus_shared.contracts.events import Severity
from railbus_shared.contracts.jobs import CheckpointRef, EndCause, ErrorBody

# --- what happens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """The placer has leased devices for a queued job."""

    lease_epoch: int
    """The next one of the record."""
    host: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Started:
    """The runner of the host takes the placed job."""

    lease_epoch: int
    host: str


@dataclass(frozen=True)
class StartRefused:
    """The runner answered that it does not take the job."""

    lease_epoch: int
    error: ErrorBody


@dataclass(frozen=True)
class Saved:
    """The attempt has a checkpoint on disk, to be named in the record."""

    lease_epoch: int
    host: str
    ref: CheckpointRef


@dataclass(frozen=True)
class Paused:
    """The trainer takes no step until it can save; the next checkpoint ends that."""

    lease_epoch: int
    host: str
    reason: str
    """For people: what it waits for."""


@dataclass(frozen=True)
class Stopping:
    """The runner has told the trainer to make room."""

    lease_epoch: int
    host: str


@dataclass(frozen=True)
class Ended:
    """All processes of the attempt are gone, and the runner says why."""

    lease_epoch: int
    host: str
    cause: EndCause
    error: ErrorBody | None = None
    exit_code: int | None = None


@dataclass(frozen=True)
class Lost:
    """Nobody can say any more how the attempt ended; told by the placer, or by the next runner of the host."""

    lease_epoch: int
    cause: EndCause
    error: ErrorBody


@dataclass(frozen=True)
class CancelAsked:
    """Somebody wants the job to end."""

    by: str | None = None
    at_once: bool = False
    """Without the grace in which a trainer writes a checkpoint."""


@dataclass(frozen=True)
class PreemptAsked:
    """The placer wants the devices of the attempt for another job."""

    lease_epoch: int
    by: str


@dataclass(frozen=True)
class Held:
    """Somebody holds the waiting job back."""

    by: str


@dataclass(frozen=True)
class Released:
    """The waiting job is held back no longer."""


@dataclass(frozen=True)
class PrioritySet:
    """Somebody gives the job another priority."""

    priority: int


Happening = (
    Placed
    | Started
    | StartRefused
    | Saved
    | Paused
    | Stopping
    | Ended
    | Lost
    | CancelAsked
    | PreemptAsked
    | Held
    | Released
    | PrioritySet
)
"""Everything that changes a record once it exists."""

OfAttempt = Started | StartRefused | Saved | Paused | Stopping | Ended | Lost | PreemptAsked
"""What counts only while the record names the attempt."""

HAPPENINGS: Final[tuple[type[Happening], ...]] = (
    Placed,
    Started,
    StartRefused,
    Saved,
    Paused,
    Stopping,
    Ended,
    Lost,
    CancelAsked,
    PreemptAsked,
    Held,
    Released,
    PrioritySet,
)

# --- what is to be done once the record is written --------------------------------------------------------------------


@dataclass(frozen=True)
class Tell:
    """An event is to be told."""

    what: str
    data: Mapping[str, object] = field(default_factory=dict)
    severity: Severity = "info"


@dataclass(frozen=True)
class StartTrainer:
    """The runner of the record's host is to be asked to start the attempt."""


@dataclass(frozen=True)
class StopTrainer:
    """The trainer of the record's attempt is to be stopped; whoever loses this finds it in the record."""

    reason: Literal["cancelled", "preempted"]
    grace_s: float


@dataclass(frozen=True)
class ReleaseLeases:
    """The attempt is over; what is left of its leases may go, if whoever says so knows its processes to be gone."""


Effect = Tell | StartTrainer | StopTrainer | ReleaseLeases
