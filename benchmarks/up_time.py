"""How soon `railbus up` is ready: from starting its process to the first screen, with warm files.

    python -m benchmarks up_time [RUNS]

Always on the same root, which a run that does not count has filled before. The import of torch in the pre-warmed
process is the peer: a bare interpreter that imports the same is timed in turns with it. What is left is ours.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.results import Cell, command, show, summary, tell
from benchmarks.running import Running, running_up
from railbus.importing import import_dataset
from railbus_shared.layout import Layout

TARGET_S: Final = 3.0
_RUNS: Final = 5
_STARTED: Final = "started"
_READY: Final = "ready"


@dataclass(frozen=True)
class Start:
    """One start, in seconds from typing."""

    total_s: float
    torch_s: float
    """That the imports took in the pre-warmed process, by its own clock."""
    stages: dict[str, float]
    """When each line was shown."""

    @property
    def apart_s(self) -> float:
        return self.total_s - self.torch_s


def start_of(up: Running) -> Start:
    stages = {}
    for since_s, line in up.lines:
        match line.split()[1:3]:
            case [name, what] if what in {_STARTED, _READY}:
                stages[f"{name} {what}"] = since_s
    return Start(up.ready_s, torch_s(up.log("runner")), stages)


def torch_s(log: str) -> float:
    """The `seconds` of the pre-warmed process's last `ready`, from the runner's log."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return float([line["seconds"] for line in lines if "torch" in line and "seconds" in line][-1])


def bare_import_s() -> float:
    """Seconds of an interpreter that imports what the pre-warmed process does, and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, torch._dynamo, torch.optim"], check=True)
    return time.perf_counter() - began


def bare_python_s() -> float:
    """Seconds of an interpreter that does nothing: how slow processes are here at all."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", ""], check=True)
    return time.perf_counter() - began


def report(starts: Sequence[Start], *, imports: Sequence[float], pythons: Sequence[float]) -> None:
    told = {
        "railbus up, total": [start.total_s for start in starts],
        "import in its pre-warmed process": [start.torch_s for start in starts],
        "total without that import": [start.apart_s for start in starts],
        "bare import of torch": imports,
        "bare interpreter": pythons,
    }
    rows: list[list[Cell]] = [[name, *summary(values).values()] for name, values in told.items()]
    show(f"$ {command('up_time')}   (seconds)", header=["", "p50", "p90", "min", "max"], rows=rows)
    stages: list[list[Cell]] = [
        [name, statistics.median(start.stages[name] for start in starts)] for name in starts[-1].stages
    ]
    show("what was shown when (median)", header=["", "s"], rows=stages)
    apart_s = statistics.median(start.apart_s for start in starts)
    total_s = statistics.median(start.total_s for start in starts)
    tell(
        "up_time",
        runs=len(starts),
        total_s=summary([start.total_s for start in starts]),
        torch_s=round(statistics.median(start.torch_s for start in starts), 3),
        apart_s=summary([start.apart_s for start in starts]),
        total_over_bare_import=round(total_s / statistics.median(imports), 2),
        target_s=TARGET_S,
        within_target=apart_s <= TARGET_S,
    )


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else _RUNS
    starts, imports, pythons = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "learning"
        import_dataset(Layout(root), "digits")
        for _ in range(runs + 1):
            with running_up(root) as up:
                starts.append(start_of(up))
            imports.append(bare_import_s())
            pythons.append(bare_python_s())
    report(starts[1:], imports=imports[1:], pythons=pythons[1:])


if __name__ == "__main__":
    main()
