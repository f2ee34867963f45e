"""Placement: how long a pass takes, and how good what it decides is.

    python -m benchmarks scheduler [JOBS]

Pass: 10,000 queued jobs of many shapes from six owners over 1,000 devices. Quality: a cluster on a virtual clock and
15,000 jobs of three sizes from six owners, one of whom submits a third of all in bursts; against first come, first
served and against EASY backfill; once more as if all jobs were one owner's, where a fair share can change nothing and
the order is that of EASY. `scheduling/ranges.json` holds what the figures must not leave, and why; where one does, the
exit code is 1.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Final

from benchmarks.results import Cell, show, tell
from benchmarks.scheduling.bounds import problems, settings_of
from benchmarks.scheduling.ours import Ours
from benchmarks.scheduling.pass_time import STATES, measure
from benchmarks.scheduling.references import Easy, Fcfs
from benchmarks.scheduling.simulation import Scheduler, simulate
from benchmarks.scheduling.workload import OWNERS, Job, workload

SCHEDULERS: Final[dict[str, Callable[[], Scheduler]]] = {"fcfs": Fcfs, "easy": Easy, "railbus": Ours}
Figures = dict[str, float]


def passes() -> Figures:
    """Median seconds of processor time of a pass, by the state of the cluster."""
    run = settings_of("pass")
    found = {}
    for state in STATES:
        timed = measure(state, num_jobs=run["jobs"], num_devices=run["devices"], repeats=run["repeats"])
        found[f"{state.replace(' ', '_')}_s"] = statistics.median(timed.seconds)
    return found


def quality(jobs: Sequence[Job]) -> dict[str, Figures]:
    """Figures of every scheduler over the same jobs."""
    return {name: simulate(jobs, make()).figures() for name, make in SCHEDULERS.items()}


def as_one_owner(jobs: Sequence[Job]) -> list[Job]:
    return [dataclasses.replace(job, owner=OWNERS[0]) for job in jobs]


def show_quality(title: str, found: dict[str, Figures]) -> None:
    """One row for each figure."""
    rows: list[list[Cell]] = [[figure, *(found[name][figure] for name in found)] for figure in found["railbus"]]
    show(title, header=["", *found], rows=rows)


def main() -> None:
    """Measure, print, and compare with the range file."""
    num_jobs = int(sys.argv[1]) if len(sys.argv) > 1 else settings_of("six_owners")["jobs"]
    timed = passes()
    show("One pass, milliseconds", header=["", "ms"], rows=[[name, value * 1000] for name, value in timed.items()])
    jobs = workload(num_jobs, seed=settings_of("six_owners")["seed"])
    six, one = quality(jobs), quality(as_one_owner(jobs))
    show_quality(f"{num_jobs:,} jobs from six owners", six)
    show_quality("The same as if of one owner", one)
    wrong = [
        *problems("pass", timed, {}),
        *(f"six owners: {problem}" for problem in problems("six_owners", six["railbus"], six)),
        *(f"one owner: {problem}" for problem in problems("one_owner", one["railbus"], one)),
    ]
    for problem in wrong:
        print(f"out of range: {problem}")
    tell("scheduler", passes=timed, six_owners=six, one_owner=one, out_of_range=wrong)
    if wrong:
        sys.exit(1)
