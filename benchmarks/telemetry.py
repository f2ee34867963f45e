"""What telemetry holds: events to disk, their lag, its memory under a backlog, compression, and a call of `ctx.log`.

    python -m benchmarks telemetry [BACKLOG] [PART...]

Parts: throughput, loggers, lag, backlog, compression, call; all of them unless some are named. BACKLOG is how many
events wait while telemetry is stopped: 500,000, or 5000000 for the whole.

On a real `railbus up`, whose JetStream syncs every message. `throughput`: metrics from a producer in a process of its
own until the telemetry service has acknowledged the last, which it does after fdatasync; in turns with what a bare
nats-py subscriber on uvloop gets of the same messages from another process, through a bare nats-server, with nothing
stored. Afterwards the files are read: every number once. `loggers`: the sinks of others, which sync nothing and have no
bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.event_load import as_runner
from benchmarks.log_peers import PEERS_OF_LOGS, NotInstalled, free_port
from benchmarks.results import Cell, command, quantile, show, tell
from benchmarks.running import Running, running_up
from benchmarks.starting import REPO
from railbus.client import Client
from railbus.embedded.nats_server import find_server
from railbus.importing import import_dataset
from railbus_shared import clock, log_reader
from railbus_shared.bus.connection import Bus
from railbus_shared.layout import LOG_NAME, Layout
from railbus_shared.topology import event_consumer
from railbus_telemetry import closing

PARTS: Final = ("throughput", "loggers", "lag", "backlog", "compression", "call")
_ROUNDS: Final = 3
_EVENTS: Final = 300_000
_BARE_EVENTS: Final = 150_000  # whole ones take 43 MB; a server as it comes cuts off who is 64 MiB behind
_BARE: Final = ((100, "whole"), (100, "shared"), (100, "ours"), (1000, "whole"), (1000, "ours"))
"""Events a message, and in which form."""
_WAYS: Final[tuple[tuple[Any, ...], ...]] = (
    ("100", "publish", 100, _EVENTS // 100, "ours"),
    ("1000", "publish", 1000, _EVENTS // 1000, "ours"),
    ("1000-shared", "publish", 1000, _EVENTS // 1000, "shared"),
    ("telemetry", "record", _EVENTS),
)
"""Name, kind of load, and what it is told beside root and producer."""
_LOGGED: Final = 100_000
_BACKLOG: Final = 500_000
_RATE: Final = 1000
_PACED_S: Final = 20
_PATIENCE_S: Final = 900.0
_POLL_S: Final = 0.002


class Load:
    """A process of `benchmarks.event_load`, prepared and waiting for the word."""

    def __init__(self, kind: str, *arguments: object) -> None:
        words = [sys.executable, "-m", "benchmarks.event_load", kind, *map(str, arguments)]
        self.cpu_s = 0.0
        """From the word on, once it has ended."""
        self._process = subprocess.Popen(words, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", f"{kind} did not start"

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, float]:
        told, _ = self._process.communicate(timeout=_PATIENCE_S)
        assert self._process.returncode == 0, f"{self._process.args} ended with {self._process.returncode}"
        found: dict[str, float] = json.loads(told)
        self.cpu_s = found.pop("cpu_s")
        return found


# --- throughput ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bare_server() -> Iterator[str]:
    """A nats-server as it comes; its URL."""
    port = free_port()
    process = subprocess.Popen([find_server(), "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def bare(url: str, *, size: int, form: str) -> float:
    """Events a second that reach a bare subscriber."""
    receiving = Load("bare-receive", url, size, _BARE_EVENTS // size)
    sending = Load("bare-publish", url, size, _BARE_EVENTS // size, form)
    receiving.start()
    sending.start()
    found = receiving.result()
    sending.result()
    return found["events"] / found["seconds"]


async def to_disk(bus: Bus, load: Load) -> float:
    """Seconds from the first publish until telemetry has acknowledged the last message."""
    load.start()
    found = await asyncio.to_thread(load.result)
    assert not found.get("dropped"), f"{found['dropped']} events were dropped"
    await caught_up(bus)
    return (time.time_ns() - found["began_ns"]) / 1e9


async def caught_up(bus: Bus) -> None:
    """Until telemetry has acknowledged all that is in the stream."""
    last = await bus.last_sequence(bus.subjects.events_stream)
    async with asyncio.timeout(_PATIENCE_S):
        while await bus.acknowledged(event_consumer(bus.subjects)) < last:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.005)


async def throughput(up: Running, bus: Bus) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Events a second by each way, once a round; and the CPU time of an event in each process on the way to disk."""
    found: dict[str, list[float]] = {}
    spent: dict[str, dict[str, float]] = {}
    with bare_server() as url:
        for turn in range(_ROUNDS):
            for size, form in _BARE:
                found.setdefault(f"bare subscriber, {size} {form}", []).append(bare(url, size=size, form=form))
            for name, kind, *arguments in _WAYS:
                load = Load(kind, up.root, *arguments[:2], f"bench-{name}-{turn}", *arguments[2:])
                before = up.cpu_by_service()
                found.setdefault(f"to disk, {name}", []).append(_EVENTS / await to_disk(bus, load))
                after = up.cpu_by_service()
                used = {who: 1e6 * (after[who] - before[who]) / _EVENTS for who in ("nats-server", "telemetry")}
                spent[f"to disk, {name}"] = {"producer": 1e6 * load.cpu_s / _EVENTS, **used}
    check_numbers(up, {f"bench-{way[0]}-{turn}": _EVENTS for way in _WAYS for turn in range(_ROUNDS)})
    return found, spent


