"""A real dataset on disk, the plan of a job on it, and the runner's end of a trainer for tests."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from railbus_runner.frames import (
    Ahead,
    Commit,
    Committed,
    Deadline,
    Ended,
    Events,
    Exited,
    Fork,
    Forked,
    Frame,
    FrameBuffer,
    OpenWriter,
    Plan,
    Ready,
    Recorded,
    Verified,
    Verify,
    WriterLost,
    WriterOpened,
    pack,
)
from railbus_runner.warm import DEFAULT_TARGET
from railbus_shared import clock, files
from railbus_shared.contracts.artifacts import CheckpointMeta, Column, DatasetSchema, IndexFile, Split
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import CheckpointRef, JobSpec
from railbus_shared.contracts.model import JsonMap
from railbus_shared.contracts.requests import OpenedStream
from railbus_shared.data import writer
from railbus_shared.layout import Layout
from railbus_shared.telemetry import LearningTelemetry

Array = np.ndarray[Any, np.dtype[Any]]
A = TypeVar("A", Ready, Forked, Exited)


def write_dataset(
    root: Path, columns: Mapping[str, Array], *, described: Mapping[str, Column], splits: Mapping[str, int]
) -> None:
    """Dataset `d` in two shards or so, its splits one after the other."""
    first, ranges = 0, {}
    for name, samples in splits.items():
        ranges[name] = Split(first=first, samples=samples)
        first += samples
    schema = DatasetSchema(name="d", columns=dict(described), splits=ranges)
    size = sum(values.nbytes for values in columns.values())
    writer.write_dataset(Layout(root), schema, [columns], shard_bytes=size // 2 + 1)


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def plan(
    root: Path,
    entrypoint: str,
    *,
    params: Mapping[str, object] | None = None,
    job: str = "j-1",
    model: str = "m",
    attempt: int = 1,
    code: Path | None = None,
    recorded: CheckpointRef | None = None,
    deadline_s: float = 3600.0,
    **spec: object,
) -> Plan:
    """Of one attempt on dataset `d`; `spec` are more fields of the job's spec."""
    layout = Layout(root)
    index = IndexFile.parse(json.loads(layout.index("d").read_bytes()))
    return Plan(
        job=job,
        spec=JobSpec.parse(
            {"model": model, "dataset": "d", "entrypoint": entrypoint, "params": dict(params or {}), "seed": 7, **spec}
        ),
        attempt=attempt,
        lease_epoch=attempt,
        host="h",
        producer=f"trainer-{attempt}",
        root=str(root),
        devices=(DeviceInfo(id="h-cpu0", host="h", kind="cpu", name="cpu", index=0, cores=(), memory_bytes=1 << 30),),
        stream=OpenedStream(
            stream="s-1",
            dataset="d",
            schema_path=str(layout.schema("d")),
            index_path=str(layout.index("d")),
            index_sha256=files.sha256_file(layout.index("d")),
            num_shards=len(index.shards),
            shards_path=str(layout.shards("d")),
        ),
        entrypoint_dirs=(str(code),) if code is not None else (),
        checkpoint=recorded,
        deadline_boottime_s=clock.boottime_s() + deadline_s,
        trace=TRACE,
    )


