"""What a checkpoint costs: against a bare copy, hash and write of the same bytes, and against other savers.

    python -m benchmarks checkpoint [ROUNDS] [PART...] [--quick]

A job on a real `railbus up` holds a model of 94 million parameters with AdamW, 628 tensors and 1.1 GB in all, and saves
it by its policy, as every job does, through its writer and the commit in the job record. In turns with that, in the
same process and on the same disk, the others save the same tensors (`still`). What was written is compared with a copy,
bit by bit, and once all tensors are changed as soon as the loop may go on. A second job
trains while it saves (`looping`), a third loads (`loading`), and of two more the memory is watched, in both modes
(`holding`). Without a PART all are measured. `--quick` takes a state of 6 MB, to see that it runs; nothing is to be
read from its figures.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Cell, command, show, tell
from benchmarks.running import Running, running_up
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.layout import Layout

ROUNDS: Final = 5
PARTS: Final = ("still", "looping", "loading", "holding")
MODES: Final = ("async", "sync")
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
            "params": {"root": str(up.root), "model": model, "folder": folder, "mode": mode, **params},
            "devices": {"kind": "cpu"},
            "checkpoint": {"every_steps": _EVERY_STEPS, "mode": mode, "keep_last": 1},
            "max_attempts": 1,
        }
        job = (await client.submit(spec)).id
        found: Any = None
        modes: list[str] = []
        async with asyncio.timeout(_JOB_S):
            async for event in client.follow(job):
                data: Any = event["data"]
                if event["type"] == "app.measured":
                    found = data
                elif event["type"] == "checkpoint.written":
                    modes.append(data["mode"])
        record = await client.job(job)
        assert record.state == "succeeded", f"job {job}: {record.error}"
        assert found is not None, f"job {job} told nothing"
        began = modes.index(mode)  # until the writer is ready, the trainer writes by itself
        assert set(modes[began:]) == {mode}, f"job {job} wrote in the modes {modes}: is there not enough memory?"
    for path in Layout(up.root).checkpoints(model).iterdir():
        path.unlink()
    return found


async def measure_all(root: Path, parts: Sequence[str], *, rounds: int, tiny: bool) -> dict[str, Told]:
    found: dict[str, Told] = {}
    with running_up(root) as up:
        async with Client.connect(up.settings) as client:
            for part in parts:
                if part != "holding":
                    found[part] = await measured(client, up, part, rounds=rounds, tiny=tiny)
                    continue
                for mode in MODES:
                    found[mode] = await measured(client, up, part, mode=mode, rounds=4, tiny=tiny)
    return found


def ratios(found: Mapping[str, Told], of: Callable[[Sequence[float]], float]) -> Iterator[tuple[str, float, float]]:
    """Each target that can be judged: its name, the ratio that was measured, and what it may be at most.

    `of` makes one number of the seconds of all rounds.
    """
    if "still" in found:
        stall, durable = _each(found["still"]["stall_s"], of), _each(found["still"]["durable_s"], of)
        yield "stall / bare copy", stall["railbus"] / stall["copy"], STALL_OF_COPY
        for name, share in STALL_SHARE.items():
            yield f"stall / {name}", stall["railbus"] / stall[name], share
        yield "durable / bare hash", durable["railbus"] / stall["hash"], DURABLE_OF_HASH
        yield "durable / torch.save", durable["railbus"] / durable["torch.save"], DURABLE_OF_TORCH
    if "looping" in found:
        extra = _each(found["looping"]["extra_s"], of)
        yield "extra loop time / torch.save", extra["railbus"] / extra["torch.save"], EXTRA_OF_TORCH
    for where, seconds in found["loading"].items() if "loading" in found else ():
        times = _each(seconds, of)
        for name in ("torch.load", "torch.load, mapped"):
            yield f"load / {name}, {where}", times["railbus"] / times[name], LOAD_OF_TORCH


def _each(times: Times, of: Callable[[Sequence[float]], float]) -> dict[str, float]:
    return {name: of(seconds) for name, seconds in times.items()}


def _cells(values: Sequence[float]) -> list[Cell]:
    return [statistics.median(values), f"{min(values):.3f} to {max(values):.3f}"]


def show_still(told: Told) -> None:
    stall, durable = told["stall_s"], told["durable_s"]
    limits = {"copy": "a bare copy, one thread", "hash": "a bare SHA-256", "write": "a raw write, O_DIRECT, fsync"}
    rows: list[list[Cell]] = [[title, *_cells(stall[name]), "", ""] for name, title in limits.items()]
    rows += [[name, *_cells(stall[name]), *_cells(durable[name])] for name in ("railbus", *_PEERS)]
    size = f"{told['bytes'] / 1e6:,.0f} MB in {told['tensors']} tensors, {len(stall['copy'])} rounds in turns"
    show(
        f"$ {command('checkpoint')}   {size}, seconds",
        header=["", "stall", "range", "durable", "range"],
        rows=rows,
    )


def show_looping(told: Told) -> None:
    rows = [["one step", *_cells(told["step_s"])]]
    rows += [[f"more with {name}", *_cells(values)] for name, values in told["extra_s"].items()]
    show("a loop that trains, seconds", header=["", "median", "range"], rows=rows)


def show_loading(told: Told) -> None:
    rows = [[name, where, *_cells(seconds)] for where, times in told.items() for name, seconds in times.items()]
    show("loading, seconds", header=["", "into live tensors from", "median", "range"], rows=rows)


def show_holding(found: Mapping[str, Told]) -> None:
    rows = [[mode, found[mode]["beyond"] / 2**20, found[mode]["beyond"] / found[mode]["bytes"]] for mode in MODES]
    show("memory beyond the live state, MiB", header=["", "at most", "copies of the state"], rows=rows)


def report(found: Mapping[str, Told], *, rounds: int, tiny: bool) -> None:
    for part, shown in {"still": show_still, "looping": show_looping, "loading": show_loading}.items():
        if part in found:
            shown(found[part])
    if MODES[0] in found:
        show_holding(found)
    judged = [] if tiny else list(ratios(found, statistics.median))
    quickest = {} if tiny else {name: value for name, value, _ in ratios(found, min)}
    if judged:
        show(
            "targets: ratios of medians, and of the quickest rounds",
            header=["", "medians", "quickest", "at most", ""],
            rows=[
                [name, value, quickest[name], limit, "met" if value <= limit else "missed"]
                for name, value, limit in judged
            ],
        )
    tell(
        "checkpoint",
        rounds=rounds,
        **found,
        ratios={name: round(value, 3) for name, value, _ in judged},
        ratios_of_quickest={name: round(value, 3) for name, value in quickest.items()},
        within_target=all(value <= limit for _, value, limit in judged) if judged else None,
    )


def main() -> None:
    arguments = sys.argv[1:]
    tiny = "--quick" in arguments
    parts = [part for part in PARTS if part in arguments] or PARTS
    rounds = next((int(argument) for argument in arguments if argument.isdecimal()), 2 if tiny else ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        report(asyncio.run(measure_all(root, parts, rounds=rounds, tiny=tiny)), rounds=rounds, tiny=tiny)


if __name__ == "__main__":
    main()
