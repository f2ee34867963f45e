"""The peer of a training job: the same loop as a plain PyTorch script, on memory-mapped arrays, without railbus.

    python -m benchmarks.bare_loop ROOT DATASET BATCH_SIZE EPOCHS WARM_UP THREADS

Trains once for each line of input, and prints what it measured. The samples come in the order of the railbus job, which
is reckoned before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.jobs.throughput import Trainer, run
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import EpochOrder
from railbus_shared.data.readers import numpy_dtype
from railbus_shared.layout import Layout

Array = npt.NDArray[Any]
SEED = 0


def columns_of(layout: Layout, index: DatasetIndex) -> dict[str, Array]:
    """The columns of the only shard, mapped by NumPy itself."""
    (shard,) = index.file.shards
    path = layout.shards(index.schema.name) / shard.file
    return {
        name: np.memmap(
            path,
            dtype=numpy_dtype(column),
            mode="r",
            offset=shard.columns[name].offset,
            shape=(shard.samples, *column.shape),
        )
        for name, column in index.schema.columns.items()
    }


def batches(columns: dict[str, Array], orders: list[Array], *, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    for order in orders:
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield {name: torch.from_numpy(column[chosen]) for name, column in columns.items()}


def gather_us(columns: dict[str, Array], orders: list[Array], *, batch_size: int) -> float:
    """Microseconds of CPU that a batch costs without railbus."""
    num_batches = sum(1 for _ in batches(columns, orders, batch_size=batch_size))  # the first time warms the pages
    began = time.process_time()
    for _ in batches(columns, orders, batch_size=batch_size):
        pass
    return 1e6 * (time.process_time() - began) / num_batches


def main() -> None:
    root, dataset = Path(sys.argv[1]), sys.argv[2]
    batch_size, epochs, warm_up, threads = map(int, sys.argv[3:7])
    torch.set_num_threads(threads)
    layout = Layout(root)
    index = DatasetIndex.load(layout.dataset(dataset))
    split = index.split("train")
    orders: list[Array] = [
        split.first + EpochOrder(split.samples, SEED, epoch).positions(0, split.samples) for epoch in range(epochs)
    ]
    columns = columns_of(layout, index)
    us = gather_us(columns, orders, batch_size=batch_size)
    for _ in sys.stdin:
        trainer = Trainer(index.schema.columns, seed=SEED)
        measured = run(batches(columns, orders, batch_size=batch_size), trainer.step, warm_up=warm_up)
        print(json.dumps({**asdict(measured), "gather_us": us}), flush=True)


if __name__ == "__main__":
    main()
