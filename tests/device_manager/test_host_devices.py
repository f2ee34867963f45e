"""A device_manager over a real NATS, on GPUs that a test sets: faults, memory, cordons, drains, leases by hand.

The runner of the host is played by the test: it answers `stop`, and asks `check` as a runner does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster_for_tests import GIB, active, job, runner
from fakes import FakeGpus
from railbus_device_manager import host_devices, watch
from railbus_device_manager.faults import xid_fault
from railbus_device_manager.service import DeviceManagerService
from railbus_device_manager.settings import Settings
from railbus_shared import leases
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint, serving
from railbus_shared.contracts.checks import CheckedDevices
from railbus_shared.contracts.devices import Cordon, HeldLease
from railbus_shared.contracts.requests import DeviceList, DeviceState, Nothing, StartAttempt, StopAttempt
from railbus_shared.errors import InvalidField, LeaseLost, NoFreeDevice, NotFound
from railbus_shared.metrics import Metrics
from railbus_shared.service import Context
from railbus_shared.settings import CommonSettings
from railbus_shared.telemetry import LearningTelemetry
from until import until

GPU = "GPU-0f1e2d3c-1111-2222-3333-444455556666"
ID = "testhost-gpu-0f1e2d3c"


@dataclass
class Running:
    """One device_manager, what it told, and the runner that the test plays."""

    common: CommonSettings
    bus: Bus
    gpus: FakeGpus
    telemetry: LearningTelemetry
    stops: list[StopAttempt] = field(default_factory=list)
    starts: dict[str, StartAttempt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.leases = Bucket(self.bus, self.bus.subjects.leases)
        self.devices = Bucket(self.bus, self.bus.subjects.devices)
        self.jobs = Bucket(self.bus, self.bus.subjects.jobs)

    async def ask(self, verb: str, body: dict[str, object]) -> dict[str, Any]:
        return await self.bus.request(f"railbus.req.devices.{verb}", body)

    async def check(self, job: str = "j-1") -> CheckedDevices:
        request = {"job": job, "lease_epoch": 1, "devices": [ID]}
        return CheckedDevices.parse(await self.ask(f"{self.common.host}.check", request))

    async def listed(self) -> DeviceState:
        found = DeviceList.parse(await self.ask("list", {}))
        return next(state for state in found.devices if state.device.kind == "gpu")

    async def is_reported(self) -> bool:
        return bool(DeviceList.parse(await self.ask("list", {})).devices)

    async def until_state(self, state: str) -> DeviceState:
        async def is_so() -> bool:
            return (await self.listed()).state == state

        await until(is_so)
        return await self.listed()

    async def leased(self, job: str = "j-1", *, ttl_s: int = 60) -> tuple[HeldLease, ...]:
        device = (await self.listed()).device
        return await leases.grant(self.leases, [device], holder=job, lease_epoch=1, ttl_s=ttl_s)

    async def stop(self, order: StopAttempt) -> Nothing:
        self.stops.append(order)
        return Nothing()

    async def start(self, request: StartAttempt) -> Nothing:
        self.starts[request.job] = request
        return Nothing()

    def told(self, what: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = [dict(one) for run in self.telemetry._buffer._waiting for one in run.events]
        return [dict(event["data"]) for event in events if event["type"] == what]


@contextlib.asynccontextmanager
async def running(common: CommonSettings, gpus: FakeGpus, *, gpu_shares: int = 1) -> AsyncIterator[Running]:
    telemetry, metrics = LearningTelemetry("device_manager", host=common.host), Metrics("device_manager")
    async with Bus.open(common, name="device_manager", service=True) as own, Bus.open(common, name="test") as bus:
        there = Running(common, bus, gpus, telemetry)
        context = Context(common, own, telemetry, metrics, asyncio.Event())
        service = DeviceManagerService(context, Settings(cpu_slots=0, place_s=0.1, gpu_shares=gpu_shares), gpus=gpus)
        area = f"railbus.req.runner.{common.host}"
        played: list[AnyEndpoint] = [
            Endpoint("start", f"{area}.start", StartAttempt, there.start),
            Endpoint("stop", f"{area}.stop", StopAttempt, there.stop),
        ]
        async with (
            serving(own, "device_manager", "", service.endpoints(), metrics=metrics, rejected=lambda *_: None),
            serving(bus, "runner", "", played, metrics=Metrics("runner"), rejected=lambda *_: None),
            asyncio.TaskGroup() as tasks,
        ):
            working = tasks.create_task(service.run())
            await own.client.flush()
            await until(there.is_reported)
            yield there
            context.stopping.set()
            await working


@pytest.fixture
def common(common: CommonSettings) -> CommonSettings:
    """What is reported lives for five heartbeats: long enough that it outlives a busy moment."""
    return common.model_copy(update={"lease_ttl_s": 60, "heartbeat_s": 1.0})


@pytest.fixture
def gpus() -> FakeGpus:
    return FakeGpus("testhost", {GPU: 16 * GIB})


@pytest.fixture
async def host(common: CommonSettings, bus: Bus, gpus: FakeGpus) -> AsyncIterator[Running]:
    async with running(common, gpus) as there:
        yield there


# --- faults ----------------------------------------------------------------------------------------------------------


async def test_a_gpu_that_breaks_is_cordoned_over_restarts_and_its_attempt_stopped_until_a_person_lifts_it(
    common: CommonSettings, bus: Bus, gpus: FakeGpus
) -> None:
    async with running(common, gpus) as host:
        held = await host.leased()
        gpus.told = [xid_fault(GPU, 79)]
        await until(lambda: len(host.stops) >= 2)  # told again until its lease is gone
        assert {(stop.job, stop.lease_epoch, stop.reason) for stop in host.stops} == {("j-1", 1, "device_fault")}
        (cordoned,) = host.told("device.cordoned")
        assert (cordoned["device"], cordoned["cause"], cordoned["by"]) == (ID, "fault", "testhost")
        assert (await host.check()).devices[0].fault == "XID 79: it has fallen off the bus"
        await leases.release(host.leases, held)
        await host.until_state("cordoned")
    async with running(common, gpus) as host:
        state = await host.until_state("cordoned")
        assert state.device.health_reason == "XID 79: it has fallen off the bus"
        with pytest.raises(NoFreeDevice):
            await host.ask("lease", {"holder": "ann"})
        lifted = DeviceState.parse(await host.ask("cordon", {"device": ID, "cordoned": False, "by": "ann"}))
        assert lifted.state == "free"
        assert host.told("device.uncordoned") == [{"device": ID, "reason": "", "by": "ann"}]
        assert host.told("device.cordoned") == []


async def test_a_person_cordons_a_device_that_is_known_and_what_runs_on_it_goes_on(host: Running) -> None:
    held = await host.leased()
    answer = DeviceState.parse(await host.ask("cordon", {"device": ID, "reason": "noisy fan", "by": "ann"}))
    assert (answer.state, answer.device.cordoned, answer.device.health_reason) == ("leased", True, "noisy fan")
    await host.check()
    await leases.release(host.leases, held)
    await host.until_state("cordoned")
    entry = await host.devices.get(f"{ID}.cordon")
    assert entry is not None
    assert Cordon.parse(entry.value or {}).by == "ann"
    assert host.stops == []
    with pytest.raises(NotFound, match="nowhere-gpu0"):
        await host.ask("cordon", {"device": "nowhere-gpu0"})


# --- memory ----------------------------------------------------------------------------------------------------------


async def test_a_runner_that_asks_hears_that_a_gpu_is_clear_once_its_memory_is_back(
    host: Running, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.leased()
    gpus.pids[GPU] = [4711]
    monkeypatch.setattr(host_devices, "_CLEARING_S", 0.2)
    assert not (await host.check()).devices[0].clear
    monkeypatch.setattr(host_devices, "_CLEARING_S", 60)
    asked = asyncio.create_task(host.check())
    await asyncio.sleep(0)
    gpus.pids.clear()
    assert (await asked).devices[0].clear


async def test_a_gpu_with_a_mark_is_granted_again_only_when_its_memory_is_back(
    host: Running, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CLEAR_S", 0.5)
    gpus.pids[GPU], gpus.used_bytes[GPU] = [4711], 3 * GIB
    mark = {"device": ID, "host": "testhost", "job": "j-1", "lease_epoch": 1, "marked_at": "2026-01-01T00:00:00Z"}
    await host.leases.put(f"{ID}.reclaim", mark)

    async def is_dirty() -> bool:
        report = runner("testhost")  # the runner says at every heartbeat that it has no processes of the attempt
        await host.devices.put("testhost.runner", report.to_map(), ttl_s=60)
        return bool(host.told("device.cordoned"))

    await until(is_dirty)
    (cordoned,) = host.told("device.cordoned")
    assert cordoned["cause"] == "dirty"
    assert "4711" in cordoned["reason"]
    assert (await host.listed()).state == "reclaiming"
    gpus.pids.clear()
    gpus.used_bytes.clear()

    async def is_free() -> bool:
        await host.devices.put("testhost.runner", runner("testhost").to_map(), ttl_s=60)
        return (await host.listed()).state == "free"

    await until(is_free)
    assert host.told("device.reclaimed") == [{"device": ID}]
    assert len(host.told("device.uncordoned")) == 1


async def test_a_gpu_on_which_strangers_compute_is_not_granted_and_they_are_told(host: Running, gpus: FakeGpus) -> None:
    gpus.pids[GPU] = [4711]
    state = await host.until_state("reclaiming")
    assert (state.holder, state.device.compute_pids) == (None, (4711,))
    assert host.told("device.leaked") == [{"device": ID, "pids": [4711]}]
    with pytest.raises(NoFreeDevice):
        await host.ask("lease", {"holder": "ann"})
    gpus.pids.clear()
    await host.until_state("free")


# --- shares ----------------------------------------------------------------------------------------------------------


async def test_jobs_share_a_gpu_by_their_fractions_and_one_that_wants_it_alone_waits_for_all_of_it(
    common: CommonSettings, bus: Bus, gpus: FakeGpus
) -> None:
    async with running(common, gpus, gpu_shares=4) as host:
        await host.devices.put("testhost.runner", runner("testhost").to_map(), ttl_s=60)
        for record in (job("j-1", kind="gpu", sharing="fraction", fraction=0.5), job("j-2", kind="gpu")):
            await host.jobs.put(record.id, record.to_map())
            await until(lambda: "j-1" in host.starts)
        small = job("j-3", kind="gpu", sharing="fraction", fraction=0.4)
        await host.jobs.put(small.id, small.to_map())
        assert [held.lease.share for held in host.starts["j-1"].leases] == [1, 2]

        async def is_told() -> bool:
            return (await host.listed()).holders == ("j-1",)

        await until(is_told)
        assert set(host.starts) == {"j-1"}  # the rest of the GPU is kept for the job before it
        await host.jobs.put("j-1", active("j-1", ID).changed(state="succeeded", lease_epoch=1).to_map())
        await leases.release(host.leases, host.starts["j-1"].leases)
        await until(lambda: "j-2" in host.starts)
        assert [held.lease.share for held in host.starts["j-2"].leases] == [1, 2, 3, 4]
        assert (await host.listed()).state == "leased"


# --- by hand ---------------------------------------------------------------------------------------------------------


async def test_parts_of_a_gpu_are_leased_by_hand(common: CommonSettings, bus: Bus, gpus: FakeGpus) -> None:
    async with running(common, gpus, gpu_shares=4) as host:
        half: dict[str, object] = {"holder": "ann", "devices": {"sharing": "fraction", "fraction": 0.5}}
        first = await host.ask("lease", half)
        assert [one["lease"]["share"] for one in first["leases"]] == [1, 2]
        state = await host.listed()
        assert (state.state, state.free_shares, state.holders) == ("free", 2, ("ann",))
        with pytest.raises(NoFreeDevice):
            await host.ask("lease", {"holder": "bob"})
        await host.ask("lease", {**half, "holder": "bob"})
        state = await host.listed()
        assert (state.state, state.free_shares, state.holders) == ("leased", 0, ("ann", "bob"))
        await host.ask("release", await host.ask("renew", first))
        assert (await host.listed()).free_shares == 2


async def test_a_lease_by_hand_is_never_taken_for_a_jobs_nor_a_jobs_for_one_by_hand(host: Running) -> None:
    await host.jobs.put("my-job", active("my-job-1", ID).changed(id="my-job").to_map())
    for holder in ("j-0a1b2c-7", "my-job"):
        with pytest.raises(InvalidField, match=f"{holder}.*a job's id"):
            await host.ask("lease", {"holder": holder})
    held: list[dict[str, Any]] = [one.to_map() for one in await host.leased()]
    for verb in ("renew", "release"):
        with pytest.raises(InvalidField, match="its runner renews it"):
            await host.ask(verb, {"leases": held})
    forged: dict[str, object] = {
        "leases": [{**one, "lease": {**one["lease"], "lease_epoch": 0, "holder": "ann"}} for one in held]
    }
    with pytest.raises(LeaseLost):
        await host.ask("renew", forged)
    await host.ask("release", forged)
    state = await host.listed()
    assert (state.state, state.holder) == ("leased", held[0]["lease"]["holder"])


async def test_a_renewal_changes_nothing_of_a_lease_and_makes_none(host: Running) -> None:
    held = await host.ask("lease", {"holder": "ann"})
    (one,) = held["leases"]
    await host.ask("renew", {"leases": [{**one, "lease": {**one["lease"], "holder": "bob"}}]})
    assert (await host.listed()).holder == "ann"
    with pytest.raises(LeaseLost):
        await host.ask("renew", {"leases": [{"lease": {**one["lease"], "device": "a-gpu9"}, "revision": 0}]})
    assert list(await host.leases.snapshot()) == [ID]


async def test_a_drained_host_names_the_jobs_that_run_there_still(host: Running) -> None:
    await host.jobs.put("j-9", active("j-9", ID, host="testhost").to_map())
    await host.jobs.put("j-8", active("j-8", "b-gpu0", host="b").to_map())

    async def is_named() -> bool:
        answer = await host.ask("drain", {"host": "testhost"})
        assert (answer["host"], answer["draining"]) == ("testhost", True)
        return bool(answer["jobs"] == ["j-9"])

    await until(is_named)
    for _ in range(2):
        assert (await host.ask("drain", {"host": "testhost", "draining": False}))["draining"] is False
    assert len(host.told("host.drained")) == len(host.told("host.undrained")) == 1
