"""What Python's sockets lack: open files over a Unix socket, and how much of what was sent is unread."""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import termios
from collections.abc import Sequence


def receive(sock: socket.socket, max_bytes: int, *, max_descriptors: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """What lies in the socket, and the descriptors that came with it, which no program inherits.

    As `socket.recv_fds`, which ignores its flags in Python 3.11.
    """
    found = array.array("i")
    space = socket.CMSG_SPACE(max_descriptors * found.itemsize)
    data, ancillary, _, _ = sock.recvmsg(max_bytes, space, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return data, list(found)


def unread_bytes(sock: socket.socket) -> int:
    """What the other end has not taken yet, with what the kernel needs to keep it."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    return count[0]


async def send_some(sock: socket.socket, data: memoryview, descriptors: Sequence[int]) -> int:
    """Send data with descriptors, and give how much of it went out with them: at least one byte.

    Waits until the socket takes something; the rest of the data is the caller's to send. The socket is non-blocking.
    """
    while True:
        try:
            return socket.send_fds(sock, [data], descriptors)
        except BlockingIOError:
            await _writable(sock)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock.fileno(), _resolve, future)
    try:
        await future
    finally:
        loop.remove_writer(sock.fileno())


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