class WarmHost:
    """The real pre-warmed process, from which trainers are forked."""

    def __init__(self, *, target: str = DEFAULT_TARGET, env: Mapping[str, str] | None = None) -> None:
        self._sock, theirs = socket.socketpair()
        fd = theirs.fileno()
        command = [sys.executable, "-W", "error", "-P", "-m", "railbus_runner.warm", str(fd), target]
        waits = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin are slow where tests run side by side
        env = {**os.environ, **waits, **(env or {})}
        self._process = subprocess.Popen(command, pass_fds=(fd,), stdin=subprocess.DEVNULL, env=env)
        theirs.close()
        self._buffer = FrameBuffer()
        self._frames: list[Frame] = []
        self._forks = 0
        self._wait_for(Ready, "")

    def fork(self) -> tuple[int, str, socket.socket]:
        """Pid and attempt of a new trainer, and the runner's end of its socket."""
        ours, theirs = socket.socketpair()
        self._forks += 1
        attempt = f"test.{self._forks}"
        socket.send_fds(self._sock, [pack(Fork(attempt=attempt))], [theirs.fileno(), 2, 2, 2])
        theirs.close()
        return self._wait_for(Forked, attempt).pid, attempt, ours

    def fork_writer(self, attempt: str) -> tuple[int, socket.socket, socket.socket]:
        """Pid of a new writer, the runner's end of its socket, and the trainer's end of the socket to it."""
        (ours, theirs), (trainers, writers) = socket.socketpair(), socket.socketpair()
        fork = Fork(attempt=attempt, role="writer")
        with theirs, writers:
            socket.send_fds(self._sock, [pack(fork)], [theirs.fileno(), 2, 2, writers.fileno()])
        return self._wait_for(Forked, fork.process).pid, ours, trainers

    def exit_code(self, process: str) -> int:
        """Of a trainer or writer, once it has ended."""
        return self._wait_for(Exited, process).status

    def close(self) -> None:
        self._sock.close()
        self._process.wait()

    def _wait_for(self, kind: type[A], process: str) -> A:
        while True:
            for frame in self._frames:
                if isinstance(frame, kind) and (isinstance(frame, Ready) or frame.process == process):
                    self._frames.remove(frame)
                    return frame
            self._frames += self._buffer.feed(self._sock.recv(1 << 16))


