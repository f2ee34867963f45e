"""Which job is meant: by id, by the beginning of an id, or as `@last`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from railbus.cli.session import connected, session
from railbus_shared.errors import InvalidField, InvalidName, JobNotFound, NotFound, TransientError

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.contracts.jobs import JobRecord, JobState

LAST: Final = "@last"
_LISTED: Final = "`railbus jobs` lists them"
_LOOKED_AT: Final = 500
_PAGE: Final = 100
_NEAR: Final = 3


async def find_job(client: Client, wanted: str) -> JobRecord:
    """The record of the job that is meant; raises JobNotFound, or InvalidField where several may be meant."""
    if wanted == LAST:
        newest = (await client.jobs(limit=1)).jobs
        if not newest:
            raise JobNotFound("there is no job yet", hint="`railbus submit JOB.yaml` makes one")
        return newest[0]
    try:
        return await client.job(wanted)
    except (JobNotFound, InvalidName):
        records = (await client.jobs(limit=_LOOKED_AT)).jobs
        try:
            chosen = choose(wanted, [record.id for record in records])
        except JobNotFound as exc:
            raise await _rejected(client, wanted) or exc from None
        return next(record for record in records if record.id == chosen)


async def _rejected(client: Client, wanted: str) -> JobNotFound | None:
    """That it was refused when it came, if telemetry knows of that."""
    from railbus_shared.contracts.logs import QueryEvents

    try:
        found = (await client.events(QueryEvents.parse({"job": wanted, "types": ("job.rejected",), "limit": 1}))).events
    except (InvalidName, TransientError):
        return None
    data = found[-1].get("data") if found else None
    error = data.get("error") if isinstance(data, dict) else None
    if not isinstance(error, dict):
        return None
    why = f"{error.get('code')}: {error.get('message')}"
    return JobNotFound(f"job {wanted!r} was rejected when it was submitted: {why}", hint=str(error.get("hint") or ""))


async def job_id(wanted: str) -> str:
    """The id of the job that is meant: itself if the log files know it, else by the bus, else by the files."""
    from railbus_shared.log_reader import tail_events

    if wanted != LAST and tail_events(session().layout, limit=1, job=wanted):
        return wanted
    has_files = session().layout.logs.is_dir()
    try:
        async with connected() as client:
            return (await find_job(client, wanted)).id
    except JobNotFound as exc:
        if not has_files:
            raise
        return _in_files(wanted, exc, otherwise="nor on the bus")
    except TransientError as exc:
        if not has_files:
            raise
        return _in_files(wanted, otherwise=f"and the bus cannot be asked: {exc.message}")


def _in_files(wanted: str, found: JobNotFound | None = None, *, otherwise: str) -> str:
    """The id of the job that is meant, by the log files; `found` is what the bus says of it."""
    from railbus_shared.log_reader import read_events, tail_events

    layout = session().layout
    if wanted == LAST and (newest := tail_events(layout, limit=1, types=["job.queued"])):
        return str(newest[-1].get("job"))
    ids = dict.fromkeys(str(event.get("job")) for event in read_events(layout, types=["job.queued"]))
    try:
        return choose(wanted, list(ids))
    except JobNotFound as exc:
        where = f"{'neither' if found else 'not'} in the log files of {str(layout.root)!r} {otherwise}"
        hint = found.hint if found and exc.hint == _LISTED else exc.hint
        raise JobNotFound(f"job has value {wanted!r}: there is no such job, {where}", hint=hint) from exc


async def find_jobs(client: Client, wanted: Sequence[str]) -> list[JobRecord]:
    """The records of all jobs that are meant, each once; raises like `find_job`, before anything is done to any."""
    found = [await find_job(client, one) for one in wanted]
    return list({record.id: record for record in found}.values())


async def find_group(client: Client, group: str, *, states: Sequence[JobState] = ()) -> list[JobRecord]:
    """The records of a group's jobs in these states, oldest first; raises JobNotFound if the group has none at all."""
    found: list[JobRecord] = []
    while page := (await client.jobs(group=group, states=states, limit=_PAGE, before=_last(found))).jobs:
        found += page
    if not found and not (await client.jobs(group=group, limit=1)).total:
        raise JobNotFound(f"group has value {group!r}: no job belongs to it", hint="`railbus jobs` lists jobs")
    return found[::-1]


def _last(records: Sequence[JobRecord]) -> str | None:
    return records[-1].id if records else None


def choose(wanted: str, ids: Sequence[str]) -> str:
    """The only id that begins so; raises JobNotFound with the nearest, or InvalidField with those that do."""
    return choose_one(wanted, ids, kind="job", hint=_LISTED, error=JobNotFound)


def choose_one(wanted: str, ids: Sequence[str], *, kind: str, hint: str, error: type[NotFound] = NotFound) -> str:
    """The id itself, or the only one that begins so; raises `error` with the nearest, or InvalidField."""
    if wanted in ids:
        return wanted
    matches = [one for one in ids if one.startswith(wanted)] if wanted else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(matches[:5]) + (", …" if len(matches) > 5 else "")
        raise InvalidField(
            field=kind.upper(), value=wanted, problem=f"{len(matches)} {kind}s begin so", hint=f"one of {shown}"
        )
    close = difflib.get_close_matches(wanted.lower(), ids, n=_NEAR)
    near = f"did you mean {' or '.join(map(repr, close))}?" if close else hint
    raise error(f"{kind} has value {wanted!r}: there is no such {kind}", hint=near)
