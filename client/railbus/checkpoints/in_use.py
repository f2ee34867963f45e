"""Which checkpoints jobs that have not ended need, as NATS knows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from railbus_shared.contracts.jobs import JobRecord, JobState
from railbus_shared.errors import JobNotFound
from railbus_shared.layout import checkpoint_number
from railbus_shared.retention import Why

if TYPE_CHECKING:
    from railbus.client import Client

_OPEN: Final[tuple[JobState, ...]] = ("queued", "placed", "running", "checkpointing")
_PAGE: Final = 500


@dataclass(frozen=True)
class InUse:
    """What was true when it was asked for."""

    pinned: Mapping[str, Mapping[int, Why]]
    """Checkpoints that jobs which have not ended name, by model and number."""
    records: Mapping[str, JobRecord]
    """Of the jobs that were asked for, as far as NATS knows them."""


async def in_use(client: Client, *, jobs: Iterable[str] = ()) -> InUse:
    """Ask for the records of all jobs that have not ended, and of these."""
    pinned: dict[str, dict[int, Why]] = {}
    last: str | None = None
    while page := (await client.jobs(states=_OPEN, limit=_PAGE, before=last)).jobs:
        last = page[-1].id
        for record in page:
            pinned.setdefault(record.spec.model, {}).update(_named(record))
    records: dict[str, JobRecord] = {}
    for job in jobs:
        try:
            records[job] = await client.job(job)
        except JobNotFound:
            continue
    return InUse(pinned, records)


def _named(record: JobRecord) -> dict[int, Why]:
    """What a record names: where the job begins, and where it goes on."""
    named: dict[int, Why] = {}
    if (begins_from := checkpoint_number(f"{record.spec.resume_from}.meta.json")) is not None:
        named[begins_from] = "named"
    if record.checkpoint is not None:
        named[record.checkpoint.number] = "recorded"
    return named
