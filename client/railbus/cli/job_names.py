"""Which job is meant: by id, by the beginning of an id, or as `@last`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from railbus_shared.errors import InvalidField, InvalidName, JobNotFound

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.contracts.jobs import JobRecord

LAST: Final = "@last"
_LOOKED_AT: Final = 500


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
        chosen = choose(wanted, [record.id for record in records])
        return next(record for record in records if record.id == chosen)


def choose(wanted: str, ids: Sequence[str]) -> str:
    """The only id that begins so; raises JobNotFound with the nearest, or InvalidField with those that do."""
    matches = [one for one in ids if one.startswith(wanted)] if wanted else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(matches[:5]) + (", …" if len(matches) > 5 else "")
        raise InvalidField(field="JOB", value=wanted, problem=f"{len(matches)} jobs begin so", hint=f"one of {shown}")
    close = difflib.get_close_matches(wanted, ids, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`railbus jobs` lists them"
    raise JobNotFound(f"job has value {wanted!r}: there is no such job", hint=hint)
