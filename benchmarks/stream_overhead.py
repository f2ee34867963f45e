"""What a batch of `ShardStream` costs over a bare gather of the same rows, in the same run.

    python -m benchmarks stream_overhead [ROUNDS]

Token samples of 2048 int32 (8 KiB) in one shard and in eight, in order and shuffled, in batches of 32. The peer knows
the rows beforehand and calls `np.take(..., out=, mode="clip")` once a batch and shard into two page-aligned buffers in
turns: nothing that copies the same bytes by NumPy can be faster. A third measurement takes samples of 8 bytes, where
nearly all is overhead. CPU time is the figure to trust where the machine is shared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import Cell, show, tell
from railbus_runner.opening import Dataset, open_dataset
from railbus_runner.stream import ShardStream
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.order import EpochOrder
from railbus_shared.data.readers import Array, page_aligned_empty
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout

ROUNDS = 7
BATCH = 32
SAMPLES = 1 << 15
"""256 MiB of tokens: larger than caches, and quick to write."""
TOKENS = Column(dtype="int32", shape=(2048,))
SMALL = Column(dtype="int32", shape=(2,))


@dataclass(frozen=True)
class Case:
    """One dataset in one order."""

    column: Column
    num_shards: int
    shuffle: bool

    @property
    def name(self) -> str:
        size = "tokens" if self.column is TOKENS else "8 bytes"
        return f"{size}, {self.num_shards} shard(s), {'shuffled' if self.shuffle else 'in order'}"


CASES = [Case(column, shards, shuffle) for column in (TOKENS, SMALL) for shards in (1, 8) for shuffle in (False, True)]


@dataclass(frozen=True)
class Timing:
    """Microseconds a batch."""

    wall: float
    cpu: float


def made(folder: Path, case: Case) -> Dataset:
    """The case's dataset, written unless it is there."""
    name = f"d{case.column.shape[0]}-{case.num_shards}"
    layout = Layout(folder)
    if not layout.index(name).exists():
        size = SAMPLES * case.column.shape[0] * 4
        splits = {"all": Split(first=0, samples=SAMPLES)}
        schema = DatasetSchema(name=name, columns={"x": case.column}, splits=splits)
        write_dataset(layout, schema, _chunks(case.column), shard_bytes=size // case.num_shards)
    return open_dataset(layout.dataset(name))


def _chunks(column: Column) -> Iterator[dict[str, Array]]:
    random = np.random.default_rng(0)
    for _ in range(0, SAMPLES, 4096):
        yield {"x": random.integers(0, 50_000, (4096, *column.shape), np.int32)}


def bare(dataset: Dataset, case: Case) -> Callable[[int], None]:
    """The limit: rows known beforehand, one `take` a batch and shard."""
    shards = dataset.index.file.shards
    columns = [
        np.memmap(dataset.paths[number], np.int32, "r", shard.columns["x"].offset, (shard.samples, *case.column.shape))
        for number, shard in enumerate(shards)
    ]
    buffers = [page_aligned_empty((BATCH, *case.column.shape), np.dtype(np.int32)) for _ in range(2)]

    def run(epoch: int) -> None:
        for number, pieces in enumerate(rows[epoch % 2]):
            for shard, begin, end, taken in pieces:
                columns[shard].take(taken, axis=0, out=buffers[number % 2][begin:end], mode="clip")

    rows = [_rows(dataset, case, epoch) for epoch in range(2)]
    return run


def _rows(dataset: Dataset, case: Case, epoch: int) -> list[list[tuple[int, int, int, Array]]]:
    """For each batch and shard: the shard, where its rows go (they are not put back in order), and the rows."""
    samples = EpochOrder(SAMPLES, 0, epoch, case.shuffle).positions(0, SAMPLES)
    found = []
    for start in range(0, SAMPLES, BATCH):
        numbers, rows = dataset.index.locate(samples[start : start + BATCH])
        pieces, begin = [], 0
        for number in sorted(set(numbers.tolist())):
            taken = rows[numbers == number]
            pieces.append((number, begin, begin + len(taken), taken))
            begin += len(taken)
        found.append(pieces)
    return found


def streamed(stream: ShardStream) -> Callable[[int], None]:
    def run(epoch: int) -> None:
        stream.load_state_dict({**stream.state_dict(), "epoch": epoch % 2, "batches_done": 0})
        for _ in stream:
            pass

    return run


def timed(run: Callable[[int], None], epoch: int) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    run(epoch)
    batches = SAMPLES // BATCH / 1e6
    return Timing((time.perf_counter() - wall) / batches, (time.process_time() - cpu) / batches)


def measured(folder: Path, case: Case, rounds: int) -> tuple[list[Timing], list[Timing]]:
    """Ours and the peer's, in turns."""
    dataset = made(folder, case)
    ours, peer = streamed(dataset.stream("all", batch_size=BATCH, shuffle=case.shuffle)), bare(dataset, case)
    for run in (ours, peer):
        run(0)  # maps the pages
    pairs = [(timed(ours, epoch), timed(peer, epoch)) for epoch in range(rounds)]
    return [one for one, _ in pairs], [other for _, other in pairs]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    torch.set_num_threads(1)
    rows: list[list[Cell]] = []
    numbers = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            ours, peer = measured(Path(folder), case, rounds)
            wall, bare_wall = (statistics.median(one.wall for one in all_of) for all_of in (ours, peer))
            cpu, bare_cpu = (statistics.median(one.cpu for one in all_of) for all_of in (ours, peer))
            rows.append([case.name, wall, bare_wall, cpu, bare_cpu, cpu - bare_cpu, 1e3 * BATCH / wall])
            numbers.append(
                {"case": case.name, "us": wall, "bare_us": bare_wall, "cpu_us": cpu, "bare_cpu_us": bare_cpu}
            )
    show(
        f"Microseconds a batch of {BATCH}, medians of {rounds} rounds in turns",
        header=["", "wall", "bare", "CPU", "bare CPU", "CPU over bare", "thousand samples/s"],
        rows=rows,
    )
    tell("stream_overhead", rounds=rounds, cases=numbers)


if __name__ == "__main__":
    main()
