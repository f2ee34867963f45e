"""How results are told: a small table for people, and one JSON line for programs."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence

Cell = str | float | int


def show(title: str, *, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A table, its first column flush left."""
    cells = [[str(cell) for cell in header], *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"{title}\n")
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *rest]).rstrip())
    print()


def tell(name: str, **numbers: object) -> None:
    """The JSON line, with the command that made it and how busy the machine was."""
    cores = len(os.sched_getaffinity(0))
    line = {"benchmark": name, "command": command(name), "cores": cores, "load": round(os.getloadavg()[0], 2)}
    print(json.dumps({**line, **numbers}), flush=True)


def command(name: str) -> str:
    """What to type to run this again."""
    return " ".join(["python -m benchmarks", name, *sys.argv[1:]])


def quantile(values: Sequence[float], frac: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-frac * len(ordered) // 1) - 1)]


def summary(values: Sequence[float]) -> Mapping[str, float]:
    """Median, 90th percentile and both ends, rounded to a tenth of a millisecond."""
    found = {
        "p50": statistics.median(values),
        "p90": quantile(values, 0.9),
        "min": min(values),
        "max": max(values),
    }
    return {name: round(value, 4) for name, value in found.items()}


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 100 else f"{cell:.1f}"
    return str(cell)
