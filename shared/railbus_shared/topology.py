"""What must exist on the server: streams, buckets and consumers, as data.

Whoever starts first creates them (`bus.topology`); later ones compare and mend what has drifted. A stream that a local
marker says existed and that is gone is an error, never silently made anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from railbus_shared.subjects import Subjects

_DAY_S: Final = 86_400
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Consumer:
    """A durable pull consumer."""

    stream: str
    name: str
    ack: Literal["explicit", "all"]
    ack_wait_s: float
    max_ack_pending: int


@dataclass(frozen=True)
class Stream:
    """A file-backed stream; a bucket is a stream with one subject for each key."""

    name: str
    subjects: tuple[str, ...]
    description: str
    retention: Literal["limits", "workqueue"] = "limits"
    discard: Literal["old", "new"] = "new"
    max_msgs: int = -1
    max_bytes: int = -1
    max_age_s: float = 0
    history: int = -1
    """Revisions kept for each subject; -1 for no limit."""
    duplicate_window_s: float = 120
    is_bucket: bool = False
    allow_ttl: bool = False
    allow_atomic: bool = False
    replicas: int = 1
    """Copies on nodes of a cluster; a durable consumer has as many as its stream."""


@dataclass(frozen=True)
class Topology:
    """Everything under one prefix."""

    streams: tuple[Stream, ...]
    consumers: tuple[Consumer, ...]


def job_consumer(subjects: Subjects) -> Consumer:
    """Submissions, shared by all device_managers; redelivered until one of them has made the record."""
    return Consumer(subjects.jobs_stream, "device-manager", "explicit", ack_wait_s=30, max_ack_pending=256)


def event_consumer(subjects: Subjects) -> Consumer:
    """Events for the telemetry service, each acknowledged once its bytes are on disk.

    Not "all": to acknowledge one message and with it all before would lose those whose delivery was lost.
    """
    return Consumer(subjects.events_stream, "telemetry-writer", "explicit", ack_wait_s=30, max_ack_pending=20_000)


def topology(subjects: Subjects, *, replicas: int = 1) -> Topology:
    """All streams, buckets and consumers under a prefix, each stream in so many copies."""
    return Topology(
        streams=tuple(replace(stream, replicas=replicas) for stream in _streams(subjects)),
        consumers=(job_consumer(subjects), event_consumer(subjects)),
    )


def _streams(subjects: Subjects) -> tuple[Stream, ...]:
    return (
        Stream(
            subjects.jobs_stream,
            (f"{subjects.prefix}.jobs.>",),
            "Job events that wait for a device_manager.",
            retention="workqueue",
            max_msgs=10_000,
            max_bytes=256 * _MIB,
        ),
        Stream(
            subjects.events_stream,
            (subjects.all_events,),
            "Every event, until telemetry has it on disk and for a week after.",
            discard="old",
            max_bytes=1024 * _MIB,
            max_age_s=7 * _DAY_S,
            duplicate_window_s=600,
            allow_atomic=True,
        ),
        _bucket(subjects.jobs, "Job records.", history=5, max_bytes=512 * _MIB, allow_atomic=True),
        _bucket(subjects.devices, "What device_managers and runners report of their hosts.", allow_ttl=True),
        _bucket(subjects.leases, "Leases on devices.", allow_ttl=True, allow_atomic=True),
        _bucket(subjects.datasets, "What dataloaders know of datasets."),
        _bucket(subjects.leader, "Who places jobs, and on which root the log is written.", allow_ttl=True),
    )


def _bucket(
    name: str,
    description: str,
    *,
    history: int = 1,
    max_bytes: int = 64 * _MIB,
    allow_ttl: bool = False,
    allow_atomic: bool = False,
) -> Stream:
    return Stream(
        f"KV_{name}",
        (f"$KV.{name}.>",),
        description,
        history=history,
        max_bytes=max_bytes,
        is_bucket=True,
        allow_ttl=allow_ttl,
        allow_atomic=allow_atomic,
    )
