"""The client without `await`, for scripts and notebooks.

import railbus

with railbus.connect() as client:
    job = client.submit({"model": "digits-cnn", "dataset": "digits", "entrypoint": "classifier"})
    for event in job.events():
        print(event["type"], event["data"])
    print(job.wait().state)

with railbus.connect() as client, client.lease(gpus=1) as lease:
    ...  # lease.devices are this process's until the block ends

client = railbus.connect()  # or across the cells of a notebook
lease = client.lease(gpus=1)
lease.release()

Each call is the one of `railbus.client` of the same name, made on an event loop in a thread, so that both faces do the
same. A client that is not closed closes itself when the interpreter exits, and gives its leases back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from railbus.client import Client, settings_for
from railbus.job import CHECKPOINT_S, Job
from railbus.leasing import TTL_S, DeviceLease
from railbus.loop_thread import LoopThread
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import DevicePreference, JobRecord, JobSpec, JobState
from railbus_shared.contracts.logs import EventLines, QueryEvents
from railbus_shared.contracts.requests import DeviceList, JobList
from railbus_shared.contracts.saving import SavedCheckpoint
from railbus_shared.contracts.waiting import Why
from railbus_shared.settings import CommonSettings


def connect(root: Path | str | None = None, *, settings: CommonSettings | None = None) -> SyncClient:
    """Join the bus of `RAILBUS_NATS_URL`, or of the `railbus up` of `root` (./learning if not given).

    Raises BusUnavailable or NotAuthorized.
    """
    return SyncClient(settings or settings_for(None if root is None else Path(root)))


class SyncClient:
    """`railbus.Client` without `await`. Close it, or use it as a context; safe from any thread."""

    def __init__(self, settings: CommonSettings) -> None:
        self._thread = LoopThread(name="railbus-client", at_exit=self.close)
        self._open = contextlib.AsyncExitStack()
        """What is given back at the end: leases, then the connection."""
        try:
            self._client = self._thread.call(self._open.enter_async_context(Client.connect(settings)))
        except BaseException:
            self._thread.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back what is held and leave the bus; does nothing the second time."""
        if self._thread.is_alive:
            try:
                self._thread.call(self._open.aclose())
            finally:
                self._thread.stop()

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, spec: JobSpec | Mapping[str, object]) -> SyncJob:
        """Submit a job; the same submission made again is the same job. Raises what it was refused for."""
        return SyncJob(self._thread, self._thread.call(self._client.submit(spec)))

    def submit_all(self, specs: Iterable[JobSpec | Mapping[str, object]], *, in_flight: int = 16) -> list[SyncJob]:
        """Submit many jobs, `in_flight` at a time; raises the first error."""
        jobs = self._thread.call(self._client.submit_all(specs, in_flight=in_flight))
        return [SyncJob(self._thread, job) for job in jobs]

    def dry_run(self, spec: JobSpec | Mapping[str, object]) -> Why:
        """What would become of a job: where it could run, what it would wait for, and when it may start."""
        return self._thread.call(self._client.dry_run(spec))

    def attach(self, job: str) -> SyncJob:
        """A handle on a job that was submitted before; raises JobNotFound."""
        return SyncJob(self._thread, self._thread.call(self._client.attach(job)))

    def job(self, job: str) -> JobRecord:
        """A job's record; raises JobNotFound."""
        return self._thread.call(self._client.job(job))

    def jobs(
        self,
        *,
        states: Sequence[JobState] = (),
        owner: str | None = None,
        group: str | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> JobList:
        """Records, newest first, as many as one message takes; those older than `before`, to read on."""
        asking = self._client.jobs(states=states, owner=owner, group=group, limit=limit, before=before)
        return self._thread.call(asking)

    def cancel(self, job: str, *, now: bool = False) -> JobRecord:
        """Ask a job to end; returns its record, which may still be running towards its end."""
        return self._thread.call(self._client.cancel(job, now=now))

    def checkpoint(self, job: str, *, timeout_s: float = CHECKPOINT_S) -> SavedCheckpoint:
        """Have a running job write a checkpoint at its next step; returns once that is durable.

        Raises JobNotFound, Conflict if the job does not run or tracks nothing, RequestTimeout, StorageFull.
        """
        return self._thread.call(self._client.checkpoint(job, timeout_s=timeout_s))

    def wait(self, jobs: Sequence[str]) -> list[JobRecord]:
        """Wait for the end of all these jobs; returns their records in the same order, whatever the ends."""
        return self._thread.call(self._client.wait(jobs))

    # --- devices and events ------------------------------------------------------------------------------------------

    def devices(self) -> DeviceList:
        """All devices, and who has them."""
        return self._thread.call(self._client.devices())

    def lease(
        self,
        *,
        gpus: int = 0,
        cpus: int = 0,
        devices: DevicePreference | None = None,
        host: str | None = None,
        holder: str | None = None,
        ttl_s: int = TTL_S,
        wait_s: float = 0.0,
    ) -> SyncLease:
        """Hold GPUs or CPU slots of this host (or of `host`) from now on; renewed in the background.

        Given back at the end of a `with` block or by `release()`, when this client is closed, and when the interpreter
        exits; it lapses after `ttl_s` where the process is killed. Raises NoFreeDevice once `wait_s` have passed.
        """
        leasing = self._client.lease(
            gpus=gpus, cpus=cpus, devices=devices, host=host, holder=holder, ttl_s=ttl_s, wait_s=wait_s
        )
        held = contextlib.AsyncExitStack()
        lease = self._thread.call(held.enter_async_context(leasing))
        self._open.push_async_callback(held.aclose)
        return SyncLease(self._thread, lease, held)

    def events(self, query: QueryEvents) -> EventLines:
        """Events from the log files."""
        return self._thread.call(self._client.events(query))


class SyncJob:
    """`railbus.Job` without `await`."""

    def __init__(self, thread: LoopThread, job: Job) -> None:
        self._thread = thread
        self._job = job

    def __repr__(self) -> str:
        return repr(self._job)

    @property
    def id(self) -> str:
        """The job's id."""
        return self._job.id

    @property
    def state(self) -> JobState:
        """Its state when it was last asked for."""
        return self._job.state

    @property
    def record(self) -> JobRecord:
        """Its record when it was last asked for."""
        return self._job.record

    def refresh(self) -> Self:
        """Ask for its record; returns itself."""
        self._thread.call(self._job.refresh())
        return self

    def wait(self, *, timeout_s: float | None = None) -> JobRecord:
        """Wait for its end and return its record, whatever the end; raises RequestTimeout."""
        return self._thread.call(self._job.wait(timeout_s=timeout_s))

    def events(self) -> Iterator[dict[str, object]]:
        """Its events of every area from its beginning, until the one that ends it."""
        return self._thread.iterate(self._job.events())

    def why(self) -> Why:
        """Why it is where it is: what it waits for, who has that, when it may start."""
        return self._thread.call(self._job.why())

    def cancel(self, *, now: bool = False) -> Self:
        """Ask it to end, `now` without the grace in which it writes a checkpoint; it may still run for a while."""
        self._thread.call(self._job.cancel(now=now))
        return self

    def hold(self, *, held: bool = True) -> Self:
        """Keep it from being placed while it waits; `held=False` lets it go."""
        self._thread.call(self._job.hold(held=held))
        return self

    def set_priority(self, priority: int) -> Self:
        """Give it another priority while it waits, -100 to 100."""
        self._thread.call(self._job.set_priority(priority))
        return self

    def checkpoint(self, *, timeout_s: float = CHECKPOINT_S) -> SavedCheckpoint:
        """Have it write a checkpoint at its next step; returns once that is durable. Raises as `SyncClient` does."""
        return self._thread.call(self._job.checkpoint(timeout_s=timeout_s))

    def retry(self, *, from_scratch: bool = False) -> SyncJob:
        """A new job like this one, which has ended; it begins from its last checkpoint, or `from_scratch`."""
        return SyncJob(self._thread, self._thread.call(self._job.retry(from_scratch=from_scratch)))


class SyncLease:
    """Devices that are held from the call of `SyncClient.lease` on; across the cells of a notebook, or for a block."""

    def __init__(self, thread: LoopThread, lease: DeviceLease, held: contextlib.AsyncExitStack) -> None:
        self._thread = thread
        self._lease = lease
        self._held = held

    def __repr__(self) -> str:
        return repr(self._lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """What is held."""
        return self._lease.devices

    @property
    def holder(self) -> str:
        """The name under which `railbus devices` shows it."""
        return self._lease.holder

    @property
    def cores(self) -> frozenset[int]:
        """CPU numbers of the leased slots, for `os.sched_setaffinity`; empty where only GPUs are leased."""
        return self._lease.cores

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which a new process sees these devices and no others."""
        return self._lease.environment

    def check(self) -> None:
        """Raises LeaseLost once the devices may be somebody else's."""
        self._lease.check()

    def release(self) -> None:
        """Give the devices back; raises LeaseLost if they were lost before. Does nothing the second time."""
        if self._thread.is_alive:
            self._thread.call(self._held.aclose())
