"""`railbus logs -f`: no event is missing and none comes twice where the files end and the stream goes on."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from commands import environment, railbus
from railbus_shared import clock, wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.consume import Delivery, consume_batches
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint, serving
from railbus_shared.contracts.jobs import JobRecord
from railbus_shared.contracts.logs import EventLines, QueryEvents
from railbus_shared.contracts.requests import JobList, JobRef, ListJobs
from railbus_shared.errors import JobNotFound
from railbus_shared.log_reader import query
from railbus_shared.metrics import Metrics
from railbus_shared.settings import CommonSettings
from railbus_shared.topology import event_consumer
from railbus_telemetry.lines import batch
from railbus_telemetry.series import LogSeries
from records_for_tests import record
from until import until

JOB = "j-1"


def event(number: int, *, kind: str = "job.output", job: str = JOB) -> dict[str, object]:
    return {"v": 1, "id": f"p-{number}", "type": kind, "time": clock.now(), "producer": "p", "number": number,
            "severity": "info", "source": "test", "host": "h", "job": job, "data": {}}  # fmt: skip


class Telemetry:
    """The writer, but for its pace: what is written, and what of that is acknowledged, up to which sequence."""

    def __init__(self, bus: Bus, common: CommonSettings) -> None:
        self.written_to = self.acknowledged_to = 10**9
        self.seen = 0
        self._bus = bus
        self._series = LogSeries(common.layout, rotation="daily", incarnation=bus.incarnation, now_ns=clock.now_ns)

    async def tell(self, *numbers: int, kind: str = "job.output", job: str = JOB) -> None:
        for number in numbers:
            subject = self._bus.subjects.event("job", job, kind.partition(".")[2])
            await self._bus.publish(
                Outgoing(subject, wire.encode(event(number, kind=kind, job=job)), msg_id=f"p-{number}")
            )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                consume_batches(self._bus, event_consumer(self._bus.subjects), self._write, stopping=stopping, batch=1)
            )
            yield
            stopping.set()

    async def _write(self, deliveries: list[Delivery]) -> bool:
        self.seen = last = deliveries[-1].sequence
        if last > self.written_to:
            return False
        messages = [(one.sequence, one.subject, one.data) for one in deliveries]
        self._series.append(batch(messages, incarnation=self._bus.incarnation, telemetry="t"))
        if last % 7 == 0:
            self._series.close_all()
        return last <= self.acknowledged_to


class Logs:
    """A `railbus logs` that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.numbers: list[int] = []

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.numbers.append(json.loads(line)["number"])

    async def reach(self, number: int) -> None:
        await until(lambda: bool(self.numbers) and self.numbers[-1] >= number)


@asynccontextmanager
async def logs(*words: str, common: CommonSettings, root: Path | None = None) -> AsyncIterator[Logs]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "railbus.cli.main", "logs", "--json", "--root", str(root or common.root), *words,
        env=environment({"RAILBUS_NATS_URL": common.nats_url}), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    running = Logs(process)
    reading = asyncio.ensure_future(running.read())
    try:
        yield running
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        await process.wait()
        await reading


@pytest.fixture
def telemetry(bus: Bus, common: CommonSettings) -> Telemetry:
    return Telemetry(bus, common)


@pytest.fixture
async def half_written(telemetry: Telemetry) -> Telemetry:
    """Events 1 to 8 are acknowledged, 9 to 12 are in the files as well, 13 to 20 in the stream only."""
    telemetry.acknowledged_to, telemetry.written_to = 8, 12
    await telemetry.tell(*range(1, 21))
    async with telemetry.running():
        await until(lambda: telemetry.seen == 20)
    return telemetry


@pytest.mark.parametrize(
    ("words", "first"),
    [([], 1), (["-n", "3"], 9), (["-n", "6"], 7), (["--since", "1h", "--type", "job.o"], 1), (["--grep", "OUTPUT"], 1)],
)
async def test_each_event_comes_once_whatever_was_acknowledged(
    words: list[str], first: int, half_written: Telemetry, common: CommonSettings
) -> None:
    async with logs("-f", *words, common=common) as running:
        await until(lambda: running.numbers[-1:] == [20])
        await half_written.tell(21, 22)
        await until(lambda: running.numbers[-1:] == [22])
    assert running.numbers == list(range(first, 23))
    assert running.process.returncode == 130


@asynccontextmanager
async def jobs_served(common: CommonSettings, state: str) -> AsyncIterator[None]:
    async def get(request: JobRef) -> JobRecord:
        return record(state, id=request.id, exit_code=0)  # type: ignore[arg-type]

    async def events(request: QueryEvents) -> EventLines:
        return await query(common.layout, request)

    async with Bus.open(common, name="service", service=True) as bus:
        endpoints: list[AnyEndpoint] = [
            Endpoint("get", bus.subjects.request("jobs", "get"), JobRef, get),
            Endpoint("query", bus.subjects.request("telemetry", "query"), QueryEvents, events),
        ]
        async with serving(bus, "test_jobs", "For tests.", endpoints, metrics=Metrics("t"), rejected=lambda *_: None):
            await bus.client.flush()
            yield


