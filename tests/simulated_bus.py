"""A bus and a clock in memory, driven by a seed: coroutines of real code run on it without an event loop.

A coroutine awaits a `Call`; the simulation decides when, and whether, what it asks happens, and when it hears of it.
What an actor sends to the store arrives in the order in which it was sent, as on one connection, but may arrive long
after its sender has given up, or never; an answer may be lost after the write was stored; a request to a service may
come twice. Everything that happens comes from one random number generator, so a seed is a history.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from railbus_shared.bus.bucket import Bucket, Entry, Write
from railbus_shared.errors import BusUnavailable, NoResponder, RailbusError, RequestTimeout, RevisionConflict
from railbus_shared.subjects import Subjects

T = TypeVar("T")

TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong."""

    lost: float = 0.02
    """A message does not arrive."""
    unheard: float = 0.03
    """It arrives, and its answer does not."""
    stalled: float = 0.03
    """It, and all that its sender sends after it, arrive late."""
    doubled: float = 0.05
    """A request to a service arrives twice."""


NONE = Faults(0, 0, 0, 0)


@dataclass
class Actor:
    """A process."""

    name: str
    paused_until: float = 0
    cut_until: float = 0
    """No message gets through before."""
    link_free: float = 0
    """When what was sent last arrives."""
    skew_s: float = 0
    """Of its wall clock."""
    tasks: list[Task] = field(default_factory=list)


@dataclass
class Task:
    """A coroutine of an actor."""

    actor: Actor
    coro: Coroutine[Any, Any, Any]
    done: Callable[[object, RailbusError | None], None]
    is_over: bool = False


Resume = Callable[[object, RailbusError | None], None]


@dataclass
class Call:
    """What a coroutine waits for; `begin` is called once, with what resumes it."""

    begin: Callable[[Resume], None]

    def __await__(self) -> Generator[Call, object, Any]:
        return (yield self)


@dataclass
class Cell:
    """A key of a bucket; a value of None is a deletion that is remembered."""

    value: dict[str, object] | None
    revision: int
    expires_at: float | None


