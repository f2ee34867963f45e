"""Who may say what on the bus, as data: least privilege for each service, and for each person by a role.

The services and all streams and buckets are one account of the server. Every person is in an account of their own,
which shares nothing with it but what is imported there: some requests, and the events. So a person's inboxes are theirs
alone, and wherever a person asks for an answer, it comes to that person's own account: no request, neither to a service
nor to JetStream, can be turned into a write of a key, an order to a runner or a forged event by its reply subject.
What a person tells gets the person's name on that way, as the last token of its subject (`subjects.told_by`): nobody
tells events in the name of a service or of somebody else.

People have no consumers. A consumer delivers from inside the account of the services, wherever its maker says, and the
server checks no rights there; so people read streams by `DIRECT.GET` (`bus.follow`), which leaves nothing behind.

Services trust each other more: each listens in its own inboxes and writes its own buckets only, but any of them may
make streams and consumers, because whoever starts first creates what must exist. None may take a stream away, put one
back or have a copy of it sent somewhere: that is the operator's, whose key is no service's and no person's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from railbus_shared.subjects import DEFAULT_PREFIX, LOG_KEY, PERSON_REPLY, SERVICE_INBOX, Subjects
from railbus_shared.topology import event_consumer, topology

HUMAN: Final = "user"
SERVICE_USERS: Final = ("device_manager", "dataloader", "runner", "telemetry")
OPERATOR: Final = "operator"
"""Who backs up and restores: `railbus backup` and `railbus restore` beside the keys, and nobody else."""
USERS: Final = (*SERVICE_USERS, OPERATOR, HUMAN)

Role = Literal["user", "read-only", "submit-only"]
"""Of a person: everything that people do; looking only; submitting only, and seeing no more than the receipt."""

_READING: Final = {
    "jobs": ("get", "list", "why", "dry_run"),
    "devices": ("list",),
    "data": ("list", "describe"),
    "telemetry": ("query",),
}
_ORDERING: Final = {
    "jobs": ("submit", "cancel", "hold", "priority", "retry", "checkpoint"),
    "devices": ("lease", "renew", "release", "revoke", "cordon", "drain"),
    "data": ("open", "verify", "*.open", "*.verify"),
    "telemetry": ("flush",),
}
"""Word by word, so that what is not for people is not there for them at all: a refusal can be got round by a reply
subject, since an answer is let into an account without being asked for its rights. Not for people are a runner, which
obeys the device_manager, who alone knows what was placed where; `progress` and `close` of a dataloader, with which one
could take shards from under a trainer, and `shard`, whose bytes go into an inbox that the request names; and `check` of
a device_manager, which has the driver read at once, again and again."""

_OPERATORS_API: Final = (
    "$JS.API.STREAM.DELETE.>",
    "$JS.API.STREAM.PURGE.>",
    "$JS.API.STREAM.RESTORE.>",
    "$JS.API.STREAM.SNAPSHOT.>",  # is delivered wherever its asker says
    "$JS.API.STREAM.MSG.DELETE.>",
    "$JS.API.ACCOUNT.>",
    "$JS.API.SERVER.>",
    "$JS.API.META.>",
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
    keys: tuple[str, ...] = ()
    """Single keys of further buckets."""


@dataclass(frozen=True)
class Exports:
    """What the account of the services offers to those of people; nothing of it needs to be asked for."""

    once: tuple[str, ...]
    """Subjects of requests that are answered by one message."""
    many: tuple[str, ...]
    """Subjects of requests that are answered by several."""
    told: tuple[str, ...]
    """Subjects that people may listen to."""
    tells: tuple[str, ...]
    """Subjects of what people tell, with the name of who does at the end."""


@dataclass(frozen=True)
class Policy:
    """Everything that the server is told of rights."""

    exports: Exports
    services: Mapping[str, Permissions]
    people: Mapping[str, Person]


@dataclass(frozen=True)
class Person:
    """What of the exports one person has: a subset of each."""

    once: tuple[str, ...] = ()
    many: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    tells: Mapping[str, str] = field(default_factory=dict)
    """Where this person publishes events, and what the server makes of that: the same with the name at the end."""


def policy(prefix: str = DEFAULT_PREFIX, people: Mapping[str, Role] | None = None) -> Policy:
    """Rights of all services and of these people under a prefix; raises BadSetting for a prefix that is none."""
    subjects = Subjects(prefix)
    roles: Mapping[str, Role] = {HUMAN: "user"} if people is None else people
    return Policy(
        _exports(subjects),
        _of_services(subjects),
        {name: _of_person(name, role, subjects) for name, role in roles.items()},
    )


def _of_services(subjects: Subjects) -> dict[str, Permissions]:
    every_bucket = (subjects.jobs, subjects.devices, subjects.leases, subjects.datasets, subjects.leader)
    roles = {
        "device_manager": _Role(("jobs", "devices"), ("runner", "data"), every_bucket, submits=True),
        "dataloader": _Role(("data",), ("data",), (subjects.datasets,)),
        "runner": _Role(("runner",), ("data", "devices.*"), (subjects.jobs, subjects.leases, subjects.devices)),
        "telemetry": _Role(("telemetry",), (), (), keys=(f"$KV.{subjects.leader}.{LOG_KEY}",)),
    }
    of_services = {name: _of_service(name, role, subjects) for name, role in roles.items()}
    return {**of_services, OPERATOR: _of_operator(subjects)}


def _of_service(name: str, role: _Role, subjects: Subjects) -> Permissions:
    """A service may answer other services and people, but listens in its own inboxes only."""
    return Permissions(
        publish=(
            subjects.all_events,
            *((subjects.submit,) if role.submits else ()),
            *(subjects.request(area, ">") for area in role.asks),
            *(f"$KV.{bucket}.>" for bucket in role.buckets),
            *role.keys,
            f"{SERVICE_INBOX}.>",
            f"{PERSON_REPLY}.>",
            "$SRV.>",
            "$JS.API.>",
            "$JS.ACK.>",
            "$JS.FC.>",
        ),
        publish_deny=_OPERATORS_API,
        subscribe=(
            f"{SERVICE_INBOX}.{name}.>",
            "$SRV.>",
            subjects.all_events,  # which it may read from the stream as well
            *(subjects.request(area, ">") for area in role.answers),
        ),
    )


def _of_operator(subjects: Subjects) -> Permissions:
    """Copies whole streams of railbus, and puts them back; asks nothing of a service but whether it runs."""
    streams = [stream.name for stream in topology(subjects).streams]
    verbs = ("INFO", "SNAPSHOT", "RESTORE", "UPDATE", "DELETE", "MSG.GET", "MSG.DELETE")
    return Permissions(
        publish=(
            "$JS.API.INFO",
            *(f"$JS.API.STREAM.{verb}.{stream}" for verb in verbs for stream in streams),
            *(f"$JS.API.CONSUMER.{verb}.{stream}.>" for verb in ("INFO", "DELETE") for stream in streams),
            *(f"$JS.API.CONSUMER.LIST.{stream}" for stream in streams),
            "$JS.SNAPSHOT.>",
            *(f"$KV.{name.removeprefix('KV_')}.>" for name in streams if name.startswith("KV_")),
            "$SRV.PING",
        ),
        subscribe=(f"{SERVICE_INBOX}.{OPERATOR}.>",),
    )


def _exports(subjects: Subjects) -> Exports:
    """What people may be allowed."""
    told = (subjects.all_events,)
    return Exports(_asked(subjects), _many(subjects), told, tells=tuple(f"{own}.*" for own in _own_events(subjects)))


def _asked(subjects: Subjects) -> tuple[str, ...]:
    """What people may be allowed to ask, and jobs, which they may publish."""
    writer = event_consumer(subjects)
    return (
        subjects.submit,
        *_requests(subjects, _READING),
        *_requests(subjects, _ORDERING),
        "$JS.API.INFO",
        *(f"$JS.API.STREAM.INFO.{stream}" for stream in (subjects.jobs_stream, *_readable(subjects))),
        *(f"$JS.API.DIRECT.GET.{stream}.>" for stream in _readable(subjects)),
        f"$JS.API.CONSUMER.INFO.{writer.stream}.{writer.name}",  # up to where the log files go
    )


def _requests(subjects: Subjects, verbs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(subjects.request(area, verb) for area, some in verbs.items() for verb in some)


def _many(subjects: Subjects) -> tuple[str, ...]:
    return ("$SRV.>", *(f"$JS.API.DIRECT.GET.{stream}" for stream in _readable(subjects)))


def _own_events(subjects: Subjects) -> tuple[str, ...]:
    """What a person's script tells and logs, `<area>.<id>.<what>`; all other events are facts of services."""
    return (subjects.event("app", "*", "*"), subjects.event("log", "*", "*"))


def _readable(subjects: Subjects) -> tuple[str, ...]:
    """Streams that a person may read."""
    return (subjects.events_stream, *(f"KV_{one}" for one in (subjects.jobs, subjects.devices, subjects.datasets)))


def _of_person(name: str, role: Role, subjects: Subjects) -> Person:
    every = _exports(subjects)
    match role:
        case "user":
            return Person(every.once, every.many, every.told, {own: f"{own}.{name}" for own in _own_events(subjects)})
        case "read-only":
            api = tuple(subject for subject in every.once if subject.startswith("$JS.API."))
            return Person((*_requests(subjects, _READING), *api), every.many, every.told)
        case "submit-only":
            return Person(once=(subjects.submit, subjects.request("jobs", "submit"), "$JS.API.INFO"))