class RunnerEnd:
    """A real trainer, its writer if it asks for one, and a runner of a few lines that answers both.

    Attributes:
        events: everything that they have recorded.
        ahead: what the trainer has said of the shards that it reads next.
        frames: everything else that they have sent.
        pid: of the trainer.
        exit_code: of the trainer, once it has ended.
        writers: pids of the writers that there were.
        committed: what the job record would name by the answers given.
    """

    def __init__(
        self,
        warm: WarmHost,
        plan: Plan,
        *,
        on_frame: Callable[[RunnerEnd, Frame], Sequence[Frame] | None] | None = None,
    ) -> None:
        self.events: list[JsonMap] = []
        self._telemetry = LearningTelemetry("runner", host="h")
        self.ahead: list[Ahead] = []
        self.frames: list[Frame] = []
        self.exit_code: int | None = None
        self.writers: list[int] = []
        self.committed: CheckpointRef | None = None
        self._warm = warm
        self._plan = plan
        self._on_frame = on_frame
        self._buffers: dict[socket.socket, FrameBuffer] = {}
        self._selector = selectors.DefaultSelector()
        self._writer: socket.socket | None = None
        self._to_writer: socket.socket | None = None
        self._is_asked = False  # what was committed, by a trainer whose writer has not ended yet
        self.pid, self._attempt, self._sock = warm.fork()
        self._listen(self._sock)
        self.send(plan)

    def send(self, *frames: Frame) -> None:
        if frames:
            self._sock.sendall(b"".join(map(pack, frames)))

    def send_writer(self, *frames: Frame) -> None:
        if frames and self._writer is not None:
            self._writer.sendall(b"".join(map(pack, frames)))

    def run(self) -> int:
        """Serve the trainer to its end, and its writer to its own; gives the trainer's exit code."""
        while self._buffers:
            for key, _ in self._selector.select():
                self._read(cast("socket.socket", key.fileobj))
        self._selector.close()
        return self.exit_code if self.exit_code is not None else 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def open_writer(self) -> None:
        """What a runner does that is asked for a writer."""
        pid, self._writer, self._to_writer = self._warm.fork_writer(self._attempt)
        self.writers.append(pid)
        self._listen(self._writer)
        self.send_writer(self._plan.changed(producer=f"writer-{pid}"))
        socket.send_fds(self._sock, [pack(WriterOpened())], [self._to_writer.fileno()])

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def hang_up(self) -> None:
        """As if the runner had died."""
        self._sock.shutdown(socket.SHUT_RDWR)

    def is_silent(self) -> bool:
        """Whether the trainer has sent nothing since it was last read."""
        return not select.select([self._sock], [], [], 0)[0]

    def is_writer_silent(self) -> bool:
        """Whether the writer has sent nothing since it was last read."""
        return self._writer is not None and not select.select([self._writer], [], [], 0)[0]

    @property
    def ended(self) -> Ended:
        (ended,) = [frame for frame in self.frames if isinstance(frame, Ended)]
        return ended

    def of_type(self, kind: str) -> list[JsonMap]:
        return [event for event in self.events if event["type"] == kind]

    def curve(self, name: str) -> list[Any]:
        """Values of a metric in the order told."""
        told = [event["data"] for event in self.of_type("train.metrics")]
        return [data[name] for data in told if isinstance(data, dict) and name in data]

    @property
    def recorded(self) -> CheckpointRef:
        """What the job record would name now."""
        meta = [frame for frame in self.frames if isinstance(frame, Commit)][-1].meta
        return CheckpointRef(number=meta.number, step=meta.step, sha256=meta.files[0].sha256)

    def _listen(self, sock: socket.socket) -> None:
        self._buffers[sock] = FrameBuffer()
        self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        for frame in self._buffers[sock].feed(data):
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it has ended meanwhile
                self._take(sock, frame)
        if not data:
            self._ended(sock)

    def _ended(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._buffers[sock]
        sock.close()
        if sock is self._sock:
            self.exit_code = self._warm.exit_code(self._attempt)
            if self._writer is not None and self._to_writer is not None:
                self._to_writer.shutdown(socket.SHUT_RDWR)
            return
        self._warm.exit_code(f"{self._attempt}/writer")
        if self._to_writer is not None:
            self._to_writer.close()
        self._writer = self._to_writer = None
        if self._is_asked and self._sock in self._buffers:
            self.send(Recorded(checkpoint=self.committed))

    def _take(self, sock: socket.socket, frame: Frame) -> None:
        if isinstance(frame, Events):
            self.events += self._telemetry._numbered(list(frame.events))
        elif isinstance(frame, Ahead):
            self.ahead.append(frame)
        else:
            self.frames.append(frame)
        answers = self._on_frame(self, frame) if self._on_frame is not None else None
        if answers is None and isinstance(frame, OpenWriter):
            self.open_writer()
        elif answers is None and isinstance(frame, WriterLost):
            self._is_asked = self._writer is not None
            answers = () if self._is_asked else (Recorded(checkpoint=self.committed),)
        answers = answers if answers is not None else usual(frame)
        for answer in answers:
            if isinstance(answer, Committed):
                self.committed = self.recorded
            sock.sendall(pack(answer))


class Renewal:
    """Renews the lease of a trainer and its writer, as a runner does, until a test lets it lapse."""

    LIVES_S = 2.0

    def __init__(self, end: RunnerEnd) -> None:
        self._end = end
        self._deadline_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def lapse(self) -> None:
        """Renew no more, and return once the last deadline has passed."""
        self._over.set()
        self._thread.join()
        time.sleep(max(0.0, self._deadline_s - clock.boottime_s()))

    def _renew(self) -> None:
        while not self._over.wait(0.1):
            self._deadline_s = clock.boottime_s() + self.LIVES_S
            with contextlib.suppress(OSError):  # it has ended, which its test finds out
                self._end.send(Deadline(boottime_s=self._deadline_s))
                self._end.send_writer(Deadline(boottime_s=self._deadline_s))


def usual(frame: Frame) -> Sequence[Frame]:
    """What a runner answers when all is well."""
    match frame:
        case Verify():
            return [Verified(shards=frame.shards)]
        case Commit():
            return [Committed(number=frame.meta.number)]
        case _:
            return []


def metas(root: Path) -> list[CheckpointMeta]:
    """Of all checkpoints of model `m`, oldest first."""
    folder = Layout(root).checkpoints("m")
    return [CheckpointMeta.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("*.meta.json"))]


def final_bits(root: Path) -> bytes:
    """All that the newest checkpoint holds of parts, extras and generators, tensors as bytes."""
    state = torch.load(Layout(root).checkpoints("m") / metas(root)[-1].files[0].file, weights_only=True)
    found: list[bytes] = []

    def walk(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value.numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)
        else:
            found.append(repr(value).encode())

    walk([state["parts"], state["extras"], state["rng"]])
    return b"|".join(found)
