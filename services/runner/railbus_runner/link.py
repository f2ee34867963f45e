"""The runner's end of the socket pair of a trainer, or of a writer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from typing import Final

from railbus_runner.descriptors import send_some, unread_bytes
from railbus_runner.frames import Frame, FrameBuffer, pack

_READ_BYTES: Final = 1 << 18
_BUFFER_BYTES: Final = 4 << 20  # so that a trainer's events rarely wait for the runner


class TrainerLink:
    """Frames to and from one trainer or writer."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._sending = asyncio.Lock()

    async def send(self, frame: Frame, *, descriptor: int | None = None) -> bool:
        """Send a frame, and a descriptor if it has one; False if the trainer is gone, which its exit will explain."""
        if self._ours.fileno() < 0:
            return False
        data, sent = memoryview(pack(frame)), 0
        try:
            async with self._sending:
                if descriptor is not None:
                    sent = await send_some(self._ours, data, (descriptor,))
                await asyncio.get_running_loop().sock_sendall(self._ours, data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    async def frames(self) -> AsyncGenerator[Frame, None]:
        """Frames of the trainer until it closes its end; raises BadMessage for what is no frame."""
        loop, buffer = asyncio.get_running_loop(), FrameBuffer()
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(self._ours, _READ_BYTES):
                for frame in buffer.feed(data):
                    yield frame

    @property
    def unread_bytes(self) -> int:
        """What the trainer has not taken yet, with what the kernel needs to keep it."""
        return unread_bytes(self._ours)

    def give_away(self) -> None:
        """Close this process's copy of the trainer's end, once the trainer has it."""
        self.theirs.close()

    def close(self) -> None:
        self._ours.close()
        self.theirs.close()
