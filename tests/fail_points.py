"""Runs a module of railbus that kills or stops itself at named points: `python fail_points.py MODULE [ARGUMENT…]`.

Every change of a job's state goes through `JobRecords.apply`, so the moments before and after each kind of change are
all the points at which a death could be told from another: between the grant of leases and the record, between the
record and the start, between a checkpoint's rename and its name in the record, between the end and the leases' release.
A point is armed by a file in the folder FAIL_POINTS, called `before.Placed` or `after.Saved`, which holds the name of
the signal. Whoever comes to it takes the file away and sends itself the signal, or sends it to the processes named.

The points of whoever writes a checkpoint are `STEPS`, of a writer alone `writer.<step>`. They are there in every fork
of a pre-warmed process whose target is `fail_points:trainer_main`, which a runner that this module runs starts.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FOLDER = "FAIL_POINTS"
TARGET = "fail_points:trainer_main"
HERE = str(Path(__file__).parent)
STEPS = ("claimed", "data_written", "data_published", "meta_drafted", "committed", "published", "retained")


def arm(folder: Path, point: str, number: signal.Signals = signal.SIGKILL, *, pids: Iterable[int] = (0,)) -> None:
    """The next process that comes to the point sends the signal, once: to itself (0), or to others."""
    draft = folder / f".{point}"
    draft.write_text(" ".join([number.name, *map(str, pids)]))
    draft.rename(folder / point)


def _reach(point: str) -> None:
    armed = Path(os.environ[FOLDER]) / point
    try:
        name, *pids = armed.read_text().split()
        armed.unlink()
    except FileNotFoundError:
        return
    for pid in pids:
        os.kill(int(pid) or os.getpid(), signal.Signals[name])


def trainer_main(sock: socket.socket) -> int:
    from railbus_runner import trainer

    return trainer.main(sock)


_roles = [""]
"""Of this process: in a writer also `writer.`."""


def _install_steps() -> None:
    """Before anything is forked."""
    from railbus_runner.checkpointing import serials, store, writer

    main = writer.main

    def writer_main(runner: socket.socket, trainer: socket.socket) -> int:
        _roles.append("writer.")
        return main(runner, trainer)

    writer.main = writer_main
    _mark(serials, "claim", after="claimed")
    _mark(store, "write_draft", after="data_written")
    _mark(store.CheckpointStore, "_write_draft", before="data_published", after="meta_drafted")
    _mark(store.CheckpointStore, "_publish", before="committed", after="published")
    _mark(store.CheckpointStore, "retain", after="retained")


def _mark(owner: Any, name: str, *, before: str = "", after: str = "") -> None:
    call: Callable[..., Any] = getattr(owner, name)

    def failing(*args: Any, **named: Any) -> Any:
        for role in _roles if before else ():
            _reach(f"{role}{before}")
        result = call(*args, **named)
        for role in _roles if after else ():
            _reach(f"{role}{after}")
        return result

    setattr(owner, name, failing)


def _pass_on() -> None:
    """To the pre-warmed process of a runner."""
    from railbus_runner.warm_process import WarmProcess

    os.environ["PYTHONPATH"] = HERE
    options = WarmProcess.__init__.__kwdefaults__
    assert options is not None
    options["target"] = TARGET


def _install() -> None:
    from railbus_shared.happenings import Happening
    from railbus_shared.lifecycle import Decision
    from railbus_shared.records import Applied, JobRecords

    apply = JobRecords.apply

    async def failing(
        records: JobRecords, job: str, happening: Happening, *, unknown: list[Decision] | None = None
    ) -> Applied:
        _reach(f"before.{type(happening).__name__}")
        applied = await apply(records, job, happening, unknown=unknown)
        _reach(f"after.{type(happening).__name__}")
        return applied

    setattr(JobRecords, "apply", failing)  # noqa: B010 - to a type checker a method is not to be assigned


if __name__ == "fail_points" and FOLDER in os.environ:  # in a pre-warmed process, not in a test
    _install_steps()

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of the tests is no part of what runs
    module = sys.argv[1]
    del sys.argv[0]
    _install()
    if module in ("railbus_runner", "railbus.cli.main"):
        _pass_on()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