class Simulation:
    """Time, tasks and the store."""

    def __init__(self, seed: int, *, faults: Faults = NONE, check: Callable[[], None] = lambda: None) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.now = 0.0
        self.messages = 0
        self.current: Actor | None = None
        self.buckets: dict[str, dict[str, Cell]] = {}
        self.written: Callable[[str, str, dict[str, object] | None, int], None] = lambda *_: None
        """Told of every write that the store takes."""
        self._revisions: dict[str, int] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._check = check
        self.services: dict[str, tuple[Actor, Callable[[dict[str, object]], Coroutine[Any, Any, dict[str, object]]]]]
        self.services = {}

    # --- time and tasks ----------------------------------------------------------------------------------------------

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._numbers), what))

    def run(self, *, until_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Let things happen until then, or until it is over."""
        while self._heap and self._heap[0][0] <= until_s and not is_over():
            self.now, _, what = heapq.heappop(self._heap)
            what()
            self._check()

    def spawn(
        self,
        actor: Actor,
        coro: Coroutine[Any, Any, Any],
        done: Callable[[object, RailbusError | None], None] | None = None,
    ) -> Task:
        """Run a coroutine of an actor; an error that nobody hears of ends the simulation."""
        task = Task(actor, coro, done or _unheard)
        actor.tasks = [one for one in actor.tasks if not one.is_over]
        actor.tasks.append(task)
        self.after(0, lambda: self._step(task, None, None))
        return task

    def kill(self, actor: Actor) -> None:
        """End all tasks of an actor where they stand; what it has sent stays sent."""
        tasks, actor.tasks = actor.tasks, []
        for task in tasks:
            task.is_over = True
            task.coro.close()

    def sleep(self, seconds: float) -> Call:
        return Call(lambda resume: self.after(seconds, lambda: resume(None, None)))

    def _step(self, task: Task, value: object, error: RailbusError | None) -> None:
        actor = task.actor
        if task.is_over:
            return
        if actor.paused_until > self.now:
            self.after(actor.paused_until - self.now, lambda: self._step(task, value, error))
            return
        self.current = actor
        try:
            call = task.coro.throw(error) if error is not None else task.coro.send(value)
        except StopIteration as stop:
            task.is_over = True
            task.done(stop.value, None)
        except RailbusError as exc:
            task.is_over = True
            task.done(None, exc)
        else:
            call.begin(self._resumer(task))

    def _resumer(self, task: Task) -> Resume:
        called: list[bool] = []

        def resume(value: object, error: RailbusError | None) -> None:
            if not called:
                called.append(True)
                self._step(task, value, error)

        return resume

    # --- messages ----------------------------------------------------------------------------------------------------

    def latency_s(self) -> float:
        return self.random.uniform(0.001, 0.02)

    def ask_store(self, actor: Actor, what: Callable[[], T]) -> Call:
        """One question to the store, or one write."""
        return Call(lambda resume: self._send(actor, what, resume))

    def _send(self, actor: Actor, what: Callable[[], object], resume: Resume) -> None:
        self.messages += 1
        dice = self.random.random()
        faults = self.faults
        if actor.cut_until > self.now:
            self.after(TIMEOUT_S, lambda: resume(None, BusUnavailable("cut off")))
            if dice < 0.5:
                return  # the other half waits in a buffer until the way is open again
        elif dice < faults.lost:
            self.after(TIMEOUT_S, lambda: resume(None, RequestTimeout("lost")))
            return
        elif dice < faults.lost + faults.stalled:
            actor.link_free = self.now + self.random.uniform(1, 3 * TIMEOUT_S)
        arrives_at = max(self.now + self.latency_s(), actor.link_free, actor.cut_until)
        actor.link_free = arrives_at
        is_heard = not faults.lost + faults.stalled <= dice < faults.lost + faults.stalled + faults.unheard
        self.after(arrives_at - self.now, lambda: self._arrive(what, resume if is_heard else _nobody))
        self.after(TIMEOUT_S, lambda: resume(None, RequestTimeout("no acknowledgement came")))

    def _arrive(self, what: Callable[[], object], resume: Resume) -> None:
        value, error = None, None
        try:
            value = what()
        except RailbusError as exc:
            error = exc
        self.after(self.latency_s(), lambda: resume(value, error))

    def ask_service(self, actor: Actor, subject: str, body: dict[str, object], timeout_s: float) -> Call:
        """A request to whoever serves the subject now."""
        return Call(lambda resume: self._request(actor, subject, body, timeout_s, resume))

    def _request(self, actor: Actor, subject: str, body: dict[str, object], timeout_s: float, resume: Resume) -> None:
        self.messages += 1
        served = self.services.get(subject)
        if served is None:
            self.after(self.latency_s(), lambda: resume(None, NoResponder(f"nobody serves {subject}")))
            return
        self.after(timeout_s, lambda: resume(None, RequestTimeout(f"no answer from {subject}")))
        server, handle = served
        if actor.cut_until > self.now or server.cut_until > self.now or self.random.random() < self.faults.lost:
            return
        is_heard = self.random.random() >= self.faults.unheard

        def answered(value: object, error: RailbusError | None) -> None:
            if is_heard:
                self.after(self.latency_s(), lambda: resume(value, error))

        def arrive() -> None:
            if self.services.get(subject) == served:
                self.spawn(server, handle(dict(body)), answered)

        self.after(self.latency_s(), arrive)
        if self.random.random() < self.faults.doubled:
            self.after(self.random.uniform(0.001, 2), arrive)

    # --- the store ---------------------------------------------------------------------------------------------------

    def look(self, bucket: str, key: str) -> Cell | None:
        """A key as it is now; one that has expired is not there."""
        cell = self.buckets.setdefault(bucket, {}).get(key)
        if cell is not None and cell.expires_at is not None and cell.expires_at <= self.now:
            del self.buckets[bucket][key]
            return None
        return cell

    def keys(self, bucket: str) -> list[str]:
        return sorted(key for key in list(self.buckets.get(bucket, {})) if self.look(bucket, key) is not None)

    def write(self, bucket: str, changes: Sequence[Write]) -> int:
        """Take all changes or none; returns the last revision."""
        for change in changes:
            cell = self.look(bucket, change.key)
            if change.revision >= 0 and change.revision != (cell.revision if cell is not None else 0):
                raise RevisionConflict(f"key {change.key!r} has moved")
        for change in changes:
            revision = self._revisions[bucket] = self._revisions.get(bucket, 0) + 1
            expires_at = None if change.ttl_s is None else self.now + change.ttl_s
            value = None if change.value is None else dict(change.value)
            self.buckets.setdefault(bucket, {})[change.key] = Cell(value, revision, expires_at)
            self.written(bucket, change.key, value, revision)
        return self._revisions[bucket]


def _unheard(_value: object, error: RailbusError | None) -> None:
    if error is not None:
        raise AssertionError(f"an error that nobody hears of: {error!r}") from error


def _nobody(_value: object, _error: RailbusError | None) -> None:
    """The answer is lost."""


class SimulatedBus:
    """What an actor has of the bus."""

    incarnation = "sim"

    def __init__(self, simulation: Simulation, actor: Actor) -> None:
        self.simulation = simulation
        self.actor = actor
        self.subjects = Subjects()

    async def request(self, subject: str, body: Mapping[str, object], *, timeout_s: float = 5.0) -> dict[str, object]:
        answer: dict[str, object] = await self.simulation.ask_service(self.actor, subject, dict(body), timeout_s)
        return answer


class SimulatedBucket(Bucket):
    """A bucket of the simulation's store; every method is one message."""

    def __init__(self, bus: Any, name: str) -> None:
        super().__init__(bus, name)
        self._sim: Simulation = bus.simulation
        self._actor: Actor = bus.actor

    async def get_with_deleted(self, key: str) -> Entry | None:
        def look() -> Entry | None:
            cell = self._sim.look(self._name, key)
            return None if cell is None else Entry(key, cell.value, cell.revision)

        found: Entry | None = await self._sim.ask_store(self._actor, look)
        return found

    async def write(self, change: Write) -> int:
        return await self._write([change])

    async def write_all(self, changes: Sequence[Write]) -> list[int]:
        last = await self._write(list(changes))
        return [last - len(changes) + 1 + position for position in range(len(changes))]

    async def put(self, key: str, value: Mapping[str, object], *, ttl_s: int | None = None) -> int:
        return await self._write([Write(key, value, -1, ttl_s)])

    async def remove(self, key: str) -> None:
        await self._write([Write(key, None, -1)])

    async def snapshot(self) -> dict[str, Entry]:
        def read() -> dict[str, Entry]:
            found = {key: self._sim.buckets[self._name][key] for key in self._sim.keys(self._name)}
            return {key: Entry(key, cell.value, cell.revision) for key, cell in found.items() if cell.value is not None}

        entries: dict[str, Entry] = await self._sim.ask_store(self._actor, read)
        return entries

    async def read_all(self) -> dict[str, Entry]:
        return await self.snapshot()

    async def _write(self, changes: list[Write]) -> int:
        revision: int = await self._sim.ask_store(self._actor, lambda: self._sim.write(self._name, changes))
        return revision
