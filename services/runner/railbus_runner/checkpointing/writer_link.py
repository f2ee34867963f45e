"""The trainer's end of the socket pair to its writer, with the arena that both map."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import torch

from railbus_runner.checkpointing.arena import Arena
from railbus_runner.checkpointing.copying import has_spare_cores
from railbus_runner.descriptors import receive
from railbus_runner.frames import (
    ArenaMade,
    Copied,
    Durable,
    Frame,
    FrameBuffer,
    MakeArena,
    NoArena,
    NotWritten,
    Write,
    pack,
)
from railbus_shared.errors import BadMessage

if TYPE_CHECKING:
    from railbus_runner.channel import TrainerChannel

logger = logging.getLogger(__name__)

_READ_BYTES: Final = 1 << 16
_TOLD_BYTES: Final = 16 << 20
"""Of one block of the file; how far the copy has got is told in whole ones."""
_MAX_TOLD: Final = 64
"""About how often it is told at most, so that the socket's buffer holds it all if the writer does not listen."""
_MOST: Final = 3 / 4
_PORTABLE: Final = 1  # pinned for every GPU of the process


class WriterGone(Exception):
    """The writer has closed its end: it is dead, or about to be."""


class WriterLink:
    """Frames to and from the writer; takes over the socket, which must be blocking. Of the main thread alone.

    Attributes:
        ordered: what the writer was told to write and has not answered for.
        why_not: why there is no arena, once that is known.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.ordered: Write | None = None
        self.why_not = ""
        self._sock = sock
        self._buffer = FrameBuffer()
        self._descriptors: list[int] = []
        self._arena: Arena | None = None
        self._mapped = threading.Event()
        self._pinning = threading.Lock()
        self._is_pinned = False
        self._outcome: Durable | NotWritten | None = None
        self._told_bytes = 0
        self._is_begun = False

    @property
    def capacity(self) -> int:
        """Bytes of the arena that may be used now; 0 while there is none, or not all of it is mapped yet."""
        return self._arena.nbytes if self._arena is not None and self._mapped.is_set() else 0

    def make_arena(self, nbytes: int) -> None:
        """Have an arena made in place of the one there is, of which nothing may be used any more; not while `ordered`.

        The memory of that one is free at once, for forks of this process may have it open.
        """
        self._drop_arena(is_unused=True)
        self.why_not = ""
        self._send(MakeArena(nbytes=nbytes))

    def memory(self) -> torch.Tensor:
        """The arena, uint8 (capacity,); not to be kept."""
        if self._arena is None:
            raise RuntimeError("there is no arena")
        return torch.frombuffer(self._arena.memory, dtype=torch.uint8)

    def write(self, order: Write) -> None:
        """Have the first bytes of the arena written, once `copied` says that they are there; one order at a time."""
        self.ordered, self._told_bytes, self._is_begun = order, 0, False

    def copied(self, nbytes: int) -> None:
        """So much of what was ordered is in the arena, and may not be changed before the order is answered.

        The order goes with the first block, so that the writer makes room and nothing is begun of a state that is
        copied in a moment. What is copied is told as it comes where there are cores for it, else once most of it is
        there: a writer that hashes meanwhile takes them from the copy, and the loop stands still for that.
        """
        order = self.ordered
        if order is None:
            raise RuntimeError("nothing was ordered")
        step = max(_TOLD_BYTES, order.nbytes // _MAX_TOLD // _TOLD_BYTES * _TOLD_BYTES)
        told = nbytes if nbytes == order.nbytes else nbytes // step * step
        if told > 0 and not self._is_begun:
            self._is_begun = True
            self._send(order)
        if told > self._told_bytes and (told >= order.nbytes * _MOST or has_spare_cores()):
            self._told_bytes = told
            self._send(Copied(nbytes=told, stall_s=time.monotonic() - order.began_s))

    def poll(self) -> Durable | NotWritten | None:
        """What became of the order, if that has come; without waiting. Raises WriterGone."""
        while self._receive():
            pass
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self.ordered = None
        return outcome

    def wait(self, channel: TrainerChannel) -> Durable | NotWritten:
        """What became of the order, once that has come; hears the runner, too. Raises WriterGone, RunnerGone."""
        ready = select.poll()
        ready.register(self._sock, select.POLLIN)
        ready.register(channel, select.POLLIN)
        while (outcome := self.poll()) is None:
            ready.poll()
            channel.poll()
        return outcome

    def close(self) -> None:
        """The writer ends, once it has done what it was told; the arena is nobody's any more."""
        self._drop_arena()
        self._sock.shutdown(socket.SHUT_RDWR)  # the runner and forks of this process have it open, too
        self._sock.close()

    def detach(self) -> None:
        """Leave the socket to the parent: for a process that user code has forked."""
        self._sock.close()

    def _send(self, frame: Frame) -> None:
        try:
            self._sock.sendall(pack(frame))
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise WriterGone("the writer has closed the socket") from exc

    def _receive(self) -> bool:
        """Take in one read; False if nothing has come."""
        try:
            data, descriptors = receive(self._sock, _READ_BYTES, max_descriptors=1, flags=socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError as exc:
            raise WriterGone("the writer has closed the socket") from exc
        self._descriptors += descriptors
        if not data:
            raise WriterGone("the writer has closed the socket")
        for frame in self._buffer.feed(data):
            self._take(frame)
        return True

    def _take(self, frame: Frame) -> None:
        match frame:
            case ArenaMade() if self._descriptors:
                self._map(Arena(self._descriptors.pop(), frame.nbytes))
            case ArenaMade():  # the kernel drops what a process may not open
                self.why_not = "the arena could not be received: this process has too many open files"
            case NoArena():
                self.why_not = frame.why
            case Durable() | NotWritten():
                self._outcome = frame
            case _:
                raise BadMessage(f"a trainer takes no {frame.f!r} frame of its writer")

    def _map(self, arena: Arena) -> None:
        """Have the pages, which the writer has made, in this process's table too, beside the loop."""
        mapped = self._mapped = threading.Event()
        self._arena = arena

        def populate() -> None:
            try:
                is_whole = arena.populate(goes_on=lambda: self._arena is arena)
                with self._pinning:
                    if is_whole and self._arena is arena:
                        self._is_pinned = _pin(arena)
                        mapped.set()
            except OSError as exc:
                self.why_not = f"the arena cannot be mapped: {exc}"

        threading.Thread(target=populate, name="railbus-arena", daemon=True).start()

    def _drop_arena(self, *, is_unused: bool = False) -> None:
        """`is_unused` by the writer, which may else be reading from it to its end."""
        with self._pinning:  # memory that is unmapped while it is pinned stays known to CUDA, under its old address
            if self._is_pinned and self._arena is not None:
                _cudart().cudaHostUnregister(self._arena.address)
            if self._arena is not None and is_unused and self._mapped.is_set():
                self._arena.free()
            if self._arena is not None:
                self._arena.close()
            self._arena, self._is_pinned = None, False


def _pin(arena: Arena) -> bool:
    """Let a GPU that this process uses write into the arena by itself, several times faster; False if it may not."""
    if not _uses_cuda():
        return False
    code = int(_cudart().cudaHostRegister(arena.address, arena.nbytes, _PORTABLE))
    if code:
        logger.warning("the arena is not pinned, copies from the GPU take longer", extra={"code": code})
    return code == 0


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
