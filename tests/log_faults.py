"""What must be true of the logs whatever happens, told by readers who believe only `zcat`.

The oracle: whatever happens, once telemetry runs again and has caught up, `zcat -f` over the logs gives every
acknowledged event once and no event twice, and every line is JSON. `Readers` hold more against it while it happens.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nats.errors
import orjson
import pytest
from nats.aio.client import Client as NatsClient
from nats.js import JetStreamContext

import dying_telemetry
from log_processes import Key, Producer, Telemetry
from railbus_shared.bus.connection import Bus
from railbus_shared.layout import BEGUN_LOG_NAME, Layout
from railbus_shared.settings import CommonSettings
from servers import Server
from until import PATIENCE_S, until

STREAM, CONSUMER = "RAILBUS_EVENTS", "telemetry-writer"


# --- the oracle ------------------------------------------------------------------------------------------------------


@dataclass
class Read:
    """What a reader found."""

    counts: collections.Counter[Key] = field(default_factory=collections.Counter)
    broken: list[bytes] = field(default_factory=list)
    """Lines that are no events, without the last one of a plain file, where that has no end yet."""

    def add(self, data: bytes, *, is_growing: bool) -> None:
        *whole, rest = data.split(b"\n")
        for line in whole if is_growing else (*whole, *([rest] if rest else [])):
            try:
                event = orjson.loads(line)
                self.counts[event["producer"], event["number"]] += 1
            except (ValueError, KeyError, TypeError):
                self.broken.append(line)


def read(layout: Layout) -> Read:
    """All lines by `zcat -f`; each day's files in the order in which a line goes through them, so that none escapes."""
    while (found := _read(layout)) is None:
        pass
    return found


def _read(layout: Layout) -> Read | None:
    """None where a file went in between."""
    found = Read()
    paths = layout.logs.glob("[0-9]*/*/*/trainer.log.jsonl*")
    for path in sorted(paths, key=lambda path: (path.parent, path.name != BEGUN_LOG_NAME, path.name)):
        done = subprocess.run(["/bin/zcat", "-f", path], capture_output=True, check=False)
        if done.returncode and b"No such file" in done.stderr:
            return None
        if done.returncode:
            found.broken.append(done.stderr)
        found.add(done.stdout, is_growing=path.suffix != ".gz")
    return found


def faults(layout: Layout, acknowledged: set[Key]) -> dict[str, object]:
    """What is wrong with the logs of a telemetry that has caught up; nothing, if nothing is."""
    found = read(layout)
    missing = sorted(acknowledged - set(found.counts))
    twice = sorted(key for key, count in found.counts.items() if count > 1)
    claims: dict[str, Sequence[object]] = {
        "missing": missing,
        "twice": twice,
        "broken": [line[:200] for line in found.broken],
    }
    return {what: (len(some), some[:5]) for what, some in claims.items() if some}


# --- the stream ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far telemetry is with the stream."""

    last: int
    floor: int
    pending: int

    @property
    def is_done(self) -> bool:
        return self.pending == 0 and self.floor >= self.last


@contextlib.asynccontextmanager
async def watching(server: Server) -> AsyncIterator[Watch]:
    async with Bus.open(CommonSettings(nats_url=server.url, host="testhost"), name="watch") as bus:
        yield Watch(bus.client, bus.client.jetstream())


@dataclass(frozen=True)
class Watch:
    """Asks the server how far telemetry is."""

    client: NatsClient
    stream: JetStreamContext

    async def progress(self) -> Progress | None:
        """None while the server does not answer."""
        try:
            state = (await self.stream.stream_info(STREAM)).state
            info = await self.stream.consumer_info(STREAM, CONSUMER)
        except (nats.errors.Error, TimeoutError, OSError):
            return None
        floor = info.ack_floor.stream_seq if info.ack_floor else 0
        return Progress(int(state.last_seq), int(floor or 0), int(info.num_pending or 0))

    async def caught_up(self, *, seconds: float = PATIENCE_S) -> None:
        async def is_done() -> bool:
            found = await self.progress()
            return found is not None and found.is_done

        await until(is_done, seconds=seconds)


