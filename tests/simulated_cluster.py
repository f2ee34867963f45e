"""A cluster on the simulated bus: real placers, hosts whose runners follow the runner's rules, and people.

Real code runs here: `lifecycle.decide` through `JobRecords`, `leases`, `Placer`, `Reports`, `DeviceManager`, placement.
A runner is played, since the real one forks processes; what it does with its record and its leases is written as there.

After every step is looked at: who has processes on which device, what the records say and said before, and at the end
the history that was told, and whether every accepted job has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest

from histories import FINAL, untold, violations
from railbus_device_manager import orders as orders_module
from railbus_device_manager import placer as placer_module
from railbus_device_manager import reports as reports_module
from railbus_device_manager import untold as untold_module
from railbus_device_manager.manager import DeviceManager
from railbus_device_manager.orders import Orders
from railbus_device_manager.placer import Placer
from railbus_device_manager.reports import Reports
from railbus_shared import clock
from railbus_shared.bus.bucket import Entry
from railbus_shared.bus.contents import Contents
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.effects import tell_queued
from railbus_shared.errors import RailbusError, TransientError
from railbus_shared.happenings import (
    CancelAsked,
    Happening,
    Held,
    PreemptAsked,
    PrioritySet,
    Released,
)
from railbus_shared.records import HeldRecord, JobRecords
from records_for_tests import spec
from simulated_bus import NONE, Actor, Faults, SimulatedBucket, SimulatedBus, Simulation
from simulated_host import LEASE_TTL_S, OVER, Host, Recorder, Telling

QUIET_AT_S = 20.0
"""From then on nothing goes wrong any more."""
PATIENCE_S = 400.0
"""By then every job has ended."""
_EPOCH_NS = 1_790_000_000_000_000_000


# --- a device_manager ------------------------------------------------------------------------------------------------


class Manager:
    """A device_manager that may be the placer: it watches the records, and takes submissions."""

    def __init__(self, sim: Simulation, recorder: Recorder, name: str) -> None:
        self.sim = sim
        self.name = name
        self.recorder = recorder
        self.starts = 0
        self.boot()

    def boot(self) -> None:
        self.starts += 1
        self.actor = Actor(f"{self.name}-{self.starts}", skew_s=self.sim.random.uniform(-3600, 3600))
        self.bus = SimulatedBus(self.sim, self.actor)
        self.telemetry = Telling(self.actor.name, self.recorder.events)
        self.records = JobRecords(SimulatedBucket(self.bus, self.bus.subjects.jobs))
        self.sim.current = self.actor
        manager = DeviceManager()
        self.reports = Reports(cast("Any", self.bus), manager.facts)
        self.placer = Placer(
            cast("Any", self.bus), manager, self.reports, cast("Any", self.telemetry), lease_ttl_s=LEASE_TTL_S
        )
        vars(self.placer._untold)["_told"] = self.told
        self.orders = Orders(cast("Any", self.bus), cast("Any", self.telemetry))
        self.sim.spawn(self.actor, self._place())

    async def told(self, _jobs: object) -> list[Contents]:
        """The ends that the stream of events holds."""

        def look() -> list[Contents]:
            ends = [event for event in self.recorder.events if event["type"] in FINAL]
            subjects = (self.bus.subjects.event("job", str(end["job"]), str(end["type"])[4:]) for end in ends)
            return [Contents(frozenset(subjects), first_ns=0)]

        found: list[Contents] = await self.sim.ask_store(self.actor, look)
        return found

    def create_task(self, coro: Any, /) -> object:
        """As a TaskGroup."""
        return self.sim.spawn(self.actor, coro)

    async def _place(self) -> None:
        self.read_all()
        while True:
            await self.sim.sleep(self.sim.random.uniform(0.2, 1.0))
            with contextlib.suppress(TransientError):
                if self.sim.faults != NONE and self.sim.random.random() < 0.2:
                    await self._look_with_old_eyes()
                else:
                    await self.placer.turn(self)

    async def _look_with_old_eyes(self) -> None:
        """As one that was paused after it had looked at its key, or after it had read the reports."""
        if self.sim.random.random() < 0.5:
            self.reports._read_at_s = self.sim.now
        await self.placer._look(self)

    def read_all(self) -> None:
        """What the watch tells first, and again after every reconnect."""
        bucket = self.bus.subjects.jobs
        for key in self.sim.keys(bucket):
            cell = self.sim.buckets[bucket][key]
            if cell.value is not None:
                self.hear(bucket, key, cell.value, cell.revision)

    def hear(self, bucket: str, key: str, value: dict[str, object] | None, revision: int) -> None:
        """What the watches tell."""
        self.sim.current = self.actor
        entry = Entry(key, value, revision)
        if bucket == self.bus.subjects.jobs and value is not None:
            self.placer.accept(HeldRecord(JobRecord.parse(value), revision))
        elif bucket == self.bus.subjects.leases:
            self.reports.hear_lease(entry, now=clock.boottime_s())
        elif bucket == self.bus.subjects.devices:
            self.reports.hear_device(entry)

    def reconnected(self) -> None:
        self.sim.current = self.actor
        self.placer.reconnected()
        self.read_all()

    async def ask(self, job: str, happening: Happening) -> None:
        """As `JobRequests`: for people, who are told what came of it, and look at why jobs wait."""
        with contextlib.suppress(*OVER, TransientError):
            await self.reports.refresh()
            applied = await self.records.apply(job, happening)
            if isinstance(happening, CancelAsked) and applied.record.cancel_requested:
                self.recorder.promised.add(job)
            self.placer.accept(applied.held)
            await self.orders.carry_out(applied)

    async def take(self, made: JobRecord) -> bool:
        """As `Submissions`: whether the event can be acknowledged."""
        try:
            held = await self.records.create(made)
        except TransientError:
            return False
        tell_queued(cast("Any", self.telemetry), held)
        self.placer.accept(held)
        return True


# --- the whole -------------------------------------------------------------------------------------------------------


class Cluster:
    """Two device_managers, some hosts, people who ask for things, and somebody who breaks them."""

    def __init__(self, seed: int, *, faults: Faults | None = None) -> None:
        self.recorder = Recorder()
        self.sim = Simulation(seed, faults=faults or Faults())
        self.sim.written = self._written
        dice = self.sim.random
        self.managers = [Manager(self.sim, self.recorder, f"dm{n}") for n in range(2)]
        self.hosts = [Host(self.sim, self.recorder, name, dice.randint(1, 2)) for name in "abc"[: dice.randint(1, 3)]]
        self.jobs: list[str] = []
        people = Actor("people")
        self.sim.spawn(people, self._submit(people))
        self.sim.spawn(people, self._wish())
        self.sim.spawn(Actor("chaos"), self._break())

    def run(self) -> list[str]:
        """Live through it; returns the promises that were broken."""
        self.sim.run(until_s=QUIET_AT_S, is_over=self._is_broken)
        self.sim.faults = NONE
        self.sim.run(until_s=PATIENCE_S, is_over=lambda: self._is_broken() or self._are_over())
        self.sim.run(until_s=self.sim.now + 5, is_over=self._is_broken)  # what is on its way may do no harm either
        silent = [f"the end of {job} is told to nobody" for job in untold(self.recorder.events, self.jobs)]
        left = [f"{job} is {self._state(job)} for ever" for job in self.jobs if not self._is_final(job)]
        kept = [
            f"{job} was promised to be cancelled" for job in self.recorder.promised if self._state(job) != "cancelled"
        ]
        told = violations(self.recorder.events, holders=False)  # the processes are looked at themselves
        for actor in [*(host.actor for host in self.hosts), *(manager.actor for manager in self.managers)]:
            self.sim.kill(actor)
        return [*self.recorder.broken, *told, *([] if self._is_broken() else [*left, *kept, *silent])]

    def _is_broken(self) -> bool:
        return bool(self.recorder.broken)

    def _are_over(self) -> bool:
        is_quiet = bool(self.jobs) and self.sim.now > QUIET_AT_S
        return is_quiet and all(map(self._is_final, self.jobs)) and not untold(self.recorder.events, self.jobs)

    def _state(self, job: str) -> str:
        record = self.recorder.versions.get(job)
        return "without a record" if record is None else record.state

    def _is_final(self, job: str) -> bool:
        record = self.recorder.versions.get(job)
        return record is not None and record.is_final

    def _written(self, bucket: str, key: str, value: dict[str, object] | None, revision: int) -> None:
        self.recorder.written(bucket, key, value, revision)
        for manager in self.managers:
            if manager.actor.cut_until <= self.sim.now:
                self._let_hear(manager, bucket, key, value, revision)

    def _let_hear(
        self, manager: Manager, bucket: str, key: str, value: dict[str, object] | None, revision: int
    ) -> None:
        actor = manager.actor

        def hear() -> None:
            if manager.actor is actor and actor.paused_until <= self.sim.now:
                manager.hear(bucket, key, value, revision)

        self.sim.after(self.sim.random.uniform(0.001, 0.5), hear)  # out of order: the revision tells

    # --- people ------------------------------------------------------------------------------------------------------

    async def _submit(self, people: Actor) -> None:
        dice = self.sim.random
        for number in range(1, dice.randint(3, 6)):
            await self.sim.sleep(dice.uniform(0, 3))
            wanted = spec(
                max_attempts=dice.randint(1, 3),
                devices={"kind": "cpu", "count": dice.choice([1, 1, 1, min(2, max(h.devices for h in self.hosts))])},
                retry={"backoff_s": dice.choice([0, 1, 3]), "max_backoff_s": 5},
                preemptible=dice.random() < 0.8,
            )
            made = JobRecord(
                id=f"j-{number}", spec=wanted, spec_sha256=wanted.digest, sequence=number, incarnation="sim",
                submitted_at=clock.now(), changed_at=clock.now(),
            )  # fmt: skip
            self.jobs.append(made.id)
            self.sim.spawn(people, self._deliver(made))

    async def _deliver(self, made: JobRecord) -> None:
        """The stream of jobs: to any device_manager, again until one acknowledges, and sometimes once more."""
        is_taken = False
        while not is_taken or self.sim.random.random() < 0.2:
            manager = self.sim.random.choice(self.managers)
            answers: list[object] = []
            self.sim.spawn(manager.actor, manager.take(made), _into(answers))
            await self.sim.sleep(self.sim.random.uniform(0.1, 4))
            is_taken = is_taken or answers == [True]

    async def _wish(self) -> None:
        dice = self.sim.random
        while self.sim.now < QUIET_AT_S:
            await self.sim.sleep(dice.expovariate(0.5))
            if self.jobs:
                job, manager = dice.choice(self.jobs), dice.choice(self.managers)
                self.sim.spawn(manager.actor, manager.ask(job, self._wish_for(job)))
        while not self._are_over():
            for job in self.jobs:
                self.sim.spawn(self.managers[0].actor, self.managers[0].ask(job, Released()))
            await self.sim.sleep(5)

    def _wish_for(self, job: str) -> Happening:
        dice, record = self.sim.random, self.recorder.versions.get(job)
        epoch = record.lease_epoch if record is not None else 0
        wishes: list[Happening] = [
            CancelAsked(at_once=dice.random() < 0.5),
            Held("ada"),
            Released(),
            PrioritySet(dice.randint(-1, 1)),
            PreemptAsked(epoch, "j-0"),
            PreemptAsked(epoch, "j-0"),
        ]
        return dice.choice(wishes)

    # --- what breaks -------------------------------------------------------------------------------------------------

    async def _break(self) -> None:
        dice = self.sim.random
        while self.sim.now < QUIET_AT_S and self.sim.faults != NONE:
            await self.sim.sleep(dice.expovariate(0.4))
            for_s = min(dice.expovariate(1 / 4), QUIET_AT_S - self.sim.now)
            if for_s > 0:
                breaks = [self._crash_runner, self._crash_manager, self._pause, self._starve, self._cut, self._cut_all]
                dice.choice(breaks)(for_s)

    def _crash_runner(self, for_s: float) -> None:
        host = self.sim.random.choice(self.hosts)
        host.crash()
        self._later(for_s, host, host.boot)

    def _crash_manager(self, for_s: float) -> None:
        manager = self.sim.random.choice(self.managers)
        self.sim.kill(manager.actor)
        self._later(for_s, manager, manager.boot)

    def _pause(self, for_s: float) -> None:
        victim = self._victim()
        victim.actor.paused_until = self.sim.now + for_s
        if isinstance(victim, Manager):
            self._later(for_s, victim, victim.read_all)

    def _starve(self, for_s: float) -> None:
        self.sim.random.choice(self.hosts).starved_until = self.sim.now + 2 * for_s

    def _cut(self, for_s: float) -> None:
        self._cut_off(self._victim(), for_s)

    def _cut_all(self, for_s: float) -> None:
        for host in self.hosts:
            self._cut_off(host, for_s)
        for manager in self.managers:
            self._cut_off(manager, for_s)

    def _cut_off(self, victim: Host | Manager, for_s: float) -> None:
        victim.actor.cut_until = self.sim.now + for_s
        if isinstance(victim, Manager):
            self._later(for_s, victim, victim.reconnected)

    def _victim(self) -> Host | Manager:
        processes: list[Host | Manager] = [*self.hosts, *self.managers]
        return self.sim.random.choice(processes)

    def _later(self, seconds: float, process: Host | Manager, what: Callable[[], None]) -> None:
        """Unless the process has been started anew by then."""
        actor = process.actor
        self.sim.after(seconds, lambda: what() if process.actor is actor else None)


def _into(answers: list[object]) -> Callable[[object, RailbusError | None], None]:
    return lambda answer, _: answers.append(answer)


@contextlib.contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Buckets and clocks of the code under test are the simulation's."""
    told = Clock()
    monkeypatch.setattr(placer_module, "Bucket", SimulatedBucket)
    monkeypatch.setattr(reports_module, "Bucket", SimulatedBucket)
    monkeypatch.setattr(placer_module.logger, "disabled", True)
    monkeypatch.setattr(orders_module.logger, "disabled", True)
    monkeypatch.setattr(untold_module.logger, "disabled", True)
    monkeypatch.setattr(clock, "boottime_s", told.boottime_s)
    monkeypatch.setattr(clock, "now_ns", told.now_ns)
    yield told


@dataclass
class Clock:
    """Time of whichever simulation runs, as the process that looks sees it."""

    sim: Simulation | None = None

    def boottime_s(self) -> float:
        return self.sim.now if self.sim is not None else 0.0

    def now_ns(self) -> int:
        sim = self.sim
        if sim is None:
            return _EPOCH_NS
        skew_s = sim.current.skew_s if sim.current is not None else 0.0
        return _EPOCH_NS + int((sim.now + skew_s) * 1e9)


def run_seed(told: Clock, seed: int) -> Cluster:
    """One history; what it has broken is in `recorder.broken`."""
    told.sim = None
    cluster = Cluster(seed)
    told.sim = cluster.sim
    cluster.recorder.broken = cluster.run()
    return cluster
