"""Ranks in processes of their own read, together, the global batches that one process reads; told by hash."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_datasets
from railbus_runner.stream import ShardStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.layout import Layout

BATCH_SIZE = 24
EPOCHS = 2


def stream_of(root: Path, *, rank: int, world_size: int) -> ShardStream:
    layout = Layout(root)
    index = DatasetIndex.load(layout.dataset("d"))
    paths = {number: layout.shards("d") / shard.file for number, shard in enumerate(index.file.shards)}
    return ShardStream(
        index,
        paths,
        split="train",
        batch_size=BATCH_SIZE,
        seed=11,
        rank=rank,
        world_size=world_size,
        ensure_verified=lambda _: None,
    )


def batches_of(stream: ShardStream) -> Iterator[bytes]:
    """The bytes of every batch, sample by sample, so that parts side by side are the whole."""
    for _ in stream.epochs(EPOCHS):
        for batch in stream:
            rows = zip(*(batch[name] for name in sorted(batch)), strict=True)
            yield b"".join(value.numpy().tobytes() for row in rows for value in row)


def rank_main(root: Path, rank: int, world_size: int, count: int) -> None:
    """Writes the rank's part of every batch into a file, and goes on from the state in another, if it is there.

    `count` is how many batches (-1: all that are left). The state at the end goes into the file of the state.
    """
    state = state_path(root, rank)
    stream = stream_of(root, rank=rank, world_size=world_size)
    if state.exists():
        stream.load_state_dict(json.loads(state.read_text()))
    parts = []
    for part in batches_of(stream):
        parts.append(part.hex())
        if len(parts) == count:
            break
    state.write_text(json.dumps(stream.state_dict()))
    out_path(root, rank).write_text(json.dumps({"pid": os.getpid(), "parts": parts}))


def main() -> None:
    """Runs the ranks side by side, in forks, for to import torch in each takes seconds; exits with 0 if all did.

    Its arguments: root, world size, how many batches.
    """
    root, world_size, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(root, rank, world_size, count)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode != 0 for rank in ranks))


def state_path(root: Path, rank: int) -> Path:
    return root / f"state-{rank}.json"


def out_path(root: Path, rank: int) -> Path:
    return root / f"rank-{rank}.json"


def run_ranks(root: Path, *, world_size: int, count: int) -> list[list[bytes]]:
    """The parts that each rank makes, in processes that run side by side."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__, str(root), str(world_size), str(count)], env=env, check=False)
    assert done.returncode == 0
    told: list[dict[str, Any]] = [json.loads(out_path(root, rank).read_text()) for rank in range(world_size)]
    assert len({os.getpid(), *(one["pid"] for one in told)}) == world_size + 1
    return [[bytes.fromhex(part) for part in one["parts"]] for one in told]


def hashes(ranks: list[list[bytes]]) -> list[str]:
    """Of every global batch, from the parts of all ranks."""
    return [hashlib.sha256(b"".join(parts)).hexdigest() for parts in zip(*ranks, strict=True)]


@pytest.mark.timeout(120)  # two processes import torch, on a busy machine
def test_two_processes_read_the_global_batches_of_one_and_three_go_on_where_they_stopped(tmp_path: Path) -> None:
    small_datasets.write(Layout(tmp_path), 130, num_shards=5, test=7)
    expected = hashes([list(batches_of(stream_of(tmp_path, rank=0, world_size=1)))])
    assert len(set(expected)) == len(expected) == EPOCHS * 6
    before = run_ranks(tmp_path, world_size=2, count=4)
    for rank in (1, 2):  # the position is that of the global batches, so one rank's is every rank's
        state_path(tmp_path, rank).write_bytes(state_path(tmp_path, 0).read_bytes())
    after = run_ranks(tmp_path, world_size=3, count=-1)
    assert hashes(before) + hashes(after) == expected


if __name__ == "__main__":
    main()