class Readers:
    """Looks at the files the whole time, with `zcat`, for what must never be.

    What telemetry had acknowledged to the stream when a look began is in the files, and every closed file is whole.
    """

    def __init__(self, layout: Layout, watch: Watch, producers: list[Producer], *, pause_s: float) -> None:
        self._layout = layout
        self._watch = watch
        self._producers = producers
        self._pause_s = pause_s
        self._snapshots: list[tuple[int, list[int]]] = []
        """Where the stream ended, and before that, how much each producer had noted."""
        self._written: set[Key] = set()
        self.looks = 0
        self.faults: list[str] = []

    async def run(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(self._pause_s)

    async def _look(self) -> None:
        noted = [producer.noted_bytes() for producer in self._producers]
        progress = await self._watch.progress()
        if progress is not None:
            self._snapshots.append((progress.last, noted))
            self._note_written(progress.floor)
        found = await asyncio.to_thread(read, self._layout)
        self.looks += 1
        missing = sorted(self._written - set(found.counts))
        if missing:
            self.faults.append(f"look {self.looks}: {len(missing)} lines missing, for instance {missing[:3]}")
        if found.broken:
            self.faults.append(f"look {self.looks}: {len(found.broken)} broken lines, {found.broken[0][:200]!r}")

    def _note_written(self, floor: int) -> None:
        """What was noted when the stream ended there is in the files, once telemetry has acknowledged as far."""
        done = [noted for last, noted in self._snapshots if last <= floor]
        del self._snapshots[: len(done)]
        for producer, size_bytes in zip(self._producers, done[-1] if done else (), strict=False):
            self._written |= producer.acknowledged(size_bytes)


# --- all together ----------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """A server, telemetry, and producers that load it."""

    folder: Path
    server: Server
    watch: Watch
    telemetry: Telemetry
    producers: list[Producer]
    seed: int = 0
    """Of whatever is chosen by chance."""
    peak_bytes: int = 0
    """The most memory that telemetry has held; known once it has settled."""

    @property
    def layout(self) -> Layout:
        return Layout(self.folder / "learning")

    def acknowledged(self) -> set[Key]:
        return set().union(*(producer.acknowledged() for producer in self.producers))

    def harm_sidecar(self, chance: random.Random) -> None:
        """While telemetry is down, do something to what it remembers, or nothing."""
        sidecar = self.layout.logs / ".seen.json"
        if not sidecar.exists():
            return
        data = sidecar.read_bytes()
        match chance.choice(["nothing", "remove", "cut", "flip"]):
            case "remove":
                sidecar.unlink()
            case "cut":
                sidecar.write_bytes(data[: len(data) // 2])
            case "flip":
                at = chance.randrange(len(data))
                sidecar.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])

    async def flush(self) -> None:
        """Have the period closed; whoever dies of it gives no answer."""
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self.watch.client.request("railbus.req.telemetry.flush", b"{}", timeout=1)

    async def ready(self, *, seconds: float = PATIENCE_S) -> None:
        """Telemetry does its work; if it does not, says what it says of itself, and what its threads do."""
        try:
            await until(self.telemetry.is_ready, seconds=seconds)
        except TimeoutError:
            said = self.telemetry.get("/readyz?verbose")
            self.telemetry.signal(signal.SIGUSR1)
            await asyncio.sleep(1)
            pytest.fail(f"seed {self.seed}: not ready but {said!r}:\n{self.telemetry.output()[-6000:]}")

    async def settled(self, *, seconds: float = PATIENCE_S) -> None:
        """Producers have sent what they hold, telemetry has written it: then all must be as it should."""
        for producer in self.producers:
            await until(producer.is_sending)
            assert await asyncio.to_thread(producer.stop, timeout_s=seconds) == 0, producer.output()[-2000:]
        await self.watch.caught_up(seconds=seconds)
        self.judge("once telemetry has caught up")
        self.peak_bytes = self.telemetry.peak_bytes()
        assert await asyncio.to_thread(self.telemetry.stop) == 0, self.telemetry.output()[-2000:]
        self.judge("after a clean stop")
        plain = [path for path in self.layout.logs.rglob("trainer.log.jsonl*") if path.suffix != ".gz"]
        assert not plain, "a clean stop closes every period"

    def judge(self, when: str) -> None:
        found = faults(self.layout, self.acknowledged())
        assert not found, f"{when}, seed {self.seed}: {found}\n{self.telemetry.output()[-4000:]}"


async def die_at(found: Cluster, instant: str, *, close: Callable[[], Awaitable[None]] | None = None) -> None:
    """Telemetry runs until it comes to the instant; periods are closed meanwhile, if that is where it is to die.

    `close` has one closed; by default a flush is asked for.
    """
    found.telemetry.kill()
    found.telemetry.start(**{dying_telemetry.DIES_AT: instant})
    closes = instant.partition(":")[0] in dying_telemetry.CLOSING

    async def has_died() -> bool:
        if closes and found.telemetry.is_alive:
            await (close or found.flush)()
        return not found.telemetry.is_alive

    try:
        await until(has_died)
    except TimeoutError:
        pytest.fail(f"telemetry never came to {instant}:\n{found.telemetry.output()[-2000:]}")


@contextlib.asynccontextmanager
async def cluster(
    folder: Path,
    server: Server,
    *,
    producers: int = 1,
    rate: float = 200,
    ack_wait_s: float | None = 2,
    env: dict[str, str] | None = None,
    pause_s: float = 0.3,
    seed: int = 0,
) -> AsyncIterator[Cluster]:
    """Telemetry is ready and producers send; readers look the whole time, and what they find fails the test."""
    telemetry = Telemetry(folder, server, ack_wait_s=ack_wait_s, env=env)
    loads = [Producer(folder, server, name=f"producer-{number}", rate=rate) for number in range(producers)]
    async with contextlib.AsyncExitStack() as stack:
        for process in (telemetry, *loads):
            stack.enter_context(process)
        watch = await stack.enter_async_context(watching(server))
        await until(telemetry.is_ready)
        found = Cluster(folder, server, watch, telemetry, loads, seed)
        readers = Readers(found.layout, watch, loads, pause_s=pause_s)
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(readers.run())
            yield found
            await until(lambda: readers.looks > 0)  # the first may have waited for a server that was killed
            looking.cancel()
        assert not readers.faults, f"seed {seed}: {readers.faults[:5]}"
