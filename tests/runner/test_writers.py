"""The writer of checkpoints as its runner sees it, forked from the real pre-warmed process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from railbus_runner import processes, writers
from railbus_runner.checkpointing.disk import BLOCK_BYTES
from railbus_runner.claim import Claim
from railbus_runner.commits import Commits
from railbus_runner.descriptors import receive
from railbus_runner.frames import (
    ArenaMade,
    Copied,
    Fork,
    Frame,
    FrameBuffer,
    MakeArena,
    Recorded,
    Write,
    WriterOpened,
    pack,
)
from railbus_runner.link import TrainerLink
from railbus_runner.processes import ProcessId
from railbus_runner.reaping import AttemptLedger, attempt_name
from railbus_runner.saving import SaveRequests
from railbus_runner.warm_process import WarmProcess
from railbus_runner.writers import Writers
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.artifacts import Column
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.records import JobRecords
from railbus_shared.telemetry import LearningTelemetry
from railbus_shared.waiting import end
from records_for_tests import record
from trainers import plan, write_dataset
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(90)  # the pre-warmed process imports torch


class Given:
    """An attempt without a trainer: the test holds the trainer's end of its sockets."""

    def __init__(self, ref: AttemptRef, root: Path, bus: Bus, warm: WarmProcess) -> None:
        self.ref = ref
        self.link = TrainerLink()
        self.ledger = AttemptLedger(root / "attempts")
        telemetry = LearningTelemetry("runner", host="h")
        claim = Claim(ref, record("running"), records=JobRecords(Bucket(bus, bus.subjects.jobs)), telemetry=telemetry)
        commits = Commits(claim, SaveRequests("j-1", self.link.send), refused=lambda: None)
        self.writers = Writers(self.link, commits, ref=ref, warm=warm, ledger=self.ledger, forward=lambda _frame: None)
        self.stand_in = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
        self.trainer = ProcessId(self.stand_in.pid, processes.start_ticks(self.stand_in.pid) or 0)
        self.ledger.add(ref, pid=self.stand_in.pid, group=None)

    async def opened(self) -> tuple[ProcessId, socket.socket]:
        """The writer, and the trainer's socket to it."""
        self.writers.open()
        data, descriptors = await asyncio.to_thread(receive, self.link.theirs, 1 << 16, max_descriptors=1)
        assert FrameBuffer().feed(data) == [WriterOpened()]
        state = next(state for state in self.ledger.states() if state.ref == self.ref)
        assert state.writer is not None
        return state.writer, socket.socket(fileno=descriptors[0])

    async def told(self) -> list[Frame]:
        return FrameBuffer().feed(await asyncio.to_thread(self.link.theirs.recv, 1 << 16))

    def close(self) -> None:
        self.link.close()
        self.stand_in.kill()
        self.stand_in.wait()


@contextlib.asynccontextmanager
async def warmed() -> AsyncIterator[WarmProcess]:
    warm = WarmProcess(env=dict(os.environ))
    running = asyncio.create_task(warm.run())
    await warm.wait_ready(PATIENCE_S)
    yield warm
    await warm.close()
    await running


@contextlib.asynccontextmanager
async def attempt(root: Path, bus: Bus, warm: WarmProcess, *, lease_epoch: int) -> AsyncIterator[Given]:
    ref = AttemptRef(job="j-1", lease_epoch=lease_epoch)
    with contextlib.closing(Given(ref, root, bus, warm)) as given:
        fork = Fork(attempt=attempt_name(ref))
        serving = asyncio.create_task(given.writers.run(fork, plan(root, "classifier", attempt=lease_epoch)))
        yield given
        await end(serving)


def is_gone(process: ProcessId) -> bool:
    info = processes.process_info(process.pid)
    return info is None or info.id != process


def lose_half_a_copy(to_writer: socket.socket, folder: Path) -> None:
    """Order a checkpoint of two blocks, copy the first, and be gone once that is being written."""
    with to_writer:
        to_writer.sendall(pack(MakeArena(nbytes=2 * BLOCK_BYTES)))
        data, descriptors = receive(to_writer, 1 << 16, max_descriptors=1)
        assert isinstance(FrameBuffer().feed(data)[0], ArenaMade)
        os.close(descriptors[0])
        to_writer.sendall(pack(Write(nbytes=2 * BLOCK_BYTES, step=1, fields={}, began_s=0.0, waited_s=0.0)))
        to_writer.sendall(pack(Copied(nbytes=BLOCK_BYTES, stall_s=0.1)))
        until_s = time.monotonic() + PATIENCE_S
        while not list(folder.glob(".checkpoint-*.tmp")):
            assert time.monotonic() < until_s
            time.sleep(0.005)


async def test_a_writer_can_be_had_again_ends_with_its_trainer_or_is_ended_and_is_no_leak(
    tmp_path: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"x": np.zeros((4, 1), dtype=np.float32)}
    write_dataset(tmp_path, columns, described={"x": Column(dtype="float32", shape=(1,))}, splits={"train": 4})
    async with warmed() as warm:
        async with attempt(tmp_path, bus, warm, lease_epoch=1) as given:
            first, to_first = await given.opened()
            os.kill(first.pid, signal.SIGKILL)
            await given.writers.tell_recorded()
            assert await given.told() == [Recorded(checkpoint=None)]
            second, to_second = await given.opened()
            assert second != first
            await given.writers.finish(given.trainer)  # it has nothing to do, though somebody holds its socket open
            await until(lambda: is_gone(second))
            assert given.stand_in.wait() == -signal.SIGKILL
            to_first.close()
            to_second.close()
        monkeypatch.setattr(writers, "WRITER_GRACE_S", 0.2)
        async with attempt(tmp_path, bus, warm, lease_epoch=2) as given:
            writer, to_writer = await given.opened()
            os.kill(writer.pid, signal.SIGSTOP)
            await given.writers.finish(given.trainer)
            assert not is_gone(writer)
            report = await asyncio.to_thread(given.ledger.reap, given.ref, deadline_s=10)
            assert (report.stuck, report.leaked) == ((), ())
            assert is_gone(writer)
            to_writer.close()
        async with attempt(tmp_path, bus, warm, lease_epoch=3) as given:
            writer, to_writer = await given.opened()
            await asyncio.to_thread(lose_half_a_copy, to_writer, drafts := tmp_path / "models/m/checkpoints")
            await given.writers.finish(given.trainer)
            await until(lambda: is_gone(writer))
            assert [path for path in drafts.iterdir() if "serial" not in path.name] == []
