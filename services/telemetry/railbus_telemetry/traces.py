"""Sends the trace of each job that has ended to an OpenTelemetry collector (`RAILBUS_TELEMETRY_OTLP_ENDPOINT`).

It reads along what the log has taken already, and holds nothing up: it keeps the facts of jobs that are under way,
within a bound, and makes spans of them when the job has ended. Of a job that began before this process did, it reads
the facts in the log. Traces wait in a queue for the collector; one that is full, or a collector that refuses, costs
traces, which are counted, and which `railbus export trace` can still make of the log.
Source: https://opentelemetry.io/docs/specs/otlp/#otlphttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Mapping
from http import HTTPStatus
from typing import Final

import aiohttp
import orjson

from railbus_shared import clock
from railbus_shared.bus.consume import Delivery
from railbus_shared.bus.follow import events_in
from railbus_shared.layout import Layout
from railbus_shared.log_reader import read_events
from railbus_shared.metrics import Metrics
from railbus_shared.otlp import traces
from railbus_shared.spans import AREAS, ENDS, Span, is_wanted, spans_of
from railbus_shared.waiting import end, is_set_within

logger = logging.getLogger(__name__)

_PATH: Final = "/v1/traces"
_EARLIER_NS: Final = 7 * 86_400 * clock.NS_PER_S
_MAX_HELD_BYTES: Final = 32 << 20  # of messages of jobs under way
_MAX_WAITING: Final = 1000
_MAX_ENDED: Final = 2 * _MAX_WAITING  # jobs whose end is remembered
_TOGETHER: Final = 50
_LINGER_S: Final = 1.0  # after a job's end, for what others have to tell of it
_FINISH_S: Final = 2.0  # at a stop, for what waits then
_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)
_TRIES: Final = 5
_FIRST_WAIT_S: Final = 0.5
_AGAIN: Final = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""What the protocol says may be sent again."""

Event = Mapping[str, object]
_Facts = list[tuple[int, Event]]
"""Each with the bytes of its message."""


class JobsUnderWay:
    """Facts of jobs until they are taken, within a bound, at which the oldest that have not ended are given up."""

    def __init__(self, *, max_bytes: int = _MAX_HELD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, _Facts] = OrderedDict()
        self._ended: OrderedDict[str, _Facts | None] = OrderedDict()
        """None once they are taken: what is told of such a job later begins no new one."""
        self._size = 0
        self.given_up = 0

    def heed(self, event: Event, *, size: int) -> bool:
        """Keep an event; whether its job has ended with it. What is told afterwards joins it while there is room."""
        job, kind = event.get("job"), str(event.get("type"))
        if not isinstance(job, str) or not is_wanted(kind) or kind == "job.rejected":
            return False
        if job in self._ended:
            waiting = self._ended[job]
            if waiting is not None and self._size + size <= self._max_bytes:
                self._keep(waiting, event, size)
            return False
        self._keep(self._held.setdefault(job, []), event, size)
        if kind in ENDS:
            self._ended[job] = self._held.pop(job)
            if len(self._ended) > _MAX_ENDED:
                self._free(self._ended.popitem(last=False)[1] or [])
            return True
        while self._size > self._max_bytes and self._held:
            self._free(self._held.popitem(last=False)[1])
            self.given_up += 1
        return False

    def take(self, job: str) -> list[Event]:
        """All of a job that has ended, which is held no longer."""
        facts, self._ended[job] = self._ended.get(job) or [], None
        self._free(facts)
        return [event for _, event in facts]

    def _keep(self, facts: _Facts, event: Event, size: int) -> None:
        facts.append((size, event))
        self._size += size

    def _free(self, facts: _Facts) -> None:
        self._size -= sum(size for size, _ in facts)


