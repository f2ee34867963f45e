"""The writer: the process that writes a trainer's checkpoints down, and commits them, while the trainer goes on.

It is forked from the pre-warmed process beside its trainer, and shares an arena with it: the trainer copies its state
into the arena and goes on, the writer writes the copy. An order may come before the copy is whole; `copied` says what
is there. It speaks to the runner by itself, so that a checkpoint is finished even if the trainer is dead by then. It
ends when the trainer's socket closes and nothing is left to write; if the runner's closes, at once. It touches no bus.
In: plan, deadline, committed, refused; of the trainer make_arena, write, copied.
Out: events, commit; to the trainer arena_made, no_arena, durable, not_written.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.arena import Arena, make_arena
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.checkpointing.writing import Writing
from railbus_runner.endings import CommitRefused, RunnerGone
from railbus_runner.failures import error_body
from railbus_runner.frames import (
    ArenaMade,
    Copied,
    Durable,
    Frame,
    FrameBuffer,
    MakeArena,
    NoArena,
    NotWritten,
    Plan,
    Write,
    pack,
)
from railbus_runner.recorder import Recorder
from railbus_shared import logs
from railbus_shared.errors import BadMessage, NotSupported, RailbusError, TrainerLost
from railbus_shared.layout import Layout

EXIT_OK: Final = 0
EXIT_RUNNER_GONE: Final = 3
_READ_BYTES: Final = 1 << 18
_LOWEST_PRIORITY: Final = 19


def main(runner: socket.socket, trainer: socket.socket) -> int:
    """Serve one trainer; takes over both sockets, and gives the exit code."""
    logs.configure("runner.writer")
    channel = TrainerChannel(runner)
    try:
        plan = channel.plan()
        recorder = Recorder.of_plan(plan, channel.send, offer=channel.offer, source="writer")
        Writer(plan, channel=channel, recorder=recorder, trainer=trainer).run()
    except RunnerGone:
        return EXIT_RUNNER_GONE
    return EXIT_OK


class Writer:
    """Of one trainer, from its plan to the end of one of them."""

    def __init__(self, plan: Plan, *, channel: TrainerChannel, recorder: Recorder, trainer: socket.socket) -> None:
        store = CheckpointStore(Layout(Path(plan.root)), plan.spec.model, job=plan.job, lease_epoch=plan.lease_epoch)
        self._channel = channel
        self._trainer = trainer
        self._writing = Writing(plan, mode="async", store=store, channel=channel, recorder=recorder)
        self._buffer = FrameBuffer()
        self._arena: Arena | None = None
        self._is_over = False
        self._frames: deque[Frame] = deque()
        self._stall_s = 0.0
        self._ready = select.poll()
        self._ready.register(channel, select.POLLIN)
        self._ready.register(trainer, select.POLLIN)

    def run(self) -> None:
        """Obey the trainer until it is gone; raises RunnerGone."""
        try:
            while (frame := self._next_frame()) is not None:
                match frame:
                    case MakeArena():
                        self._make_arena(frame.nbytes)
                    case Write():
                        self._write(frame)
                    case Copied():
                        pass  # of an order that has failed by now
                    case _:
                        raise BadMessage(f"a writer takes no {frame.f!r} frame")
        finally:
            self._is_over = True

    def _next_frame(self) -> Frame | None:
        """What the trainer says next, heeding the runner meanwhile; None once it is over. Raises RunnerGone."""
        while not self._frames and not self._is_over:
            found = {descriptor for descriptor, _ in self._ready.poll()}
            if self._channel.fileno() in found:
                self._channel.poll()
            if self._trainer.fileno() in found:
                self._receive()
        return self._frames.popleft() if self._frames else None

    def _receive(self) -> None:
        try:
            data = self._trainer.recv(_READ_BYTES)
        except ConnectionResetError:
            data = b""
        self._is_over = self._is_over or not data
        self._frames += self._buffer.feed(data)

    def _make_arena(self, nbytes: int) -> None:
        """Beside the loop, for it may take seconds for each GB, and this process must hear when it is to end."""
        if self._arena is not None:
            self._arena.close()
        self._arena = None
        threading.Thread(target=self._made, args=(nbytes,), name="railbus-arena", daemon=True).start()

    def _made(self, nbytes: int) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # of this thread alone
        try:
            self._arena = make_arena(nbytes, is_wanted=lambda: not self._is_over)
        except NotSupported as exc:
            self._answer(NoArena(why=exc.message))
            return
        if self._arena is not None:
            self._answer(ArenaMade(nbytes=nbytes), descriptor=self._arena.descriptor)

    def _write(self, order: Write) -> None:
        if self._arena is None:
            raise BadMessage("a trainer that has no arena ordered a checkpoint")
        try:
            meta = self._writing.write(self._copied(self._arena, order), order, stall=lambda: self._stall_s)
        except CommitRefused as exc:
            self._answer(NotWritten(step=order.step, error=error_body(exc.error), is_refused=True))
            self._is_over = True
        except (RailbusError, OSError) as exc:
            self._answer(NotWritten(step=order.step, error=error_body(exc)))
        else:
            seconds = time.monotonic() - order.began_s
            self._answer(Durable(number=meta.number, step=meta.step, nbytes=order.nbytes, seconds=seconds))

    def _copied(self, arena: Arena, order: Write) -> Iterator[memoryview]:
        """The bytes of the file as the trainer copies them; raises TrainerLost if it is gone before all are there."""
        done = 0
        while done < order.nbytes:
            frame = self._next_frame()
            if frame is None:
                raise TrainerLost(f"the trainer was gone with {done} of {order.nbytes} bytes copied")
            if not isinstance(frame, Copied) or not done < frame.nbytes <= order.nbytes:
                raise BadMessage(f"a writer that waits for a copy takes no {frame.f!r} frame")
            yield memoryview(arena.memory)[done : frame.nbytes]
            done, self._stall_s = frame.nbytes, frame.stall_s

    def _answer(self, frame: Frame, *, descriptor: int | None = None) -> None:
        """To a trainer that may be gone: then nobody needs to know."""
        try:
            if descriptor is None:
                self._trainer.sendall(pack(frame))
            else:
                socket.send_fds(self._trainer, [pack(frame)], [descriptor])
        except (BrokenPipeError, ConnectionResetError):
            self._is_over = True
