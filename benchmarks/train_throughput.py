"""How much of PyTorch's own speed a railbus job keeps: steps a second against the same loop as a plain script.

    python -m benchmarks train_throughput [PAIRS]

Same mapped shard, same order of samples, same batches, model, optimizer, seed and number of threads; the job and the
script run in turns, so that whatever else the machine does meets both alike. Each pair gives a ratio. The ratio of the
CPU time that a step costs is told too: other people's load disturbs it less.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.bare_loop import SEED
from benchmarks.results import Cell, command, show, tell
from benchmarks.running import Running, running_up
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.writer import Chunk, write_dataset
from railbus_shared.layout import Layout

TARGET: Final = 0.98
_SAMPLES, _FEATURES, _CLASSES = 16_384, 1024, 10  # 64 MiB of float32
_PAIRS: Final = 9
_JOB_S: Final = 300.0


@dataclass(frozen=True)
class Case:
    """What is trained."""

    dataset: str
    batch_size: int
    epochs: int
    warm_up: int

    @property
    def params(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "epochs": self.epochs, "warm_up": self.warm_up}


CASES: Final = (
    Case("digits", batch_size=64, epochs=10, warm_up=40),
    Case("wide", batch_size=256, epochs=5, warm_up=64),
)

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """A job and a script that ran one after the other."""

    job: Numbers
    bare: Numbers
    services_frac: float
    """Share of one core that NATS and all services used while the job was there, its start and end included."""

    @property
    def speed(self) -> float:
        """Steps a second of the job, as a share of the script's."""
        return _rate(self.job) / _rate(self.bare)

    @property
    def cpu(self) -> float:
        """CPU seconds a step of the script, as a share of the job's: above 1 the job is cheaper."""
        return (self.bare["cpu_s"] / self.bare["steps"]) / (self.job["cpu_s"] / self.job["steps"])


def make_datasets(layout: Layout) -> None:
    """Handwritten digits, and noise in 64 MiB."""
    import_dataset(layout, "digits")
    generator = np.random.default_rng(SEED)
    schema = DatasetSchema(
        name="wide",
        columns={
            "features": Column(dtype="float32", shape=(_FEATURES,)),
            "label": Column(dtype="int64", shape=(), num_classes=_CLASSES),
        },
        splits={"train": Split(first=0, samples=_SAMPLES)},
    )
    chunk: Chunk = {
        "features": generator.standard_normal((_SAMPLES, _FEATURES), dtype=np.float32),
        "label": generator.integers(0, _CLASSES, _SAMPLES),
    }
    write_dataset(layout, schema, [chunk])


async def run_job(client: Client, case: Case, entrypoint: str, *, told: str) -> Numbers:
    """Run a job to its end; gives the data of the event in which it tells what it measured."""
    spec = {
        "model": f"{case.dataset}-{entrypoint}",
        "dataset": case.dataset,
        "entrypoint": f"throughput:{entrypoint}",
        "params": case.params,
        "seed": SEED,
        "devices": {"kind": "cpu"},
    }
    job = (await client.submit(spec)).id
    found: Any = None
    async with asyncio.timeout(_JOB_S):
        async for event in client.follow(job):
            if event["type"] == told:
                found = event["data"]
    if found is None:
        raise AssertionError(f"job {job} told nothing: {(await client.job(job)).error}")
    return {name: float(value) for name, value in found.items()}


class Script:
    """The script, which trains when it is told to."""

    def __init__(self, root: Path, case: Case, *, threads: int) -> None:
        numbers = (case.batch_size, case.epochs, case.warm_up, threads)
        command = [sys.executable, "-m", "benchmarks.bare_loop", str(root), case.dataset, *map(str, numbers)]
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as trainers have it, so that the pools wait alike
        self._process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self) -> Numbers:
        """Train once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.communicate()


async def measure(client: Client, up: Running, case: Case, *, num_pairs: int) -> list[Pair]:
    """Job first, then script first, and so on; one of each that does not count has warmed everything up."""
    first = await run_job(client, case, "train", told="app.measured")
    with contextlib.closing(Script(up.root, case, threads=int(first["threads"]))) as script:
        await asyncio.to_thread(script.run)
        return [await _pair(client, up, case, script, is_job_first=number % 2 == 0) for number in range(num_pairs)]


async def _pair(client: Client, up: Running, case: Case, script: Script, *, is_job_first: bool) -> Pair:
    bare: Numbers = {} if is_job_first else await asyncio.to_thread(script.run)
    cpu_s, began = up.cpu_s(), time.perf_counter()
    job = await run_job(client, case, "train", told="app.measured")
    services_frac = (up.cpu_s() - cpu_s) / (time.perf_counter() - began)
    bare = bare or await asyncio.to_thread(script.run)
    assert (job["steps"], job["threads"]) == (bare["steps"], bare["threads"])
    return Pair(job, bare, services_frac)


def report(case: Case, pairs: list[Pair], costs: Numbers) -> None:
    rows: list[list[Cell]] = [
        [f"pair {n}", _rate(p.job), _rate(p.bare), p.speed, p.cpu, p.services_frac]
        for n, p in enumerate(pairs, start=1)
    ]
    speeds, cpus = [pair.speed for pair in pairs], [pair.cpu for pair in pairs]
    jobs, bares = [_rate(pair.job) for pair in pairs], [_rate(pair.bare) for pair in pairs]
    services = [pair.services_frac for pair in pairs]
    rows.append(["median", *map(statistics.median, (jobs, bares, speeds, cpus, services))])
    gather_us = statistics.median(pair.bare["gather_us"] for pair in pairs)
    step_us = 1e6 * statistics.median(pair.bare["cpu_s"] / pair.bare["steps"] for pair in pairs)
    header = ["", "job steps/s", "script steps/s", "speed", "CPU", "services"]
    name = f"{case.dataset}, batches of {case.batch_size}"
    show(f"$ {command('train_throughput')}   {name}; ratios above 1: the job is better", header=header, rows=rows)
    told = {**costs, "a batch of the script": gather_us, "a whole step of the script": step_us}
    own_us = costs["a batch of ctx.stream"] + costs["ctx.step(loss=tensor)"] - gather_us
    told["what railbus adds to a step"] = own_us
    show("cost of each (microseconds of CPU)", header=["", "us"], rows=[[key, us] for key, us in told.items()])
    tell(
        "train_throughput",
        dataset=case.dataset,
        batch_size=case.batch_size,
        steps=int(pairs[0].job["steps"]),
        threads=int(pairs[0].job["threads"]),
        pairs=len(pairs),
        speed=_spread(speeds),
        cpu=_spread(cpus),
        services_cores=_spread(services),
        us={key: round(us, 1) for key, us in told.items()},
        added_frac=round(own_us / step_us, 4),
        target=TARGET,
        within_target=statistics.median(speeds) >= TARGET,
    )


def _rate(numbers: Numbers) -> float:
    return numbers["steps"] / numbers["wall_s"]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


async def measure_all(root: Path, num_pairs: int) -> None:
    with running_up(root) as up:
        async with Client.connect(up.settings) as client:
            for case in CASES:
                pairs = await measure(client, up, case, num_pairs=num_pairs)
                costs = await run_job(client, case, "costs", told="app.costs")
                report(case, pairs, costs)


def main() -> None:
    num_pairs = int(sys.argv[1]) if len(sys.argv) > 1 else _PAIRS
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        make_datasets(Layout(root))
        asyncio.run(measure_all(root, num_pairs))


if __name__ == "__main__":
    main()
