"""The trainer's end of its socket pair: progress out, orders in; no thread.

What the runner orders is remembered in attributes and obeyed where the trainer asks. A closed socket means that the
runner died, and raises RunnerGone wherever it is noticed. A writer has such a channel to the runner as well.
In: plan, deadline, stop, save, verified, committed, refused, writer_opened, writer_refused, recorded.
Out: events, verify, commit, open_writer, awaits_writer, writer_lost, ended.
"""

from __future__ import annotations

import select
import socket
import threading
from typing import Final, TypeVar

from railbus_runner.descriptors import receive, unread_bytes
from railbus_runner.endings import RunnerGone
from railbus_runner.frames import (
    LENGTH,
    Committed,
    Deadline,
    Frame,
    FrameBuffer,
    OpenWriter,
    Plan,
    Recorded,
    Refused,
    Save,
    Stop,
    Verified,
    WriterOpened,
    WriterRefused,
    pack,
)
from railbus_shared import clock
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.errors import BadMessage, TrainerLost

A = TypeVar("A", bound=Plan | Verified | Committed | Refused | Recorded)

_READ_BYTES: Final = 1 << 18
_DROPPED: Final = "could not be received: this process has too many open files"
_SIGNAL_S: Final = 1.0
"""How soon a stop that comes as a signal is noticed by whoever waits for a frame; a signal alone ends no `select`."""