def check_numbers(up: Running, expected: dict[str, int]) -> None:
    """That the files hold every number of each producer, and each once."""
    seen = {producer: bytearray(count) for producer, count in expected.items()}
    layout = Layout(up.root)
    for day in layout.log_days():
        for line in log_reader.day_lines(layout.day(day)):
            event = orjson.loads(line)
            if event["producer"] in seen:
                seen[event["producer"]][event["number"] - 1] += 1
    for producer, counts in seen.items():
        assert counts == b"\x01" * len(counts), f"{producer}: {counts.count(0)} missing of {len(counts)}, or doubles"


def report_throughput(found: dict[str, list[float]], spent: dict[str, dict[str, float]]) -> None:
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    whole, shared = (medians[f"bare subscriber, 100 {form}"] for form in ("whole", "shared"))
    rows: list[list[Cell]] = [
        [name, round(rate), round(min(found[name])), round(max(found[name])), rate / whole, rate / shared]
        for name, rate in medians.items()
    ]
    title = f"$ {command('telemetry')}   {_EVENTS} events, events/s, {_ROUNDS} rounds"
    show(title, header=["", "median", "min", "max", "of 100 whole", "of 100 shared"], rows=rows)
    used: list[list[Cell]] = [[name, *times.values()] for name, times in spent.items()]
    show("CPU us an event, last round", header=["", *next(iter(spent.values()))], rows=used)
    numbers = {"events_per_s": {k: round(v) for k, v in medians.items()}, "cpu_us": spent}
    ratios = {name: [round(rate / whole, 3), round(rate / shared, 3)] for name, rate in medians.items()}
    tell("telemetry", part="throughput", of_bare_whole_and_shared=ratios, **numbers)


def loggers(ours: float | None) -> None:
    """The sinks of others, and how many times as fast we were in this run."""
    rows: list[list[Cell]] = []
    rates: dict[str, float] = {}
    for name, measure in PEERS_OF_LOGS.items():
        try:
            rates[name] = statistics.median(measure(_LOGGED) for _ in range(_ROUNDS))
        except NotInstalled as exc:
            print(f"{name}: not measured, {exc}")
            continue
        rows.append([name, round(rates[name]), ours / rates[name] if ours else ""])
    show(f"sinks of others, {_LOGGED} events", header=["", "events/s", "ours, times"], rows=rows)
    tell("telemetry", part="loggers", events_per_s={name: round(rate) for name, rate in rates.items()})


# --- lag, memory, compression, a call --------------------------------------------------------------------------------


async def lag(up: Running) -> None:
    """From an event's time to the moment when its line can be read in the file."""
    load = Load("paced", up.root, _RATE, _PACED_S, "bench-paced")
    plain = Layout(up.root).day(datetime.now(UTC).date()) / LOG_NAME
    begin = plain.stat().st_size if plain.exists() else 0
    load.start()
    lags = await asyncio.to_thread(watched, plain, "bench-paced", _RATE * _PACED_S, begin=begin)
    load.result()
    counted = lags[2 * _RATE :]
    found = {f"p{round(100 * frac)}": quantile(counted, frac) for frac in (0.5, 0.99)} | {"max": max(counted)}
    row: list[Cell] = ["lag, s", *found.values()]
    show(f"{_RATE} events/s for {_PACED_S} s, one at a time", header=["", *found], rows=[row])
    tell("telemetry", part="lag", lag_s={name: round(value, 4) for name, value in found.items()})


def watched(plain: Path, producer: str, total: int, *, begin: int) -> list[float]:
    """Seconds of each event of a producer, from the file that grows; what stood before `begin` is not read.

    To read a gigabyte first takes seconds, which would be told as a lag.
    """
    wanted, lags, rest = f'"producer":"{producer}"'.encode(), list[float](), b""
    deadline = time.monotonic() + _PATIENCE_S
    while not plain.exists():
        assert time.monotonic() < deadline, "no log is written"
        time.sleep(_POLL_S)
    with plain.open("rb") as file:
        file.seek(begin)
        while len(lags) < total:
            assert time.monotonic() < deadline, f"{len(lags)} of {total} events came"
            chunk = file.read()
            seen_ns = time.time_ns()
            if not chunk:
                time.sleep(_POLL_S)
                continue
            *lines, rest = (rest + chunk).split(b"\n")
            lags += [(seen_ns - clock.parse_rfc3339(orjson.loads(x)["time"])) / 1e9 for x in lines if wanted in x]
    return lags


