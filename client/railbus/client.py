"""The Python client: submit jobs, look at them, follow their events, lease devices.

async with Client.connect() as client:
    job = await client.submit({"model": "digits-cnn", "dataset": "digits", "entrypoint": "classifier"})
    async for event in job.events():
        print(event["type"], event["data"])
    print((await job.wait()).state)

`railbus.connect()` gives the same without `await`; see `railbus.sync_client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from railbus.asking import FINAL_EVENTS as FINAL_EVENTS  # noqa: PLC0414 - part of the client's face
from railbus.asking import Asker, somebody
from railbus.ending import ended
from railbus.following import events_of
from railbus.job import CHECKPOINT_S, Job, checkpoint_now
from railbus.leasing import TTL_S, DeviceLease, leased, preference
from railbus_shared import clock, tracing
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.follow import Seam, follow, seam
from railbus_shared.contracts.jobs import DevicePreference, JobRecord, JobSpec, JobState
from railbus_shared.contracts.logs import EventLines, QueryEvents
from railbus_shared.contracts.requests import (
    CancelJob,
    CordonDevice,
    DatasetList,
    DatasetRef,
    DatasetSummary,
    DeviceList,
    DrainHost,
    Flushed,
    JobList,
    JobRef,
    ListJobs,
    Nothing,
    RevokeLease,
    VerifiedShards,
    VerifyShards,
)
from railbus_shared.contracts.saving import SavedCheckpoint
from railbus_shared.contracts.waiting import Why
from railbus_shared.errors import TransientError
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings, load, running_bus

_SUBMIT_S: Final = 15.0
_SUBMIT_AGAIN_S: Final = 60.0
_AGAIN_S: Final = 0.5
_VERIFY_S: Final = 3600.0
_FLUSH_S: Final = 50.0
_STANDS_BY_S: Final = 0.1  # before another one may be asked than the one that writes no log
_IN_FLIGHT: Final = 16


def settings_for(root: Path | None = None) -> CommonSettings:
    """How to reach the bus: `RAILBUS_NATS_URL` and its key file if set, else the `railbus up` of the root."""
    settings = load(CommonSettings)
    if root is not None:
        settings = settings.model_copy(update={"root": root})
    if "nats_url" in settings.model_fields_set:
        return settings
    return running_bus(Layout(settings.root)) or settings


class _JobRequests(Asker):
    """What can be asked about jobs."""

    async def submit(self, spec: JobSpec | Mapping[str, object]) -> Job:
        """Submit a job; the same submission made again is the same job.

        Where the environment has a `TRACEPARENT`, the job's spans come below it. Raises InvalidField, InvalidName,
        Conflict, UnknownEntrypoint, DatasetNotFound, IndexInvalid, …
        """
        record = await self.ask("jobs", "submit", _traced(_parsed(spec)), JobRecord, timeout_s=_SUBMIT_S)
        return Job(self, record)

    async def submit_all(
        self, specs: Iterable[JobSpec | Mapping[str, object]], *, in_flight: int = _IN_FLIGHT
    ) -> list[Job]:
        """Submit many jobs, `in_flight` at a time; returns them in the order of `specs`.

        A job with an id is asked for again while nobody answers, which cannot make it twice. Raises the first error,
        with no further job submitted after it; what was submitted before stays.
        """
        parsed, turns = [_parsed(spec) for spec in specs], asyncio.Semaphore(in_flight)

        async def one(spec: JobSpec) -> Job:
            async with turns:
                return await (self.submit(spec) if spec.id is None else self._submit_surely(spec))

        try:
            async with asyncio.TaskGroup() as tasks:
                submitting = [tasks.create_task(one(spec)) for spec in parsed]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        return [task.result() for task in submitting]

    async def _submit_surely(self, spec: JobSpec) -> Job:
        give_up_s = clock.boottime_s() + _SUBMIT_AGAIN_S
        while True:
            try:
                return await self.submit(spec)
            except TransientError:
                if clock.boottime_s() > give_up_s:
                    raise
                await asyncio.sleep(_AGAIN_S)

    async def dry_run(self, spec: JobSpec | Mapping[str, object]) -> Why:
        """What would become of a job: where it could run, what it would wait for, and when it may start."""
        return await self.ask("jobs", "dry_run", _parsed(spec), Why)

    async def job(self, job: str) -> JobRecord:
        """A job's record; raises JobNotFound."""
        return await self.ask("jobs", "get", JobRef.parse({"id": job}), JobRecord)

    async def attach(self, job: str) -> Job:
        """A handle on a job that was submitted before; raises JobNotFound."""
        return Job(self, await self.job(job))

    async def jobs(
        self,
        *,
        states: Sequence[JobState] = (),
        owner: str | None = None,
        group: str | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> JobList:
        """Records, newest first, as many as one message takes; those older than `before`, to read on."""
        fields = {"owner": owner, "group": group, "limit": limit, "before": before}
        request = ListJobs.parse({"states": tuple(states), **fields})
        return await self.ask("jobs", "list", request, JobList)

    async def cancel(self, job: str, *, now: bool = False) -> JobRecord:
        """Ask a job to end; returns its record, which may still be running towards its end."""
        request = CancelJob.parse({"id": job, "by": somebody(), "now": now})
        return await self.ask("jobs", "cancel", request, JobRecord)

    async def checkpoint(self, job: str, *, timeout_s: float = CHECKPOINT_S) -> SavedCheckpoint:
        """Have a running job write a checkpoint at its next step; returns once that is durable.

        Raises JobNotFound, Conflict if the job does not run or tracks nothing, RequestTimeout, StorageFull.
        """
        return await checkpoint_now(self, job, timeout_s=timeout_s)

    async def wait(self, jobs: Sequence[str]) -> list[JobRecord]:
        """Wait for the end of all these jobs; returns their records in the same order, whatever the ends."""
        return list((await ended(self, jobs)).values())


class _DeviceRequests(Asker):
    """What can be asked about devices."""

    async def devices(self) -> DeviceList:
        """All devices, and who has them."""
        return await self.ask("devices", "list", Nothing(), DeviceList)

    @contextlib.asynccontextmanager
    async def lease(
        self,
        *,
        gpus: int = 0,
        cpus: int = 0,
        devices: DevicePreference | None = None,
        host: str | None = None,
        holder: str | None = None,
        ttl_s: int = TTL_S,
        wait_s: float = 0.0,
    ) -> AsyncIterator[DeviceLease]:
        """Hold GPUs or CPU slots of this host (or of `host`) until the block ends; renewed in the background.

        Raises NoFreeDevice once `wait_s` have passed without any, and LeaseLost at the end of a block during which the
        lease was lost; `DeviceLease.check` tells earlier. Where this process is killed, it lapses after `ttl_s`.
        """
        wanted = devices or preference(gpus=gpus, cpus=cpus)
        where = host or settings_for().host
        async with leased(self, wanted, host=where, holder=holder, ttl_s=ttl_s, wait_s=wait_s) as lease:
            yield lease

    async def revoke(self, holder: str) -> None:
        """Take back what is held by hand under this name; raises NotFound."""
        await self.tell("devices", "revoke", RevokeLease.parse({"holder": holder}))

    async def drain(self, host: str, *, draining: bool = True) -> None:
        """Let a host take no new jobs, or take them again; what runs goes on."""
        await self.tell("devices", "drain", DrainHost.parse({"host": host, "draining": draining}))

    async def cordon(self, device: str, *, cordoned: bool = True, reason: str = "") -> None:
        """Let a device take no new jobs, or take them again; what runs goes on."""
        fields = {"device": device, "cordoned": cordoned, "reason": reason, "by": somebody()}
        request = CordonDevice.parse(fields)
        await self.tell("devices", "cordon", request)


class _DataRequests(Asker):
    """What can be asked about datasets and about what happened."""

    async def datasets(self) -> DatasetList:
        """All datasets that a dataloader knows."""
        return await self.ask("data", "list", Nothing(), DatasetList)

    async def describe(self, dataset: str) -> DatasetSummary:
        """One dataset, looked at anew; raises DatasetNotFound, SchemaInvalid, IndexInvalid."""
        return await self.ask("data", "describe", DatasetRef.parse({"dataset": dataset}), DatasetSummary)

    async def verify(self, dataset: str, *, again: bool = True) -> VerifiedShards:
        """Hash every shard of a dataset; raises ShardCorrupt."""
        request = VerifyShards.parse({"dataset": dataset, "again": again})
        return await self.ask("data", "verify", request, VerifiedShards, timeout_s=_VERIFY_S)

    async def events(self, query: QueryEvents) -> EventLines:
        """Events from the log files."""
        return await self.ask("telemetry", "query", query, EventLines)

    async def flush(self) -> Flushed:
        """Wait until every event published so far is in a closed log file; a telemetry that stands by is asked past."""
        give_up_s = asyncio.get_running_loop().time() + _FLUSH_S
        while True:
            try:
                return await self.ask("telemetry", "flush", Nothing(), Flushed, timeout_s=_FLUSH_S)
            except TransientError as exc:
                if exc.code != TransientError.code or asyncio.get_running_loop().time() > give_up_s:
                    raise
            await asyncio.sleep(_STANDS_BY_S)

    async def seam(self) -> Seam:
        """Up to where the log files hold everything; `follow` and `follow_all` go on behind its sequence."""
        return await seam(self.bus)

    def follow(self, job: str, *, after: int = 0) -> AsyncGenerator[dict[str, object], None]:
        """A job's events of every area (job, train, checkpoint, …), until the one that ends it.

        From its beginning, or behind a sequence of the stream that lies before its end.
        """
        return events_of(self, job, after=after)

    async def follow_all(self, *, after: int | None = None) -> AsyncGenerator[dict[str, object], None]:
        """Every event from now on, or behind a sequence of the stream."""
        subject = self.bus.subjects.all_events
        found = follow(self.bus, subject, since="new") if after is None else follow(self.bus, subject, after=after)
        async with contextlib.aclosing(found) as events:
            async for event in events:
                yield event


class Client(_JobRequests, _DeviceRequests, _DataRequests):
    """Everything a user can ask of a running railbus. Each method raises the error that the service answered."""

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, settings: CommonSettings | None = None) -> AsyncIterator[Self]:
        """Join the bus; raises BusUnavailable or NotAuthorized."""
        async with Bus.open(settings or settings_for(), name="client") as bus:
            yield cls(bus)


def _parsed(spec: JobSpec | Mapping[str, object]) -> JobSpec:
    return spec if isinstance(spec, JobSpec) else JobSpec.parse(spec)


def _traced(spec: JobSpec) -> JobSpec:
    """With the span that this process is part of, if it says one as others do."""
    context = tracing.parsed(os.environ.get(tracing.VARIABLE))
    return spec if spec.trace is not None or context is None else spec.changed(trace=str(context))
