"""What a checkpoint costs: against a bare copy, hash and write of the same bytes, and against other savers.

    python -m benchmarks checkpoint [ROUNDS] [--quick]

A job on a real `railbus up` holds a model of 94 million parameters with AdamW, 628 tensors and 1.1 GB in all, and saves
it by its policy, as every job does, through its writer and the commit in the job record. In turns with that, in the
same process and on the same disk, the others save the same tensors. What was written is compared with a copy, bit by
bit, and in the round that does not count all tensors are changed as soon as the loop may go on. A second job trains
while it saves, a third loads, two more are watched by the kernel's count of memory. `--quick` takes a state of 5 MB, to
see that it runs; nothing is to be read from its figures.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Cell, command, show, tell
from benchmarks.running import Running, running_up
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.layout import Layout

ROUNDS: Final = 5
STALL_OF_COPY: Final = 1.2
STALL_SHARE: Final = {"torch.save": 1 / 8, "DCP async, shared stager": 1 / 2}
DURABLE_OF_HASH: Final = 1.15
DURABLE_OF_TORCH: Final = 0.7
EXTRA_OF_TORCH: Final = 0.25
LOAD_OF_TORCH: Final = 1.0
_EVERY_STEPS: Final = 64
_JOB_S: Final = 600.0
_PEERS: Final = ("torch.save", "safetensors", "DCP save", "DCP async, default stager", "DCP async, shared stager")

Told = Mapping[str, Any]
Times = Mapping[str, Sequence[float]]


async def measured(client: Client, up: Running, entrypoint: str, *, mode: str = "async", **params: object) -> Told:
    """Run a job to its end; gives what it has told."""
    model = f"large-{entrypoint}-{mode}"
    with tempfile.TemporaryDirectory(dir=up.root.parent) as folder:
        spec = {
            "model": model,
            "dataset": "digits",
            "entrypoint": f"saving:{entrypoint}",
            "params": {"root": str(up.root), "model": model, "folder": folder, **params},
            "devices": {"kind": "cpu"},
            "checkpoint": {"every_steps": _EVERY_STEPS, "mode": mode, "keep_last": 1},
            "max_attempts": 1,
        }
        job = (await client.submit(spec)).id
        found: Told | None = None
        async with asyncio.timeout(_JOB_S):
            async for event in client.follow(job):
                if event["type"] == "app.measured":
                    found = event["data"]
        record = await client.job(job)
        assert found is not None, f"job {job} told nothing: {record.error}"
        assert record.state == "succeeded", f"job {job}: {record.error}"
    for path in Layout(up.root).checkpoints(model).iterdir():
        path.unlink()
    return found


async def measure_all(root: Path, *, rounds: int, tiny: bool) -> dict[str, Told]:
    with running_up(root) as up:
        async with Client.connect(up.settings) as client:
            found = {
                name: await measured(client, up, name, rounds=rounds, tiny=tiny)
                for name in ("still", "looping", "loading")
            }
            for mode in ("async", "sync"):
                found[mode] = await measured(client, up, "holding", mode=mode, rounds=2, tiny=tiny)
    return found


def ratios(found: Mapping[str, Told]) -> dict[str, tuple[float, float]]:
    """Each target by its name: what was measured, as a ratio of medians, and what it may be at most."""
    stall, durable, extra = found["still"]["stall_s"], found["still"]["durable_s"], found["looping"]["extra_s"]
    warm, cold = found["loading"]["warm_s"], found["loading"]["cold_s"]
    quickest = {
        id(times): min(_median(times, name) for name in ("torch.load", "torch.load, mapped")) for times in (warm, cold)
    }
    return {
        "stall / bare copy": (_median(stall, "railbus") / _median(stall, "copy"), STALL_OF_COPY),
        **{
            f"stall / {name}": (_median(stall, "railbus") / _median(stall, name), share)
            for name, share in STALL_SHARE.items()
        },
        "durable / bare hash": (_median(durable, "railbus") / _median(stall, "hash"), DURABLE_OF_HASH),
        "durable / torch.save": (_median(durable, "railbus") / _median(durable, "torch.save"), DURABLE_OF_TORCH),
        "extra loop time / torch.save": (_median(extra, "railbus") / _median(extra, "torch.save"), EXTRA_OF_TORCH),
        "load / torch.load, page cache": (_median(warm, "railbus") / quickest[id(warm)], LOAD_OF_TORCH),
        "load / torch.load, disk": (_median(cold, "railbus") / quickest[id(cold)], LOAD_OF_TORCH),
    }


def _median(times: Times, name: str) -> float:
    return statistics.median(times[name])


def _cells(values: Sequence[float]) -> list[Cell]:
    return [statistics.median(values), f"{min(values):.3f} to {max(values):.3f}"]


def report(found: Mapping[str, Told], *, rounds: int, tiny: bool) -> None:
    still, looping, loading = found["still"], found["looping"], found["loading"]
    stall, durable = still["stall_s"], still["durable_s"]
    size = f"{still['bytes'] / 1e6:,.0f} MB in {still['tensors']} tensors, {rounds} rounds in turns"
    limits = {"copy": "a bare copy, one thread", "hash": "a bare SHA-256", "write": "a raw write, O_DIRECT, fsync"}
    rows: list[list[Cell]] = [[title, *_cells(stall[name]), "", ""] for name, title in limits.items()]
    rows += [[name, *_cells(stall[name]), *_cells(durable[name])] for name in ("railbus", *_PEERS)]
    show(
        f"$ {command('checkpoint')}   {size}, seconds",
        header=["", "stall", "range", "durable", "range"],
        rows=rows,
    )
    show(
        "a loop that trains, seconds",
        header=["", "median", "range"],
        rows=[["one step", *_cells(looping["step_s"])],
              *([f"more with {name}", *_cells(values)] for name, values in looping["extra_s"].items())],
    )  # fmt: skip
    show(
        "loading into live tensors, seconds",
        header=["", "page cache", "range", "disk", "range"],
        rows=[[name, *_cells(values), *_cells(loading["cold_s"][name])] for name, values in loading["warm_s"].items()],
    )
    show(
        "memory beyond the live state, MiB",
        header=["", "at most", "copies of the state"],
        rows=[
            [mode, found[mode]["beyond"] / 2**20, found[mode]["beyond"] / found[mode]["bytes"]]
            for mode in ("async", "sync")
        ],
    )
    targets = {} if tiny else ratios(found)
    show(
        "targets",
        header=["", "measured", "at most", ""],
        rows=[[name, value, limit, "met" if value <= limit else "missed"] for name, (value, limit) in targets.items()],
    )
    tell(
        "checkpoint",
        rounds=rounds,
        **{name: still[name] for name in ("bytes", "tensors", "parameters", "threads", "stall_s", "durable_s")},
        looping=looping,
        loading=loading,
        memory_beyond_bytes={mode: found[mode]["beyond"] for mode in ("async", "sync")},
        ratios={name: round(value, 3) for name, (value, _) in targets.items()},
        within_target=bool(targets) and all(value <= limit for value, limit in targets.values()),
    )


def main() -> None:
    arguments = sys.argv[1:]
    tiny = "--quick" in arguments
    numbers = [int(argument) for argument in arguments if argument != "--quick"]
    rounds = numbers[0] if numbers else 2 if tiny else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        report(asyncio.run(measure_all(root, rounds=rounds, tiny=tiny)), rounds=rounds, tiny=tiny)


if __name__ == "__main__":
    main()