async def backlog(up: Running, bus: Bus, count: int) -> None:
    """Peak memory of telemetry, and how fast it works off what has come while it was stopped."""
    await caught_up(bus)
    pid = up.pid_of("telemetry")
    os.kill(pid, signal.SIGSTOP)
    try:
        load = Load("publish", up.root, 1000, count // 1000, "bench-backlog", "ours")
        load.start()
        await asyncio.to_thread(load.result)
    finally:
        os.kill(pid, signal.SIGCONT)
    began, spent_s = time.perf_counter(), up.cpu_by_service()["telemetry"]
    await caught_up(bus)
    seconds = time.perf_counter() - began
    assert up.pid_of("telemetry") == pid, "telemetry was started anew"
    cpu_us = 1e6 * (up.cpu_by_service()["telemetry"] - spent_s) / count
    peak = peak_mib(pid)
    check_numbers(up, {"bench-backlog": count})
    row: list[Cell] = [count, round(count / seconds), cpu_us, peak]
    show("a backlog, 1000 events a message", header=["events", "events/s", "CPU us/event", "peak MiB"], rows=[row])
    numbers = {"events_per_s": round(count / seconds), "cpu_us": round(cpu_us, 2), "peak_mib": round(peak)}
    tell("telemetry", part="backlog", events=count, **numbers)


def peak_mib(pid: int) -> float:
    """The most memory that a process has held so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def compression(up: Running) -> None:
    """The writer's compressor against gzip level 6, on the lines that this run has written."""
    layout = Layout(up.root)
    lines = b"".join(line + b"\n" for day in layout.log_days() for line in log_reader.day_lines(layout.day(day)))
    lines = lines[: 64 << 20]
    timed: dict[str, tuple[int, float]] = {}
    for name, make in {"gzip level 6": lambda: zlib.compressobj(6, wbits=31), "ours": closing.compressor}.items():
        spent = []
        for _ in range(_ROUNDS):
            compressor, began = make(), time.process_time()
            packed = compressor.compress(lines) + compressor.flush()
            spent.append(time.process_time() - began)
        assert gzip.decompress(packed) == lines
        timed[name] = len(packed), statistics.median(spent)
    (size, slow_s), (our_size, fast_s) = timed.values()
    rows: list[list[Cell]] = [[name, len(lines) / n, len(lines) / s / 1e6] for name, (n, s) in timed.items()]
    rows.append(["ours / gzip: size, speed", our_size / size, slow_s / fast_s])
    show(f"{len(lines) >> 20} MiB of log, CPU time", header=["", "ratio", "MB/s"], rows=rows)
    tell("telemetry", part="compression", size=round(our_size / size, 3), speed=round(slow_s / fast_s, 2))


async def call(up: Running) -> None:
    """Microseconds of `ctx.log` in a trainer."""
    async with Client.connect(up.settings) as client, asyncio.timeout(_PATIENCE_S):
        job = {"model": "nothing", "dataset": "digits", "entrypoint": "log_cost:measure", "devices": {"kind": "cpu"}}
        told = asyncio.create_task(first_of(client, "app.log_cost_measured"))
        await asyncio.sleep(0.5)  # its subscription
        await client.submit(job)
        data = await told
    found = {name: float(data[name]) for name in ("mean", "p50", "p99", "max")}
    show("ctx.log(loss=..., lr=...) at the call", header=["", *found], rows=[["microseconds", *found.values()]])
    tell("telemetry", part="call", microseconds={name: round(value, 2) for name, value in found.items()})


async def first_of(client: Client, kind: str) -> dict[str, str]:
    """The data of the next event of a type."""
    async for event in client.follow_all():
        data = event.get("data")
        if event.get("type") == kind and isinstance(data, dict):
            return {str(name): str(value) for name, value in data.items()}
    raise AssertionError(f"no event of type {kind} came")


async def measured(up: Running, parts: list[str], count: int) -> None:
    ours: float | None = None
    async with as_runner(up.settings) as bus:
        await caught_up(bus)
        if "throughput" in parts:
            found, spent = await throughput(up, bus)
            report_throughput(found, spent)
            ours = statistics.median(found["to disk, 1000"])
        if "loggers" in parts:
            loggers(ours)
        if "lag" in parts:
            await lag(up)
        if "backlog" in parts:
            await backlog(up, bus, count)
        if "compression" in parts:
            compression(up)
        if "call" in parts:
            await call(up)


def main() -> None:
    count = next((int(word) for word in sys.argv[1:] if word.isdigit()), _BACKLOG)
    parts = [word for word in sys.argv[1:] if not word.isdigit()] or list(PARTS)
    unknown = set(parts) - set(PARTS)
    assert not unknown, f"no part is called {sorted(unknown)}; there are {PARTS}"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        with running_up(root) as up:
            asyncio.run(measured(up, parts, count))


if __name__ == "__main__":
    main()
