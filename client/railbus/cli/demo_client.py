"""The part of `railbus demo` that is a client: a process of its own, because the supervisor has one thread.

It imports the dataset while the services start, waits for a line on stdin, publishes the job event as anyone could, and
follows. What it has to say goes to stdout as JSON lines: `say`, `event`, `job`, `end` or `error`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import orjson

from railbus.cli.render import size
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared import wire
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.errors import BusUnavailable, RailbusError, error_from_wire
from railbus_shared.layout import Layout
from railbus_shared.settings import running_bus

DATASET: Final = "digits"
MODEL: Final = "digits-cnn"
"""What `railbus demo` trains."""


def spec_of(epochs: int) -> JobSpec:
    """The demo's job."""
    return JobSpec.parse(
        {
            "model": MODEL,
            "dataset": DATASET,
            "entrypoint": "classifier",
            "params": {"epochs": epochs},
            "checkpoint": {"every_steps": 50, "keep_last": 3},
        }
    )


def main(root: Path, *, epochs: int, flushes: bool) -> int:
    """Import, wait for the bus, publish, follow; returns the exit status."""
    try:
        _import(Layout(root))
        sys.stdin.readline()
        asyncio.run(_train(Layout(root), epochs=epochs, flushes=flushes))
    except RailbusError as exc:
        _put({"error": exc.to_wire()})
        return 1
    return 0


def _import(layout: Layout) -> None:
    began_s = time.perf_counter()
    index = import_dataset(layout, DATASET)
    took = f"{time.perf_counter() - began_s:.1f} s"
    facts = f"{index.file.samples:,} samples, {size(index.file.bytes)}, sha256 {index.file.shards[0].sha256[:12]}…"
    _put({"say": f"dataset {DATASET}: {facts}, {took}", "tone": "good"})  # fits 80 columns


async def _train(layout: Layout, *, epochs: int, flushes: bool) -> None:
    settings = running_bus(layout)
    if settings is None:
        raise BusUnavailable(f"nothing runs on {str(layout.root)!r}", hint="`railbus up`")
    async with Bus.open(settings, name="demo") as bus:
        client = Client(bus)
        job = await _publish(bus, spec_of(epochs))
        async for event in client.follow(job):
            _put({"event": event})
            if event.get("type") == "job.rejected":
                raise _refusal(event)
        record = await client.job(job)
        if flushes:
            await client.flush()
    _put({"end": record.to_map()})


async def _publish(bus: Bus, spec: JobSpec) -> str:
    """Publish the job event as plain JSON; the acknowledgement's sequence tells the job's id."""
    data = wire.encode(spec.to_map(), encoding=wire.Encoding.JSON)
    incarnation = await _incarnation(bus)
    sequence = await bus.publish(Outgoing(bus.subjects.submit, data, msg_id=""))
    job = f"j-{incarnation[:6]}-{sequence}"
    _put({"job": job, "subject": bus.subjects.submit, "bytes": len(data)})
    return job


async def _incarnation(bus: Bus) -> str:
    """The store's id, as any NATS client can read it."""
    match await bus.api(f"STREAM.INFO.{bus.subjects.jobs_stream}"):
        case {"config": {"metadata": {"railbus-incarnation": str(incarnation)}}}:
            return incarnation
        case answer:
            raise BusUnavailable(f"the stream of jobs has no incarnation: {answer}", hint="is this a railbus store?")


def _refusal(event: Mapping[str, object]) -> RailbusError:
    data = event.get("data")
    error = data.get("error") if isinstance(data, dict) else None
    return error_from_wire(error if isinstance(error, dict) else {})


def _put(message: Mapping[str, object]) -> None:
    sys.stdout.buffer.write(orjson.dumps(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), epochs=int(sys.argv[2]), flushes=sys.argv[3] == "1"))
