"""device_managers in this process on a real NATS, and hosts whose runners are played: they train nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from cluster_for_tests import device, host_report
from railbus_device_manager.service import DeviceManagerService
from railbus_device_manager.settings import Settings
from railbus_shared import clock, leases
from railbus_shared.bus import topology
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint, serving
from railbus_shared.contracts.devices import AttemptRef, RunnerReport
from railbus_shared.contracts.jobs import CheckpointRef, EndCause
from railbus_shared.contracts.requests import Nothing, StartAttempt, StopAttempt
from railbus_shared.contracts.saving import SaveAttempt, SavedCheckpoint
from railbus_shared.effects import tell
from railbus_shared.errors import RailbusError
from railbus_shared.happenings import Ended, Happening, ReleaseLeases, Started
from railbus_shared.metrics import Metrics
from railbus_shared.records import Applied, JobRecords
from railbus_shared.service import Context
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import LearningTelemetry, Sink
from railbus_shared.waiting import end
from until import PATIENCE_S

JOB: dict[str, object] = {"model": "m", "dataset": "d", "entrypoint": "classifier", "devices": {"kind": "cpu"}}


@dataclass
class History:
    """Events of all who take part, in the order in which they came to be told."""

    events: list[dict[str, JsonValue]] = field(default_factory=list)

    async def send(self, events: Sequence[dict[str, JsonValue]]) -> None:
        self.events += events

    def of(self, job: str) -> list[str]:
        return [str(event["type"]) for event in self.events if event.get("job") == job]


@dataclass
class PlayedRunner:
    """Takes what it is asked to start, and ends it when the test says so."""

    bus: Bus
    host: str
    telemetry: LearningTelemetry
    lease_ttl_s: int
    devices: int
    refusal: RailbusError | None = None
    """Answered to whoever asks for a start."""
    attempts: dict[AttemptRef, StartAttempt] = field(default_factory=dict)
    stops: list[StopAttempt] = field(default_factory=list)
    saves: list[SaveAttempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = JobRecords(Bucket(self.bus, self.bus.subjects.jobs))
        self.leases = Bucket(self.bus, self.bus.subjects.leases)
        self._reported = Bucket(self.bus, self.bus.subjects.devices)

    def endpoints(self) -> list[AnyEndpoint]:
        subject = self.bus.subjects.runner
        return [
            Endpoint("start", subject(self.host, "start"), StartAttempt, self.start),
            Endpoint("stop", subject(self.host, "stop"), StopAttempt, self.stop),
            Endpoint("save", subject(self.host, "save"), SaveAttempt, self.save),
        ]

    async def start(self, request: StartAttempt) -> Nothing:
        if self.refusal is not None:
            raise self.refusal
        applied = await self.apply(request.job, Started(request.lease_epoch, self.host))
        if applied.record.state == "running":
            self.attempts[AttemptRef(job=request.job, lease_epoch=request.lease_epoch)] = request
        else:
            await leases.release(self.leases, request.leases)
        return Nothing()

    async def stop(self, request: StopAttempt) -> Nothing:
        self.stops.append(request)
        return Nothing()

    async def save(self, request: SaveAttempt) -> SavedCheckpoint:
        self.saves.append(request)
        ref = CheckpointRef(number=1, step=5, sha256="0" * 64)
        return SavedCheckpoint(job=request.job, model="m", checkpoint=ref, bytes=1, seconds=0.5)

    def has(self, job: str) -> bool:
        return any(ref.job == job for ref in self.attempts)

    async def end(self, job: str, cause: EndCause = "ok") -> Applied:
        """End the attempt that it has of the job."""
        (ref,) = [ref for ref in self.attempts if ref.job == job]
        request = self.attempts.pop(ref)
        applied = await self.apply(job, Ended(ref.lease_epoch, self.host, cause))
        if ReleaseLeases() in applied.decision.effects:
            await leases.release(self.leases, request.leases)
        await self.report()
        return applied

    async def apply(self, job: str, happening: Happening) -> Applied:
        applied = await self.records.apply(job, happening)
        tell(self.telemetry, applied)
        return applied

    async def report(self) -> None:
        """What a runner says at each heartbeat, and the host's devices with it."""
        told = RunnerReport(
            host=self.host,
            runner=self.telemetry.producer,
            ready=True,
            attempts=tuple(self.attempts),
            entrypoints=("classifier",),
            reported_at=clock.now(),
        )
        slots = [device(f"{self.host}-cpu{index}") for index in range(self.devices)]
        await self._reported.put(self.host, host_report(self.host, *slots).to_map())
        await self._reported.put(f"{self.host}.runner", told.to_map())

    async def live(self) -> None:
        """Report and renew until cancelled."""
        while True:
            with contextlib.suppress(RailbusError):
                await self.report()
            for ref, request in list(self.attempts.items()):
                with contextlib.suppress(RailbusError):
                    held = await leases.renew(self.leases, request.leases, ttl_s=self.lease_ttl_s)
                    if ref in self.attempts:
                        self.attempts[ref] = request.changed(leases=held)
            await asyncio.sleep(self.lease_ttl_s / 4)


@contextlib.asynccontextmanager
async def played_runner(
    common: CommonSettings, host: str, *, history: Sink, devices: int = 1
) -> AsyncIterator[PlayedRunner]:
    """A host with so many CPU slots."""
    settings = common.model_copy(update={"host": host})
    telemetry = LearningTelemetry("runner", host=host).with_sink(history)
    async with Bus.open(settings, name=f"runner-{host}") as bus:
        await topology.ensure(bus, settings.layout.state / "store.json")
        runner = PlayedRunner(bus, host, telemetry, common.lease_ttl_s, devices)
        await runner.report()
        async with (
            serving(bus, "runner", "played", list(runner.endpoints()), metrics=Metrics("r"), rejected=_ignored),
            asyncio.TaskGroup() as tasks,
        ):
            work = [tasks.create_task(runner.live()), tasks.create_task(telemetry.run())]
            await bus.check_jetstream()
            yield runner
            await telemetry.flush(timeout_s=PATIENCE_S)
            await end(*work)


@contextlib.asynccontextmanager
async def device_manager(
    common: CommonSettings, host: str, *, history: Sink, preempt_after_s: float = 15.0
) -> AsyncIterator[DeviceManagerService]:
    """One that has no devices of its own, serving."""
    settings = common.model_copy(update={"host": host})
    telemetry, metrics = LearningTelemetry("device_manager", host=host).with_sink(history), Metrics("d")
    async with Bus.open(settings, name=f"dm-{host}") as bus:
        await topology.ensure(bus, settings.layout.state / "store.json")
        stopping = asyncio.Event()
        context = Context(settings, bus, telemetry, metrics, stopping)
        service = DeviceManagerService(context, Settings(cpu_slots=0, place_s=0.2, preempt_after_s=preempt_after_s))
        async with (
            serving(bus, "device_manager", "d", service.endpoints(), metrics=metrics, rejected=_ignored),
            asyncio.TaskGroup() as tasks,
        ):
            telling = tasks.create_task(telemetry.run())
            running = tasks.create_task(service.run())
            await bus.check_jetstream()  # once this is answered, the server knows of the subscriptions before it
            yield service
            stopping.set()
            await running
            await telemetry.flush(timeout_s=PATIENCE_S)
            await end(telling)


def _ignored(_subject: str, _data: bytes, _error: RailbusError) -> None:
    """What was refused is the asker's to look at."""
