"""Whether a job is tried again after an attempt ended, and when: pure, by the cause of the end.

| cause | tried again | counts as an attempt | waits |
| --- | --- | --- | --- |
| `user_error`, `bad_input`, `device_oom`, `host_oom`, `time_limit`, `hang` | no: it would come again | yes | |
| `signal`, `runner_lost`, `lease_lost` | yes | yes | from the second in a row |
| `start_refused`, `setup_failed`, `storage_full` | yes | yes, once it had started | yes |
| `device_fault` | yes, a few times in a row | no | no: the device is cordoned |
| `host_lost` | yes, some times in a row | no | no |
| `preempted` | yes | no | no |

A job may add causes to those that are tried again, or take some away. A row ends with the next checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from railbus_shared.contracts.jobs import EndCause, JobRecord

RETRIED: Final = frozenset[EndCause](
    {
        "signal",
        "runner_lost",
        "lease_lost",
        "start_refused",
        "setup_failed",
        "storage_full",
        "device_fault",
        "host_lost",
        "preempted",
    }
)
"""What another attempt may not meet."""
NOT_COUNTED: Final = frozenset[EndCause]({"preempted", "host_lost", "device_fault"})
"""Ends that are not the job's fault: the start does not count."""
ALWAYS_FINAL: Final = frozenset[EndCause]({"ok", "cancelled"})
"""Whatever the job says of them."""
REFUSED_S: Final = 2.0
"""Wait after a runner refused a start, seconds: it reports at its next heartbeat whether it takes jobs."""

_FROM_OUTSIDE: Final = frozenset[EndCause]({"signal", "runner_lost", "lease_lost"})
"""What mostly happens once: the first in a row is tried again without a wait."""
_IN_A_ROW: Final[Mapping[EndCause, int]] = {"device_fault": 2, "host_lost": 10}
"""How many more of those in a row than `max_attempts` a job may see: it might be the job that breaks them."""


@dataclass(frozen=True)
class Again:
    """The job is queued again, with these values in its record."""

    attempt: int
    retries: int
    backoff_s: float


def again(record: JobRecord, cause: EndCause) -> Again | None:
    """What the record of the ended attempt becomes, or None if the job has failed."""
    if not is_retried(record, cause):
        return None
    if record.state == "placed":  # it has not begun, so nothing counts
        return Again(record.attempt, record.retries, REFUSED_S if cause == "start_refused" else 0.0)
    if cause in NOT_COUNTED:
        return _uncounted(record, cause)
    if record.attempt >= record.spec.max_attempts:
        return None
    return Again(record.attempt, record.retries + 1, _backoff_s(record, cause))


def is_retried(record: JobRecord, cause: EndCause) -> bool:
    """Whether the cause is one after which this job is tried again, as long as attempts are left."""
    policy = record.spec.retry
    return (
        cause not in ALWAYS_FINAL
        and cause not in policy.never_on
        and (cause in RETRIED or cause in policy.also_on)
    )  # fmt: skip


def _uncounted(record: JobRecord, cause: EndCause) -> Again | None:
    attempt = max(record.attempt - 1, 0)
    if cause not in _IN_A_ROW:
        return Again(attempt, record.retries, 0.0)
    if record.retries >= record.spec.max_attempts + _IN_A_ROW[cause]:
        return None
    return Again(attempt, record.retries + 1, 0.0)


def _backoff_s(record: JobRecord, cause: EndCause) -> float:
    """Doubled for each one in a row, up to the job's maximum."""
    policy = record.spec.retry
    doublings = record.retries - (1 if cause in _FROM_OUTSIDE else 0)
    if doublings < 0:
        return 0.0
    return float(min(policy.backoff_s * 2.0 ** min(doublings, 64), policy.max_backoff_s))