class TrainerChannel:
    """Frames to and from the runner; takes over the socket, which must be blocking.

    `send` and `offer` may be called from any thread, everything else from the main thread alone.

    Attributes:
        deadline_boottime_s: on CLOCK_BOOTTIME; past it the trainer must neither step nor commit.
        stop: the order to end, once it has come.
        save_requested: whether a checkpoint was asked for; whoever writes one clears it.
        save_number: of the last order for one that somebody waits for.
        writer: the socket to a writer that was asked for, once it has come; whoever takes it clears it.
        writer_refused: why no writer can be had, once that has come.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.deadline_boottime_s = 0.0
        self.stop: Stop | None = None
        self.save_requested = False
        self.save_number = 0
        self.writer: socket.socket | None = None
        self.writer_refused: ErrorBody | None = None
        self._sock = sock
        self._expects_writer = False
        self._descriptors: list[int] = []
        self._buffer = FrameBuffer()
        self._answers: list[Frame] = []
        self._sending = threading.Lock()
        self._unsent = memoryview(b"")
        """What is left of a frame that was offered, and must go before any other."""
        self._offer_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2

    def plan(self) -> Plan:
        """Wait for the first frame, and take nothing that comes after it: the socket may go to somebody else then."""
        while not any(isinstance(frame, Plan) for frame in self._answers):
            header = self._exactly(LENGTH.size)
            for frame in self._buffer.feed(header + self._exactly(*LENGTH.unpack(header))):
                self._take(frame)
        plan = self._wait_for(Plan)
        self.deadline_boottime_s = max(self.deadline_boottime_s, plan.deadline_boottime_s)
        return plan

    def send(self, frame: Frame) -> None:
        """Send a frame whole; waits while the runner does not read. Raises RunnerGone."""
        data = pack(frame)
        try:
            with self._sending:
                left, self._unsent = self._unsent, memoryview(b"")
                self._sock.sendall(bytes(left) + data if left else data)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise RunnerGone("the runner has closed the socket") from exc

    def offer(self, frame: Frame) -> bool:
        """Send a frame if that takes no waiting; False if the runner is behind. Raises RunnerGone.

        What is offered fills half of the socket's buffer at most, so that a runner that stands still for a while does
        not hold up the frames that must be sent.
        """
        if not self._sending.acquire(blocking=False):
            return False
        try:
            if not self._push() or unread_bytes(self._sock) > self._offer_bytes:
                return False
            self._unsent = memoryview(pack(frame))
            self._push()
        finally:
            self._sending.release()
        return True

    def _push(self) -> bool:
        """Send what is left of the last offer as far as there is room; True if nothing is left."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise RunnerGone("the runner has closed the socket") from exc
        return True

    def ask(self, frame: Frame, *answers: type[A]) -> A:
        """Send a frame and wait for its answer, obeying other frames meanwhile; one question at a time."""
        self.send(frame)
        return self._wait_for(*answers)

    def open_writer(self) -> None:
        """Ask for a writer; `writer` or `writer_refused` tells later. Raises RunnerGone."""
        self._expects_writer = True
        self.send(OpenWriter())

    def poll(self) -> None:
        """Take in what has come, without waiting; costs about a microsecond when nothing has. Raises RunnerGone."""
        while self._receive(socket.MSG_DONTWAIT):
            pass
        if self._unsent and self._sending.acquire(blocking=False):
            try:
                self._push()
            finally:
                self._sending.release()

    def wait(self, *, timeout_s: float) -> None:
        """Wait for orders, at most so long, and take them in. Raises RunnerGone."""
        select.select([self._sock], [], [], timeout_s)
        self.poll()

    def await_deadline(self, *, stop_suffices: bool = True) -> None:
        """Return at once before the deadline; past it wait for a later one, or for a Stop. Raises RunnerGone."""
        while self.is_past_deadline and not (stop_suffices and self.stop is not None):
            self.wait(timeout_s=_SIGNAL_S)

    @property
    def is_past_deadline(self) -> bool:
        """Whether the lease may have lapsed, as far as the runner has been heard."""
        return clock.boottime_s() >= self.deadline_boottime_s

    def fileno(self) -> int:
        """For `select`: readable when `poll` would find something."""
        return self._sock.fileno()

    def detach(self) -> None:
        """Leave the socket to the parent: for a process that user code has forked."""
        self._unsent = memoryview(b"")
        self._sock.close()

    def _wait_for(self, *answers: type[A]) -> A:
        while True:
            for frame in self._answers:
                if isinstance(frame, answers):
                    self._answers.remove(frame)
                    return frame
            self._receive(0)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                more = self._sock.recv(size - len(data))
            except ConnectionResetError as exc:
                raise RunnerGone("the runner has closed the socket") from exc
            if not more:
                raise RunnerGone("the runner has closed the socket")
            data += more
        return bytes(data)

    def _receive(self, flags: int) -> bool:
        """Take in one read; False if nothing has come and `flags` forbid to wait."""
        try:
            data = self._read(flags)
        except BlockingIOError:
            return False
        except ConnectionResetError as exc:
            raise RunnerGone("the runner has closed the socket") from exc
        if not data:
            raise RunnerGone("the runner has closed the socket")
        for frame in self._buffer.feed(data):
            self._take(frame)
        return True

    def _read(self, flags: int) -> bytes:
        """What lies there; also the descriptor of a writer, where one may come: it is lost to a plain `recv`."""
        if not self._expects_writer:
            return self._sock.recv(_READ_BYTES, flags)
        data, descriptors = receive(self._sock, _READ_BYTES, max_descriptors=1, flags=flags)
        self._descriptors += descriptors
        return data

    def _take(self, frame: Frame) -> None:
        match frame:
            case Deadline():
                self.deadline_boottime_s = max(self.deadline_boottime_s, frame.boottime_s)
            case Stop():
                self.stop = frame if self.stop is None or self.stop.reason == "terminated" else self.stop
            case Save():
                self.save_requested, self.save_number = True, max(self.save_number, frame.number)
            case WriterOpened():
                self._expects_writer = False
                if self._descriptors:
                    self.writer = socket.socket(fileno=self._descriptors.pop())
                else:  # the kernel drops what a process may not open
                    self.writer_refused = ErrorBody(code=TrainerLost.code, message=f"the writer's socket {_DROPPED}")
            case WriterRefused():
                self._expects_writer = False
                self.writer_refused = frame.error
            case Plan() | Verified() | Committed() | Refused() | Recorded():
                self._answers.append(frame)
            case _:
                raise BadMessage(f"a trainer takes no {frame.f!r} frame")
