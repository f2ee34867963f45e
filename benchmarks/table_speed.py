"""How fast tables are parsed: rows a second of CSV and JSONL, against the bare parser reading the same file twice.

    python -m benchmarks table_speed [ROWS]

An importer reads a table twice: once to find what each column is, and once for its values. The bare one is csv.reader,
or orjson for each line, and looks at nothing. Processor time, in turns.
"""

from __future__ import annotations

import csv
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import orjson

from benchmarks.results import command, show, tell
from railbus.importers.choosing import opened
from railbus.importers.source import Options, num_samples

ROUNDS: Final = 5
ROWS: Final = 200_000


def write(folder: Path, rows: int) -> list[Path]:
    """Two tables of numbers, classes and words, and one of lists."""
    rng = random.Random(0)
    table, lines, lists = folder / "table.csv", folder / "table.jsonl", folder / "lists.jsonl"
    with table.open("w") as cells, lines.open("w") as maps, lists.open("w") as numbers:
        cells.write("a,b,n,label,word\n")
        for number in range(rows):
            row = {"a": round(rng.random(), 6), "b": round(rng.gauss(0, 100), 4), "n": number}
            row |= {"label": rng.choice(("cat", "dog", "fox")), "word": f"w{rng.randrange(10**9)}"}
            cells.write(",".join(map(str, row.values())) + "\n")
            maps.write(json.dumps(row) + "\n")
            numbers.write(json.dumps({"x": [round(rng.random(), 4) for _ in range(16)], "y": number % 3}) + "\n")
    return [table, lines, lists]


def importer(path: Path) -> int:
    return sum(map(num_samples, opened(path, Options()).chunks()))


def bare(path: Path) -> int:
    """Rows of the second reading."""
    rows = 0
    for _ in range(2):
        with path.open(newline="") as file:
            rows = sum(1 for _ in (csv.reader(file) if path.suffix == ".csv" else map(orjson.loads, file)))
    return rows


def rates(path: Path, rows: int) -> Iterator[tuple[float, float]]:
    """Thousand rows a second of the importer and of the bare parser, in turns."""
    for _ in range(ROUNDS):
        yield _rate(importer, path, rows), _rate(bare, path, rows)


def _rate(read: Callable[[Path], int], path: Path, rows: int) -> float:
    began = time.process_time()
    assert read(path) >= rows
    return rows / (time.process_time() - began) / 1e3


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as name:
        found = {path.name: list(rates(path, rows)) for path in write(Path(name), rows)}
    medians = {
        name: (
            statistics.median(ours for ours, _ in pairs),
            statistics.median(other for _, other in pairs),
            statistics.median(ours / other for ours, other in pairs),
        )
        for name, pairs in found.items()
    }
    show(
        f"$ {command('table_speed')}   (thousand rows a second of processor time)",
        header=["", "import", "bare parser twice", "ratio"],
        rows=[[name, *numbers] for name, numbers in medians.items()],
    )
    tell("table_speed", rows=rows, import_k_rows_per_s={name: round(ours, 1) for name, (ours, _, _) in medians.items()},
         ratio={name: round(ratio, 3) for name, (_, _, ratio) in medians.items()})  # fmt: skip


if __name__ == "__main__":
    main()
