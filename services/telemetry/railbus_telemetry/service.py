"""The telemetry service: takes every event from the stream and puts it on disk, once.

Messages in: everything on `<prefix>.evt.>`, by the durable consumer `telemetry-writer`; requests `telemetry.query` and
`telemetry.flush`. A batch is acknowledged once its bytes are flushed to disk; what cannot be written stays in the
stream. One root holds the log of a store (`claim`), and one instance writes it at a time; others of that root stand by
at its lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import gc
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.consume import Delivery, consume_batches
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.logs import EventLines, QueryEvents
from railbus_shared.contracts.requests import Flushed, Nothing
from railbus_shared.errors import RequestTimeout, StorageFull, TransientError
from railbus_shared.log_reader import query
from railbus_shared.service import Context, Description
from railbus_shared.topology import event_consumer
from railbus_shared.waiting import end, is_set_within, whole
from railbus_telemetry.claim import LogClaim, LogRoot
from railbus_telemetry.closing import IsStopping, LeftOpen
from railbus_telemetry.lines import portions
from railbus_telemetry.removing import Rules
from railbus_telemetry.runs import Run
from railbus_telemetry.series import LogSeries
from railbus_telemetry.settings import Settings
from railbus_telemetry.traces import TraceExporter
from railbus_telemetry.upkeep import Upkeep

logger = logging.getLogger(__name__)

DESCRIPTION: Final = Description("telemetry", "Every event on disk once: the logs tree, and questions about it.")
_TICK_S: Final = 1.0
_COLLECT_AFTER: Final = (
    50_000  # objects: lines are many, refer to nothing, and are gone soon; it was a third of the time
)
_SWITCH_S: Final = 0.0005  # a thread that has written waits so long for one that decodes; by default ten times that
_KEPT_BYTES: Final = 16 << 20
_THIN_BYTES_PER_S: Final = 16 << 10  # a trainer that tells its metrics makes some 2 KiB/s
_THIN_GAP_S: Final = 0.5  # between two batches, each of which is flushed to disk, unless somebody waits for them
_GAP_S: Final = 0.05  # where more than that comes
_BATCH_BYTES: Final = 1 << 20  # of messages; their lines take some nine times that
_LINES_BYTES: Final = 16 << 20  # written at once, however much messages expand
_LAST_EVENTS_FRAC: Final = (
    0.25  # of the grace, for what the stream still holds at a stop; the next start writes the rest
)
_CLOSING_FRAC: Final = 0.5  # of the grace, for closing at a stop; the next start has what was left open
_DISK_ERRORS: Final = (StorageFull, OSError)
_FLUSH_S: Final = 40.0  # longer than a lost delivery takes to come again
_POLL_S: Final = 0.05

A = TypeVar("A")


class TelemetryService:
    """Writes the logs tree; one writer for each root."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._layout = context.common.layout
        self._series: LogSeries | None = None
        self._appending = asyncio.Lock()
        self._closing = asyncio.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="log")
        self._progress = asyncio.Condition()
        self._hurry = asyncio.Event()
        self._all_written = asyncio.Event()
        self._problem = "standing by: another telemetry service writes this root"
        self._closing_problem = ""
        metrics = context.metrics
        self._lines = metrics.counter("log_lines_written", "Events appended to the log files.")
        self._doubles = metrics.counter("log_lines_skipped", "Events that were on disk already.")
        self._traces = TraceExporter(
            settings.otlp_endpoint,
            headers={name: value.get_secret_value() for name, value in settings.otlp_headers.items()},
            metrics=metrics,
            incarnation=context.bus.incarnation,
            layout=self._layout,
        )
        self._append_seconds = metrics.histogram("log_append_seconds", "Time to append and flush a batch.")
        rules = Rules(settings.keep_days, settings.keep_bytes)
        self._upkeep = Upkeep(self._layout, rules, tell=context.telemetry.event, metrics=metrics)
        self._lag_seconds = metrics.histogram("log_lag_seconds", "From a batch's first event to its line on disk.")

    def endpoints(self) -> list[AnyEndpoint]:
        subjects = self._context.bus.subjects
        return [
            Endpoint("query", subjects.request("telemetry", "query"), QueryEvents, self._query),
            Endpoint("flush", subjects.request("telemetry", "flush"), Nothing, self._flush),
        ]

    async def run(self) -> None:
        """Write until told to stop, and what the stream holds by then; then close the period."""
        async with self._only_writer():
            claim = await self._claimed()
            if claim is None:
                return
            async with asyncio.TaskGroup() as tasks:
                keeping = tasks.create_task(claim.keep())
                await self._write_log()
                await end(keeping)

    async def _write_log(self) -> None:
        series = None if self._context.stopping.is_set() else await self._open_series()
        if series is None:
            return
        _tune_interpreter()
        try:
            async with self._traces.exporting():
                await self._write_all(series)
                with self._closing_told():
                    until_s = time.monotonic() + self._settings.grace_s * _CLOSING_FRAC
                    await self._close(is_stopping=lambda: time.monotonic() >= until_s)
                await self._upkeep.finish()
        finally:
            async with self._appending, self._closing:
                self._series = None  # from here on another process may write the root
            self._threads.shutdown(wait=False)

    async def _write_all(self, series: LogSeries) -> None:
        async with asyncio.TaskGroup() as tasks:
            beside = (
                tasks.create_task(self._rotate()),
                tasks.create_task(self._upkeep.run(series)),
                tasks.create_task(self._write_last_events()),
            )
            await consume_batches(
                self._context.bus,
                event_consumer(self._context.bus.subjects),
                self._write,
                stopping=self._all_written,
                batch=self._settings.batch,
                batch_bytes=_BATCH_BYTES,
                gap_s=lambda rate: _GAP_S if rate > _THIN_BYTES_PER_S else _THIN_GAP_S,
                hurry=self._hurry,
            )
            await end(*beside)

    async def checks(self) -> Mapping[str, str]:
        return {"log": self._problem or self._closing_problem}

    # --- writing -----------------------------------------------------------------------------------------------------

    async def _write(self, deliveries: list[Delivery]) -> bool:
        """Append a batch; while the disk is full or fails, wait and try again, and acknowledge nothing."""
        messages = ((d.sequence, d.subject, d.data) for d in deliveries)
        incarnation, producer = self._context.bus.incarnation, self._context.telemetry.producer
        for runs in portions(messages, incarnation=incarnation, telemetry=producer, limit_bytes=_LINES_BYTES):
            if not await self._written(runs):
                return False
        self._traces.heed(deliveries)
        return True

    async def _written(self, runs: list[Run]) -> bool:
        while True:
            try:
                started = time.perf_counter()
                written = await self._append(runs)
            except _DISK_ERRORS as exc:
                self._alarm(str(exc))
                if await is_set_within(self._context.stopping, _TICK_S):
                    self._all_written.set()  # all that can be
                    return False
                continue
            self._problem = ""
            self._append_seconds.observe(time.perf_counter() - started)
            self._count(runs, written)
            async with self._progress:
                self._progress.notify_all()
            return True

    def _count(self, runs: list[Run], written: list[Run]) -> None:
        num_written = sum(run.num_lines for run in written)
        self._lines.inc(num_written)
        self._doubles.inc(sum(run.num_lines for run in runs) - num_written)
        now_ns = clock.now_ns()
        for run in written:
            self._lag_seconds.observe(max(0, now_ns - run.at_ns) / clock.NS_PER_S)

    async def _append(self, runs: list[Run]) -> list[Run]:
        return await self._alone(self._appending, lambda series: series.append(runs))

    def _alarm(self, problem: str) -> None:
        if problem != self._problem:
            logger.error("events wait in the stream", extra={"problem": problem})
        self._problem = problem

    async def _write_last_events(self) -> None:
        """Once it is to stop: end the writing when what the stream holds by then is on disk, or the time is over."""
        await self._context.stopping.wait()
        try:
            await self._written_until(await self._last_sequence(), self._settings.grace_s * _LAST_EVENTS_FRAC)
        except TransientError as exc:
            logger.info("events wait in the stream for the next start", extra={"problem": str(exc)})
        finally:
            self._all_written.set()

    async def _last_sequence(self) -> int:
        return await self._context.bus.last_sequence(self._context.bus.subjects.events_stream)

    async def _written_until(self, last: int, timeout_s: float) -> None:
        """Wait until all up to `last` is on disk; no batch rests meanwhile. Raises RequestTimeout, TransientError."""
        bus, written = self._context.bus, 0
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_s):
                while (written := await bus.acknowledged(event_consumer(bus.subjects))) < last:
                    await self._next_batch()
        except TimeoutError as exc:
            raise RequestTimeout(
                f"events up to {last} are not on disk after {timeout_s:g} s, only up to {written}",
                hint=self._problem or "ask again",
            ) from exc
        finally:
            self._hurry.clear()

    async def _next_batch(self) -> None:
        """Until another batch is on disk, or a moment later: its acknowledgement may still be under way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S), self._progress:
                await self._progress.wait()

    async def _rotate(self) -> None:
        assert self._series is not None  # noqa: S101
        while True:
            await asyncio.sleep(_TICK_S)
            now_ns = clock.now_ns()
            if self._series.due(now_ns):
                stopping = self._context.stopping.is_set
                rotate = functools.partial(LogSeries.rotate, now_ns=now_ns, is_stopping=stopping)
                with self._closing_told():
                    await self._alone(self._closing, rotate)

    @contextlib.contextmanager
    def _closing_told(self) -> Iterator[None]:
        """What stays plain is as safe as what is closed: a disk that fails is an alarm and no end."""
        try:
            yield
        except LeftOpen:
            logger.info("a period is left open: there was no time to close it")
        except _DISK_ERRORS as exc:
            logger.error("a period cannot be closed", extra={"problem": str(exc)})  # noqa: TRY400 - no bug
            self._closing_problem = str(exc)
        else:
            self._closing_problem = ""

    async def _open_series(self) -> LogSeries | None:
        """Mend and open the logs, as soon as the disk lets us; None if told to stop before that."""
        loop = asyncio.get_running_loop()
        opened = functools.partial(
            LogSeries,
            self._layout,
            rotation=self._settings.rotation,
            incarnation=self._context.bus.incarnation,
            now_ns=clock.now_ns,
            on_closed=lambda closed: loop.call_soon_threadsafe(self._upkeep.note_closed, closed),
        )
        while True:
            try:
                self._series = series = await whole(loop.run_in_executor(self._threads, opened))
            except _DISK_ERRORS as exc:
                self._alarm(str(exc))
                if await is_set_within(self._context.stopping, _TICK_S):
                    return None
            else:
                self._problem = ""
                return series

    async def _close(self, *, is_stopping: IsStopping) -> list[str]:
        """Close every open period; returns the files that it went to. Raises LeftOpen, TransientError, StorageFull."""
        closed = await self._alone(self._closing, lambda series: series.close_all(is_stopping=is_stopping))
        return [str(path.relative_to(self._layout.root)) for path in closed]

    async def _alone(self, lock: asyncio.Lock, work: Callable[[LogSeries], A]) -> A:
        """Do something with the series while nobody else does the same; who is cancelled ends when the thread has.

        The threads are the series' own, so that questions which keep all others busy hold up no line. Raises
        TransientError where there is no series, or none any more.
        """
        async with lock:
            if self._series is None:
                raise TransientError("this telemetry service does not write now", hint="ask again")
            return await whole(asyncio.get_running_loop().run_in_executor(self._threads, work, self._series))

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _query(self, request: QueryEvents) -> EventLines:
        return await query(self._layout, request)

    async def _flush(self, _: Nothing) -> Flushed:
        """Wait until what the stream holds now is on disk, then close the period."""
        if self._series is None:
            raise TransientError("this telemetry service does not write now", hint="ask again")
        await self._written_until(await self._last_sequence(), _FLUSH_S)
        try:
            return Flushed(files=tuple(await self._close(is_stopping=self._context.stopping.is_set)))
        except LeftOpen as exc:
            raise TransientError("this telemetry service stops, and leaves the period open", hint="ask again") from exc
        except OSError as exc:
            raise TransientError(f"the period cannot be closed: {exc}", hint="mend the disk, and ask again") from exc

    # --- one root for each store, and one writer for each root --------------------------------------------------------

    async def _claimed(self) -> LogClaim | None:
        """The claim of this root on the store's log; None if told to stop before that.

        Where another root had it, that is told. Raises BadSetting if that one is written now.
        """
        bus, common, stopping = self._context.bus, self._context.common, self._context.stopping
        self._problem = "looking on which root the log of this NATS is written"
        while True:
            try:
                here = LogRoot.here(self._layout.root, state=self._layout.state, host=common.host)
                break
            except _DISK_ERRORS as exc:
                self._alarm(str(exc))
                if await is_set_within(stopping, _TICK_S):
                    return None
        claim = LogClaim(Bucket(bus, bus.subjects.leader), here, ttl_s=common.lease_ttl_s)
        if before := await claim.take(stopping):
            self._context.telemetry.event(
                "logs.moved", severity="warning", path=here.path, before=before.path, host_before=before.host
            )
        return None if stopping.is_set() else claim

    @contextlib.asynccontextmanager
    async def _only_writer(self) -> AsyncIterator[None]:
        """Hold the writer's lock; stands by while another process has it."""
        path = self._layout.state / "telemetry.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            while not self._context.stopping.is_set():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await is_set_within(self._context.stopping, _TICK_S)
            yield


def _tune_interpreter() -> None:
    """For lines: megabytes that are made, written by another thread, and gone.

    The C library gives free memory beyond some 100 kB back to the system, and takes it anew page by page: a third of
    the time of making lines. The size of the largest block that it was given back is its measure from then on.
    """
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 20)
    sys.setswitchinterval(_SWITCH_S)
    bytes(_KEPT_BYTES)
