"""Runs a module of railbus that kills or stops itself at named points: `python fail_points.py MODULE [ARGUMENT…]`.

Every change of a job's state goes through `JobRecords.apply`, so the moments before and after each kind of change are
all the points at which a death could be told from another: between the grant of leases and the record, between the
record and the start, between a checkpoint's rename and its name in the record, between the end and the leases' release.
A point is armed by a file in the folder FAIL_POINTS, called `before.Placed` or `after.Saved`, which holds the name of
the signal. Whoever comes to it takes the file away and sends itself the signal.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

FOLDER = "FAIL_POINTS"


def arm(folder: Path, point: str, number: signal.Signals = signal.SIGKILL) -> None:
    """The next process that comes to the point sends itself the signal, once."""
    draft = folder / f".{point}"
    draft.write_text(number.name)
    draft.rename(folder / point)


def _reach(point: str) -> None:
    armed = Path(os.environ[FOLDER]) / point
    try:
        number = signal.Signals[armed.read_text()]
        armed.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), number)


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


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of the tests is no part of what runs
    module = sys.argv[1]
    del sys.argv[0]
    _install()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