@pytest.mark.parametrize("words", [["job"], ["why"], ["cancel"], ["logs", "-f"]])
async def test_of_a_job_that_was_rejected_the_reason_is_told(
    words: list[str], telemetry: Telemetry, common: CommonSettings
) -> None:
    """What came as a message had no answer; the submitter knows its id from the receipt."""
    error = {"code": "DATASET_NOT_FOUND", "message": "dataset has value 'x': nowhere", "hint": "import it"}
    line = wire.encode({**event(1, kind="job.rejected", job="j-9"), "data": {"error": error}})
    telemetry._series.append(batch([(1, "railbus.evt.job.j-9.rejected", line)], incarnation="4f", telemetry="t"))

    async def get(request: JobRef) -> JobRecord:
        raise JobNotFound(f"job has value {request.id!r}: there is no such job")

    async def listed(_: ListJobs) -> JobList:
        return JobList(jobs=(), total=0)

    async def events(request: QueryEvents) -> EventLines:
        return await query(common.layout, request)

    async with Bus.open(common, name="service", service=True) as bus:
        endpoints: list[AnyEndpoint] = [
            Endpoint("get", bus.subjects.request("jobs", "get"), JobRef, get),
            Endpoint("list", bus.subjects.request("jobs", "list"), ListJobs, listed),
            Endpoint("query", bus.subjects.request("telemetry", "query"), QueryEvents, events),
        ]
        async with serving(bus, "test_jobs", "For tests.", endpoints, metrics=Metrics("t"), rejected=lambda *_: None):
            await bus.client.flush()
            env = {"RAILBUS_NATS_URL": common.nats_url}
            done = await asyncio.to_thread(railbus, *words, "j-9", cwd=common.root.parent, env=env)
    assert done.status == (125 if words[0] == "logs" else 3)
    assert done.err.splitlines() == [
        "error[JOB_NOT_FOUND]: job 'j-9' was rejected when it was submitted: "
        "DATASET_NOT_FOUND: dataset has value 'x': nowhere",
        "hint: import it",
    ]


@pytest.mark.parametrize("has_files", [True, False])
async def test_a_job_is_told_once_and_to_its_end(
    half_written: Telemetry, common: CommonSettings, tmp_path: Path, *, has_files: bool
) -> None:
    await half_written.tell(21, job="j-2")
    await half_written.tell(22, kind="job.succeeded")
    async with (
        jobs_served(common, "succeeded"),
        logs("-f", JOB, common=common, root=None if has_files else tmp_path / "elsewhere") as running,
    ):
        assert await running.process.wait() == 0
    assert running.numbers == [*range(1, 21), 22]


async def test_a_job_whose_end_is_in_the_files_is_not_waited_for(telemetry: Telemetry, common: CommonSettings) -> None:
    await telemetry.tell(1, 2)
    await telemetry.tell(3, kind="job.succeeded")
    async with telemetry.running():
        await until(lambda: telemetry.seen == 3)
        async with jobs_served(common, "succeeded"), logs("-f", JOB, "--type", "job.o", common=common) as running:
            assert await running.process.wait() == 0
    assert running.numbers == [1, 2]


async def test_what_telemetry_has_is_asked_for_page_by_page(
    telemetry: Telemetry, common: CommonSettings, tmp_path: Path
) -> None:
    events = [{**event(number), "data": {"pad": "x" * 200}} for number in range(1, 2501)]
    for first in range(0, len(events), 500):
        message = wire.encode({"v": 1, "common": {}, "events": events[first : first + 500]})
        telemetry._series.append(batch([(1, "s", message)], incarnation="4f", telemetry="t"))
        telemetry._series.close_all()
    async with jobs_served(common, "succeeded"):
        async with logs("--since", "1h", common=common, root=tmp_path / "elsewhere") as running:
            assert await running.process.wait() == 0
        assert running.numbers == list(range(1, 2501))
        async with logs("-n", "1700", "--grep", "p-", common=common, root=tmp_path / "elsewhere") as running:
            assert await running.process.wait() == 0
        assert running.numbers == list(range(801, 2501))


@pytest.mark.timeout(150)  # 2,500 events, each flushed by the server, and a command that follows them
async def test_each_event_comes_once_while_all_is_being_written(telemetry: Telemetry, common: CommonSettings) -> None:
    told = 0

    async def go_on(stopping: asyncio.Event) -> None:
        nonlocal told
        while not stopping.is_set():
            told += 1
            await telemetry.tell(told)

    stopping = asyncio.Event()
    async with telemetry.running(), asyncio.TaskGroup() as tasks:
        tasks.create_task(go_on(stopping))
        for _ in range(2):
            await until(lambda: told > 50)
            async with logs("-f", "--since", "1h", common=common) as running:
                await running.reach(20)
                await running.reach(told + 50)
            assert running.numbers == list(range(1, len(running.numbers) + 1))
        stopping.set()
