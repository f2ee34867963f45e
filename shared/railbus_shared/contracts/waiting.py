"""Why a job waits: one headline of a closed list, and what stands behind it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from railbus_shared.contracts.jobs import JobState
from railbus_shared.contracts.model import Contract, Count, Id, Items, Time

WaitWord = Literal[
    "starting",
    "resources",
    "priority",
    "fair_share",
    "quota",
    "dependency",
    "held",
    "backoff",
    "reclaiming",
    "runner_not_ready",
    "out_of_service",
    "no_such_device",
    "no_entrypoint",
    "cancelling",
    "not_waiting",
]
"""What keeps a job from starting, in one word.

starting: nothing; it is placed at the next look. resources: what fits is in use. priority: what is free is kept for a
job before it. fair_share: the same, where the other job goes first because its owner uses less. quota: its owner may
use no more. dependency: jobs of `after` have not succeeded. held: a person holds it. backoff: it is tried again later.
reclaiming: what fits is still being cleared. runner_not_ready: devices are free, but no runner takes jobs there.
out_of_service: what fits is drained, cordoned or unhealthy. no_such_device and no_entrypoint: no host that is known can
ever run it. cancelling: it is about to end. not_waiting: it is placed, runs or has ended.
"""


class HostReason(Contract):
    """What of one host keeps a job from starting there."""

    host: Id
    word: WaitWord
    text: str
    """One sentence without a full stop."""
    fitting: Count
    """Devices of the host that fit the job."""
    free: Count
    """Of those, the ones that it could have now."""


class DeviceHolder(Contract):
    """Who has a device that a waiting job could use."""

    device: Id
    holder: Id
    """A job, or the name under which a person leased it."""
    owner: Id | None = None
    state: JobState | None = None
    """Of the job."""
    expected_end: Time | None = None
    """From its time limit, or from how long jobs like it took; None where nothing is known."""


class Why(Contract):
    """Why one job is where it is; the answer to `jobs.why` and `jobs.dry_run`."""

    v: Literal[1] = 1
    job: Id | None = None
    """None for a job that was not submitted."""
    state: JobState
    headline: WaitWord
    text: str
    """The headline as a sentence that names what is missing, without a full stop."""
    can_ever_start: bool = True
    """Whether some host that is known could meet the request."""
    place: int | None = Field(default=None, ge=1)
    """Place in the queue, 1 for the head."""
    ahead: Items[Id] = Field(default=(), max_length=20)
    """Jobs before it, nearest last; at most 20."""
    hosts: Items[HostReason] = ()
    holders: Items[DeviceHolder] = Field(default=(), max_length=100)
    expected_start: Time | None = None
    expected_basis: str = ""
    """What the expected start rests on, or why there is none."""
