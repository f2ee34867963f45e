"""The Python client: submit jobs, look at them, follow their events.

async with Client.connect() as client:
    job = await client.submit({"model": "digits-cnn", "dataset": "digits", "entrypoint": "classifier"})
    async for event in client.follow(job.id):
        print(event["type"], event["data"])
    print((await client.job(job.id)).state)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

from railbus_shared.bus.connection import Bus
from railbus_shared.bus.follow import follow
from railbus_shared.contracts.jobs import JobRecord, JobSpec, JobState
from railbus_shared.contracts.model import Contract
from railbus_shared.contracts.requests import (
    DatasetList,
    DatasetRef,
    DatasetSummary,
    DeviceList,
    EventLines,
    Flushed,
    JobList,
    JobRef,
    ListJobs,
    Nothing,
    QueryEvents,
    VerifiedShards,
    VerifyShards,
)
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings, load, running_bus

A = TypeVar("A", bound=Contract)

_SUBMIT_S: Final = 15.0
_VERIFY_S: Final = 3600.0
FINAL_EVENTS: Final = frozenset({"job.succeeded", "job.failed", "job.cancelled"})


def settings_for(root: Path | None = None) -> CommonSettings:
    """How to reach the bus: `RAILBUS_NATS_URL` and its key file if set, else the `railbus up` of the root."""
    settings = load(CommonSettings)
    if root is not None:
        settings = settings.model_copy(update={"root": root})
    if "nats_url" in settings.model_fields_set:
        return settings
    return running_bus(Layout(settings.root)) or settings


class Client:
    """Everything a user can ask of a running railbus. Each method raises the error that the service answered."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, settings: CommonSettings | None = None) -> AsyncIterator[Self]:
        """Join the bus; raises BusUnavailable or NotAuthorized."""
        async with Bus.open(settings or settings_for(), name="client") as bus:
            yield cls(bus)

    async def submit(self, spec: JobSpec | Mapping[str, object]) -> JobRecord:
        """Submit a job; returns its record, or the one that the same submission made before.

        Raises InvalidField, InvalidName, Conflict, UnknownEntrypoint, DatasetNotFound, IndexInvalid, …
        """
        parsed = spec if isinstance(spec, JobSpec) else JobSpec.parse(spec)
        return await self._ask("jobs", "submit", parsed, JobRecord, timeout_s=_SUBMIT_S)

    async def job(self, job: str) -> JobRecord:
        """A job's record; raises JobNotFound."""
        return await self._ask("jobs", "get", JobRef(id=job), JobRecord)

    async def jobs(self, *, states: Sequence[JobState] = (), limit: int = 100) -> JobList:
        """Records, newest first."""
        return await self._ask("jobs", "list", ListJobs(states=tuple(states), limit=limit), JobList)

    async def cancel(self, job: str) -> JobRecord:
        """Ask a job to end; returns its record, which may still be running towards its end."""
        return await self._ask("jobs", "cancel", JobRef(id=job), JobRecord)

    async def devices(self) -> DeviceList:
        """All devices, and who has them."""
        return await self._ask("devices", "list", Nothing(), DeviceList)

    async def datasets(self) -> DatasetList:
        """All datasets that a dataloader knows."""
        return await self._ask("data", "list", Nothing(), DatasetList)

    async def describe(self, dataset: str) -> DatasetSummary:
        """One dataset, looked at anew; raises DatasetNotFound, SchemaInvalid, IndexInvalid."""
        return await self._ask("data", "describe", DatasetRef(dataset=dataset), DatasetSummary)

    async def verify(self, dataset: str, *, again: bool = True) -> VerifiedShards:
        """Hash every shard of a dataset; raises ShardCorrupt."""
        request = VerifyShards(dataset=dataset, again=again)
        return await self._ask("data", "verify", request, VerifiedShards, timeout_s=_VERIFY_S)

    async def events(self, query: QueryEvents) -> EventLines:
        """Events from the log files."""
        return await self._ask("telemetry", "query", query, EventLines)

    async def flush(self) -> Flushed:
        """Wait until every event published so far is in a closed log file."""
        return await self._ask("telemetry", "flush", Nothing(), Flushed, timeout_s=50.0)

    async def follow(self, job: str) -> AsyncIterator[dict[str, object]]:
        """A job's events of every area (job, train, checkpoint, …) from its beginning, until the one that ends it."""
        async with contextlib.aclosing(follow(self._bus, self._bus.subjects.event("*", job, ">"))) as events:
            async for event in events:
                yield event
                if event.get("type") in FINAL_EVENTS:
                    return

    async def follow_all(self) -> AsyncIterator[dict[str, object]]:
        """Every event from now on."""
        async with contextlib.aclosing(follow(self._bus, self._bus.subjects.all_events, since="new")) as events:
            async for event in events:
                yield event

    async def _ask(self, area: str, verb: str, request: Contract, answer: type[A], *, timeout_s: float = 10.0) -> A:
        subject = self._bus.subjects.request(area, verb)
        return answer.parse(await self._bus.request(subject, request.to_map(), timeout_s=timeout_s))
