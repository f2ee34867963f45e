"""The life of a service, the same for all: connect, register, serve HTTP, run, and on SIGTERM drain and exit 0.

Exit status: 0 after a clean stop; 2 for a setting that must change; 70 when NATS closed the connection for good and the
process must be started again; 1 for a bug.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import uvloop

from railbus_shared import files, http, logs
from railbus_shared.bus import topology
from railbus_shared.bus.access import Access, FileAccess
from railbus_shared.bus.connection import Bus, BusClosed
from railbus_shared.bus.endpoints import AnyEndpoint, serving
from railbus_shared.bus.sink import BusSink
from railbus_shared.errors import ConfigError, NotFound, RailbusError, TransientError, shorten
from railbus_shared.hidden_memory import hide_memory
from railbus_shared.metrics import Metrics, version
from railbus_shared.settings import CommonSettings, HttpSettings, without_password
from railbus_shared.store_marker import marker_path
from railbus_shared.telemetry import LearningTelemetry
from railbus_shared.waiting import end, is_set_within

logger = logging.getLogger(__name__)

EXIT_CONFIG: Final = 2
EXIT_BUS_CLOSED: Final = 70
_RETRY_S: Final = 0.5
_LOOK_AGAIN_S: Final = 2.0
_FLUSH_S: Final = 5.0
_SLACK_S: Final = 5.0  # over its grace, for a service that keeps to it itself


@dataclass(frozen=True)
class Context:
    """What a service is given; it closes nothing of it."""

    common: CommonSettings
    bus: Bus
    telemetry: LearningTelemetry
    metrics: Metrics
    stopping: asyncio.Event
    """Set at SIGTERM: take no new work."""


class Service(Protocol):
    """What is different between services."""

    def endpoints(self) -> list[AnyEndpoint]:
        """What it answers."""
        ...

    async def run(self) -> None:
        """Its background work; returns once `stopping` is set and it has finished or handed back what it held."""
        ...

    async def checks(self) -> Mapping[str, str]:
        """What its own work needs, and what is wrong with each; an empty string if nothing is."""
        ...


@dataclass(frozen=True)
class Description:
    """Name, and a sentence for `nats micro ls`."""

    name: str
    text: str


def run(
    description: Description,
    make: Callable[[Context], Service],
    *,
    common: CommonSettings,
    http: HttpSettings,
    access: Callable[[CommonSettings], Access] = FileAccess,
) -> int:
    """Run a service until SIGTERM or SIGINT and return its exit status. A second signal exits at once.

    `access` is called before there is a thread, a child or a connection.
    """
    telemetry = LearningTelemetry(description.name, host=common.host)
    telemetry.with_logging(level=common.log_level, event_level="warning")
    where = {"host": common.host, "nats": without_password(common.nats_url), "root": str(common.layout.root)}
    logger.info("starting", extra={"version": version(), **where})
    try:
        shown = access(common)
        hide_memory()
        uvloop.run(_Life(description, make, common, http, telemetry, shown).main())
    except BaseExceptionGroup as group:
        return _exit_status(group)
    except ConfigError as exc:
        return _exit_status(BaseExceptionGroup("", [exc]))
    return 0


def with_status(main: Callable[[], int], *, name: str) -> int:
    """The exit status of a service's `main`, also where its settings cannot be loaded: that is told as all else is."""
    try:
        return main()
    except ConfigError as exc:
        logs.configure(name)
        return _exit_status(BaseExceptionGroup("", [exc]))


def _exit_status(group: BaseExceptionGroup[BaseException]) -> int:
    """The status for what ended a service; raises again what is a bug."""
    known, rest = group.split((ConfigError, BusClosed))
    if rest is not None or known is None:
        raise group
    error = _first(known)
    logger.error("cannot go on", extra={"error": error.to_wire()})
    return EXIT_BUS_CLOSED if isinstance(error, BusClosed) else EXIT_CONFIG


