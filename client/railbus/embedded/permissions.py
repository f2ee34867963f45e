"""Who may say what on the bus: least privilege for each user of nats.conf, as data.

Three things hold for everyone: nobody listens on another's inboxes; nobody listens for requests that are not its own to
answer; state (`$KV.`) is published by its owners only. A person asks, submits and listens to events.

What subject permissions cannot see, so that this guards against mistakes and strangers, not against a malicious holder
of the person's key: where an answer is asked for (the server lets a request name any reply subject, a key of a bucket
too, and JetStream's own API answers there), and what stands in the body of `CONSUMER.CREATE.<stream>` (a name there may
be the one of a service's consumer). Only an account of their own for people would close that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from railbus_shared.subjects import DEFAULT_PREFIX, SERVICE_INBOX, USER_INBOX, Subjects
from railbus_shared.topology import Consumer, event_consumer

HUMAN: Final = "user"
SERVICE_USERS: Final = ("device_manager", "dataloader", "runner", "telemetry")
USERS: Final = (*SERVICE_USERS, HUMAN)
_ASKED_BY_PEOPLE: Final = ("jobs", "devices", "data", "telemetry")
"""Not `runner`: it obeys the device_manager, which alone knows what was placed where."""

_OF_HOSTS: Final = ("progress", "close", "shard")
"""Not of people: with what a runner says of its trainer's stream one could take shards from under it, and a file that a
dataloader asks of another could be sent into anybody's inbox."""

_DESTRUCTIVE_API: Final = (
    "$JS.API.STREAM.DELETE.>",
    "$JS.API.STREAM.PURGE.>",
    "$JS.API.STREAM.RESTORE.>",
    "$JS.API.STREAM.MSG.DELETE.>",
    "$JS.API.ACCOUNT.>",
    "$JS.API.SERVER.>",
    "$JS.API.META.>",
)
_READ_API: Final = (
    "$JS.API.INFO",
    "$JS.API.STREAM.INFO.*",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.MSG.GET.*",
    "$JS.API.DIRECT.GET.>",
)


@dataclass(frozen=True)
class Permissions:
    """Subjects that a user may publish to and subscribe to; what is denied wins over what is allowed."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    publish_deny: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Role:
    """What is different between services."""

    answers: tuple[str, ...]
    asks: tuple[str, ...]
    buckets: tuple[str, ...]
    submits: bool = False


def permissions(prefix: str = DEFAULT_PREFIX) -> dict[str, Permissions]:
    """Permissions of every user under a subject prefix; raises BadSetting for a prefix that is none."""
    subjects = Subjects(prefix)
    every_bucket = (subjects.jobs, subjects.devices, subjects.leases, subjects.datasets, subjects.leader)
    roles = {
        "device_manager": _Role(("jobs", "devices"), ("runner", "data"), every_bucket, submits=True),
        "dataloader": _Role(("data",), ("data",), (subjects.datasets,)),
        "runner": _Role(("runner",), ("data", "devices.*"), (subjects.jobs, subjects.leases, subjects.devices)),
        "telemetry": _Role(("telemetry",), (), ()),
    }
    granted = {name: _of_service(name, role, subjects) for name, role in roles.items()}
    return {**granted, HUMAN: _of_human(subjects)}


def _of_service(name: str, role: _Role, subjects: Subjects) -> Permissions:
    """A service may answer into every inbox, but listens in its own only."""
    return Permissions(
        publish=(
            subjects.all_events,
            *((subjects.submit,) if role.submits else ()),
            *(subjects.request(area, ">") for area in role.asks),
            *(f"$KV.{bucket}.>" for bucket in role.buckets),
            f"{USER_INBOX}.>",
            f"{SERVICE_INBOX}.>",
            "$SRV.>",
            "$JS.API.>",
            "$JS.ACK.>",
            "$JS.FC.>",
        ),
        publish_deny=_DESTRUCTIVE_API,
        subscribe=(
            f"{SERVICE_INBOX}.{name}.>",
            "$SRV.>",
            *(subjects.request(area, ">") for area in role.answers),
        ),
    )


def _of_human(subjects: Subjects) -> Permissions:
    watched = tuple(f"KV_{bucket}" for bucket in (subjects.jobs, subjects.devices, subjects.datasets))
    return Permissions(
        publish=(
            subjects.submit,
            *(subjects.request(area, ">") for area in _ASKED_BY_PEOPLE),
            f"{subjects.prefix}.evt.app.>",
            f"{subjects.prefix}.evt.log.>",  # what a script logs
            "$SRV.>",
            *_READ_API,
            *(subject for stream in (subjects.events_stream, *watched) for subject in _consuming(stream)),
            f"$JS.ACK.{subjects.events_stream}.>",
            "$JS.FC.>",
        ),
        publish_deny=(
            *(subjects.request("data.*", verb) for verb in _OF_HOSTS),
            subjects.request("devices.*", "check"),  # the runner's: it has the driver read at once, again and again
            *_touching(event_consumer(subjects)),
        ),
        subscribe=(f"{USER_INBOX}.>", subjects.all_events),
    )


def _consuming(stream: str) -> tuple[str, ...]:
    """To make, read and remove a consumer of one's own; ordered consumers of nats-py use the subject without a name."""
    return (
        f"$JS.API.CONSUMER.CREATE.{stream}",
        f"$JS.API.CONSUMER.CREATE.{stream}.>",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.API.CONSUMER.DELETE.{stream}.*",
    )


def _touching(consumer: Consumer) -> tuple[str, ...]:
    """What would take deliveries from a service's consumer, change it or remove it."""
    stream, name = consumer.stream, consumer.name
    return (
        f"$JS.API.CONSUMER.CREATE.{stream}.{name}",
        f"$JS.API.CONSUMER.CREATE.{stream}.{name}.>",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}",
        f"$JS.API.CONSUMER.DELETE.{stream}.{name}",
        f"$JS.ACK.{stream}.{name}.>",
    )
