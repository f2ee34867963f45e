"""railbus as one of the loaders of `benchmarks.data`, and the limit that no loader can pass.

    python -m benchmarks.our_loader railbus|limit KIND ORDER FOLDER
    python -m benchmarks.our_loader index FOLDER          what opening and resuming a large index costs
    python -m benchmarks.our_loader memory KIND FOLDER    what a trainer holds beyond torch and the maps

The limit is one `np.take` a batch (one copy a sample for images) between populated maps and one page-aligned buffer
that is used again and again: no order, no tensors, nothing to hold.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.peers.loader import serve

BATCH: Final = 32
SEED: Final = 7
_HELD: Final = 2000
"""Batches that go by while memory is watched."""

Epoch = Callable[[], Iterator[int]]


def railbus(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """A stream over a dataset in the canonical layout, as in a notebook; a shard is verified before its first use."""
    from railbus import open_dataset

    stream = open_dataset(folder / "learning" / "datasets" / kind).stream(
        "train", batch_size=BATCH, shuffle=is_shuffled, seed=SEED, drop_last=True
    )
    column = "tokens" if kind == "tokens" else "label"
    return lambda: (len(batch[column]) for batch in stream)


def limit(folder: Path, kind: str, *, is_shuffled: bool) -> Epoch:
    """Copies between memory that is mapped already, and nothing else."""
    from railbus_shared.data.readers import page_aligned_empty

    values: Any = np.load(folder / f"{kind}.npy", mmap_mode="r").view(np.ndarray)
    offsets = np.load(folder / "offsets.npy") if kind == "images" else np.arange(len(values) + 1)
    samples = len(offsets) - 1
    order = np.random.default_rng(SEED).permutation(samples) if is_shuffled else np.arange(samples)
    batches = [order[start : start + BATCH] for start in range(0, samples - BATCH + 1, BATCH)]
    values.max()  # maps every page
    if kind == "tokens":
        out = page_aligned_empty((BATCH, values.shape[1]), values.dtype)
        return lambda: (len(values.take(rows, axis=0, out=out, mode="clip")) for rows in batches)
    starts, ends = offsets[:-1], offsets[1:]
    longest = max(int((ends[rows] - starts[rows]).sum()) for rows in batches)
    buffer = page_aligned_empty((longest,), values.dtype)

    def images() -> Iterator[int]:
        for rows in batches:
            size = int((ends[rows] - starts[rows]).sum())
            pieces = [values[a:b] for a, b in zip(starts[rows].tolist(), ends[rows].tolist(), strict=True)]
            np.concatenate(pieces, out=buffer[:size])
            yield len(rows)

    return images


def index(folder: Path) -> None:
    """Open a dataset of ten million samples in a thousand shards and go to its middle."""
    from railbus import open_dataset

    before_bytes, began = _anonymous_bytes(), time.perf_counter()
    stream = open_dataset(folder / "learning" / "datasets" / "large").stream("train", batch_size=BATCH, seed=SEED)
    state = {**stream.state_dict(), "epoch": 3, "batches_done": stream.num_batches // 2}
    opened_s = time.perf_counter() - began
    began = time.perf_counter()
    stream.load_state_dict(state)
    resumed_s = time.perf_counter() - began
    told = {"open_s": opened_s, "resume_s": resumed_s, "bytes": _anonymous_bytes() - before_bytes}
    print(json.dumps(told), flush=True)


def memory(kind: str, folder: Path) -> None:
    """Bytes that are neither torch nor maps, in batches, for a consumer that holds one batch at a time."""
    from railbus import open_dataset

    stream = open_dataset(folder / "learning" / "datasets" / kind).stream("train", batch_size=1024, seed=SEED)
    before_bytes, largest, size = _anonymous_bytes(), 0, 0
    for _, batch in zip(range(_HELD), stream, strict=False):
        largest = max(largest, _anonymous_bytes() - before_bytes)
        size = max(size, sum(_bytes_of(column) for column in batch.values()))
    print(json.dumps({"bytes": largest, "batch_bytes": size}), flush=True)


def _bytes_of(column: Any) -> int:
    return column.nbytes if isinstance(column, torch.Tensor) else column.values.nbytes + column.offsets.nbytes


def _anonymous_bytes() -> int:
    """Resident memory that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon in /proc/self/status")


def main() -> None:
    name, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if name == "index":
        index(Path(arguments[0]))
    elif name == "memory":
        memory(arguments[0], Path(arguments[1]))
    else:
        kind, order, folder = arguments
        began = time.perf_counter()
        make = {"railbus": railbus, "limit": limit}[name]
        serve(make(Path(folder), kind, is_shuffled=order == "shuffled"), began=began)


if __name__ == "__main__":
    main()