class _Life:
    """One life of one service."""

    def __init__(
        self,
        description: Description,
        make: Callable[[Context], Service],
        common: CommonSettings,
        http_settings: HttpSettings,
        telemetry: LearningTelemetry,
        access: Access,
    ) -> None:
        self._description = description
        self._make = make
        self._common = common
        self._http = http_settings
        self._telemetry = telemetry
        self._access = access
        self._metrics = Metrics(description.name)
        self._stopping = asyncio.Event()
        self._reconnected = asyncio.Event()
        self._bus = self._new_bus()
        self._service: Service | None = None
        self._phase = "connecting"
        self._limit: asyncio.Timeout | None = None
        self._limit_s = 0.0

    def _new_bus(self) -> Bus:
        name = self._description.name
        return Bus(self._common, name=name, inbox=f"_RINBOX.{name}", access=self._access)

    async def main(self) -> None:
        self._handle_signals()
        async with contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(
                http.health_server(
                    name=self._description.name,
                    host=self._http.http_host,
                    port=self._http.http_port,
                    names=self._http.http_names,
                    checks=self._checks,
                    metrics=self._metrics,
                )
            )
            self._write_run_file(url)
            if not await self._connected():
                return
            stack.push_async_callback(self._bus.close)
            await self._serve(url)

    async def _serve(self, url: str) -> None:
        name = self._description.name
        context = Context(self._common, self._bus, self._telemetry, self._metrics, self._stopping)
        self._telemetry.with_sink(BusSink(self._bus), metrics=self._metrics)
        self._service = self._make(context)
        try:
            async with self._background(
                self._bus.run(),
                self._telemetry.run(),
                self._watch_store(),
                self._metrics.watch_process(self._common.layout.root),
            ):
                await self._work(self._service, url)
                self._telemetry.event("service.stopped", service=name, pid=os.getpid())
                await self._telemetry.flush(timeout_s=_FLUSH_S)
        except* NotFound:
            await self._check_store()  # that the store is another one says more than what was missed in it first
            raise

    async def _watch_store(self) -> None:
        """See after every reconnect whether NATS still has this store; raises StoreMissing, IncarnationMismatch."""
        while True:
            await self._reconnected.wait()
            self._reconnected.clear()
            while not await self._check_store():
                await is_set_within(self._reconnected, _LOOK_AGAIN_S)

    async def _check_store(self) -> bool:
        """False if it cannot be looked at now: NATS is away again, or its cluster is electing a leader."""
        try:
            await topology.check(self._bus, self._marker)
        except TransientError as exc:
            logger.info("store not looked at", extra={"problem": str(exc)})
            return False
        return True

    @property
    def _marker(self) -> Path:
        return marker_path(self._common.layout)

    async def _work(self, service: Service, url: str) -> None:
        """Answer and run until the service has drained; what it still holds when its grace is over is abandoned."""
        name = self._description.name
        try:
            async with (
                self._limited(self._http.grace_s + _SLACK_S),
                serving(
                    self._bus,
                    name,
                    self._description.text,
                    service.endpoints(),
                    metrics=self._metrics,
                    rejected=self._rejected,
                ),
            ):
                self._phase = ""
                self._telemetry.event("service.started", service=name, version=version(), pid=os.getpid(), url=url)
                logger.info("serving", extra={"url": url, "pid": os.getpid()})
                await service.run()
                self._phase = "stopping"
        except TimeoutError:
            if not self._stopping.is_set():
                raise
            logger.warning("work abandoned: the time to drain is over", extra={"grace_s": self._http.grace_s})

    @contextlib.asynccontextmanager
    async def _limited(self, seconds: float) -> AsyncIterator[None]:
        """End the body with TimeoutError so many seconds after the signal to stop."""
        self._limit_s = seconds
        async with asyncio.timeout(seconds if self._stopping.is_set() else None) as limit:
            self._limit = limit
            try:
                yield
            finally:
                self._limit = None

    @contextlib.asynccontextmanager
    async def _background(self, *work: Coroutine[None, None, None]) -> AsyncIterator[None]:
        """Run `work` beside the body; cancelled at its end, and the body is cancelled if any of it fails."""
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(one) for one in work]
            try:
                yield
            finally:
                await end(*started)

    async def _connected(self) -> bool:
        """Connect and ensure the topology, however long NATS takes to come; False if told to stop before that."""
        while not self._stopping.is_set():
            try:
                async with self._limited(0):
                    await self._bus.connect()
                    await topology.ensure(self._bus, self._marker)
            except (TransientError, TimeoutError) as exc:
                logger.warning("waiting for NATS", extra={"problem": str(exc)})
                await self._bus.close()
                await is_set_within(self._stopping, _RETRY_S)
                self._bus = self._new_bus()
                continue
            self._metrics.connected.set(1)
            self._bus.on_connection(self._connection_changed)
            return True
        return False

    def _connection_changed(self, connected: bool) -> None:
        self._metrics.connected.set(int(connected))
        if connected:
            self._metrics.reconnects.inc()
            self._reconnected.set()

    async def _checks(self) -> Mapping[str, str]:
        """What /readyz tells: NATS and JetStream first, then the service's own."""
        url = without_password(self._common.nats_url)
        if not self._bus.is_connected:
            return {"nats": f"not connected to {url}: {self._bus.problem or 'reconnecting'}"}
        found = {"nats": "", "jetstream": self._bus.storage_problem}
        try:
            await self._bus.check_jetstream()
        except RailbusError as exc:
            found["jetstream"] = f"NATS at {url}: {exc}"
        if self._service is None or self._phase:
            return {**found, "service": self._phase or "starting"}
        return {**found, **await self._service.checks()}

    def _rejected(self, subject: str, data: bytes, error: RailbusError) -> None:
        """Record what was refused: never dropped in silence."""
        self._telemetry.event(
            "bus.rejected",
            severity="warning",
            subject=subject,
            error=error.to_wire(),
            bytes=len(data),
            payload=shorten(data, limit=200),
        )

    def _write_run_file(self, url: str) -> None:
        if self._common.run_dir is None:
            return
        self._common.run_dir.mkdir(parents=True, exist_ok=True)
        path = self._common.run_dir / f"{self._description.name}.json"
        files.write_whole(path, files.to_json({"pid": os.getpid(), "http_url": url}))

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        if self._stopping.is_set():
            logger.warning("second signal: ending at once")
            sys.stderr.flush()
            os._exit(1)
        logger.info("stopping")
        self._stopping.set()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._limit_s)


def _first(group: BaseException) -> RailbusError:
    """The first error in a tree of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, RailbusError)  # noqa: S101 - `split` has sorted them
    return error