class TraceExporter:
    """One collector, and what waits for it."""

    def __init__(
        self, endpoint: str, *, headers: Mapping[str, str], metrics: Metrics, incarnation: str, layout: Layout
    ) -> None:
        self._is_on = bool(endpoint)
        self._url = endpoint.rstrip("/") + ("" if endpoint.rstrip("/").endswith(_PATH) else _PATH)
        self._headers = {"content-type": "application/json", **headers}
        self._incarnation = incarnation
        self._layout = layout
        self._jobs = JobsUnderWay()
        self._waiting: deque[str] = deque()
        self._news = asyncio.Event()
        self._ending = asyncio.Event()
        self._sent = metrics.counter("traces_exported", "Traces of jobs that the collector has taken.")
        self._lost = metrics.counter("traces_dropped", "Traces of jobs that no collector got, by reason.", "reason")

    def heed(self, deliveries: Iterable[Delivery]) -> None:
        """Read along, if there is a collector; never waits and never fails for what a message says."""
        for delivery in deliveries if self._is_on else ():
            area, _, what = delivery.subject.partition(".evt.")[2].partition(".")
            if not is_wanted(f"{area}.{what.rpartition('.')[2]}"):
                continue
            for event in events_in(delivery.data, subject=delivery.subject):
                told = {**event, "incarnation": self._incarnation}
                if self._jobs.heed(told, size=len(delivery.data)):
                    self._put(str(told["job"]))
            self._count_given_up()

    @contextlib.asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Send within the body, if there is a collector; and after it what waits then, if that is quickly done."""
        if not self._is_on:
            yield
            return
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(self._run())
            try:
                yield
                self._ending.set()
                self._news.set()
                await asyncio.wait([sending], timeout=_FINISH_S)
            finally:
                await end(sending)
                self._count_left()

    async def _run(self) -> None:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            while await self._has_some():
                await is_set_within(self._ending, _LINGER_S)
                jobs = list(itertools.islice(self._waiting, _TOGETHER))
                spans = [span for job in jobs for span in await self._spans_of(self._jobs.take(job))]
                if spans:
                    await self._send(session, orjson.dumps(traces(spans)), count=len(jobs))
                for _ in jobs:
                    self._waiting.popleft()

    async def _has_some(self) -> bool:
        """Wait until a trace waits; False once it is to end and none does."""
        while not self._waiting and not self._ending.is_set():
            self._news.clear()
            await self._news.wait()
        return bool(self._waiting)

    def _count_left(self) -> None:
        if self._waiting:
            logger.warning("traces lost: there was no time to send them", extra={"traces": len(self._waiting)})
            self._lost.labels("stopped").inc(len(self._waiting))

    async def _spans_of(self, events: list[Event]) -> list[Span]:
        try:
            if events and not any(event["type"] == "job.queued" for event in events):
                events = [*events, *await asyncio.to_thread(self._earlier, events[0])]
            return spans_of(events)
        except OSError as exc:
            logger.warning("a trace cannot be read from the log", extra={"problem": str(exc)})
            self._lost.labels("unreadable").inc()
        except (ArithmeticError, KeyError, TypeError, ValueError):  # an event that is none, which the log has refused
            logger.warning("a trace cannot be made", exc_info=True)
            self._lost.labels("malformed").inc()
        return []

    def _earlier(self, event: Event) -> list[Event]:
        since_ns = clock.parse_rfc3339(str(event["time"])) - _EARLIER_NS
        found = read_events(self._layout, job=str(event["job"]), types=AREAS, since_ns=since_ns)
        return [one for one in found if is_wanted(str(one["type"]))]

    def _put(self, job: str) -> None:
        if len(self._waiting) < _MAX_WAITING:
            self._waiting.append(job)
            self._news.set()
        else:
            self._jobs.take(job)
            self._lost.labels("queue_full").inc()

    def _count_given_up(self) -> None:
        if self._jobs.given_up:
            self._lost.labels("held").inc(self._jobs.given_up)
            self._jobs.given_up = 0

    async def _send(self, session: aiohttp.ClientSession, body: bytes, *, count: int) -> None:
        wait_s, problem = _FIRST_WAIT_S, None
        for turn in range(_TRIES):
            problem = await self._refusal(session, body)
            if problem == "":
                self._sent.inc(count)
                return
            if problem is None or turn == _TRIES - 1:
                break
            logger.info("collector does not take traces now", extra={"url": self._url, "problem": problem})
            await asyncio.sleep(wait_s)
            wait_s *= 2
        self._lost.labels("refused" if problem is None else "unreachable").inc(count)
        logger.warning("traces lost", extra={"url": self._url, "traces": count})

    async def _refusal(self, session: aiohttp.ClientSession, body: bytes) -> str | None:
        """Why the collector has not taken it, if it may be asked again; None if it never will; empty if it has."""
        try:
            async with session.post(self._url, data=body, headers=self._headers) as response:
                if response.ok:
                    return ""
                return f"HTTP {response.status}" if response.status in _AGAIN else None
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            return str(exc) or type(exc).__name__
