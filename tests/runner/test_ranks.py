"""Ranks in processes of their own read, together, the global batches that one process reads; told by hash."""

from __future__ import annotations

import hashlib
import json
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


def main() -> None:
    """A rank, which writes its part of every batch into a file.

    Its arguments: root, rank, world size, that file, how many batches (-1: all that are left), and a file with the
    state to go on from, if it is there, which the state at the end goes into.
    """
    root, out, state = Path(sys.argv[1]), Path(sys.argv[4]), Path(sys.argv[6])
    stream = stream_of(root, rank=int(sys.argv[2]), world_size=int(sys.argv[3]))
    if state.exists():
        stream.load_state_dict(json.loads(state.read_text()))
    parts = []
    for part in batches_of(stream):
        parts.append(part.hex())
        if len(parts) == int(sys.argv[5]):
            break
    state.write_text(json.dumps(stream.state_dict()))
    out.write_text(json.dumps({"pid": os.getpid(), "parts": parts}))


def run_ranks(root: Path, *, world_size: int, count: int, states: list[Path]) -> list[list[bytes]]:
    """The parts that each rank makes, in processes that run side by side."""
    outs = [root / f"rank-{rank}.json" for rank in range(world_size)]
    arguments = [
        (str(rank), str(world_size), str(outs[rank]), str(count), str(states[rank])) for rank in range(world_size)
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [subprocess.Popen([sys.executable, __file__, str(root), *one], env=env) for one in arguments]
    assert [rank.wait() for rank in ranks] == [0] * world_size
    told: list[dict[str, Any]] = [json.loads(out.read_text()) for out in outs]
    assert len({os.getpid(), *(one["pid"] for one in told)}) == world_size + 1
    return [[bytes.fromhex(part) for part in one["parts"]] for one in told]


def hashes(ranks: list[list[bytes]]) -> list[str]:
    """Of every global batch, from the parts of all ranks."""
    return [hashlib.sha256(b"".join(parts)).hexdigest() for parts in zip(*ranks, strict=True)]


@pytest.mark.timeout(60)  # five processes import torch
def test_two_processes_read_the_global_batches_of_one_and_three_go_on_where_they_stopped(tmp_path: Path) -> None:
    small_datasets.write(Layout(tmp_path), 130, num_shards=5, test=7)
    expected = hashes([list(batches_of(stream_of(tmp_path, rank=0, world_size=1)))])
    assert len(set(expected)) == len(expected) == EPOCHS * 6
    states = [tmp_path / f"state-{rank}.json" for rank in range(3)]
    before = run_ranks(tmp_path, world_size=2, count=4, states=states)
    for state in states[1:]:  # the position is that of the global batches, so one rank's is every rank's
        state.write_bytes(states[0].read_bytes())
    after = run_ranks(tmp_path, world_size=3, count=-1, states=states)
    assert hashes(before) + hashes(after) == expected


if __name__ == "__main__":
    main()
