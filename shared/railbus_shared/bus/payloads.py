"""Large payloads with fewer copies than nats-py makes: how they are read, and how they are taken apart.

nats-py 2.16 reads 32 KiB at a time, and copies each byte of a message five times on its way from the socket. For shards
from other hosts that was a tenth of all processor time of a transfer. Here it is 256 KiB at a time and three copies.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final
from urllib.parse import ParseResult

from nats.aio.transport import TcpTransport
from nats.protocol.parser import AWAITING_CONTROL_LINE, AWAITING_MSG_PAYLOAD, CRLF_SIZE, Parser

if TYPE_CHECKING:
    from nats.aio.client import Client

READ_BYTES: Final = 1 << 18
"""What uvloop takes from a socket at once."""
_LARGE_BYTES: Final = 1 << 16
"""Smaller payloads are left to nats-py: they mostly come whole."""


class LargeReads(TcpTransport):
    """A connection that is read in large pieces, and whose end nothing holds up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_ending = False

    def end(self) -> None:
        """The client closes: what the other side does not take any more is let go.

        nats-py writes what is pending even where the server has cut the connection; that fails, and nobody would hear
        that the client is closed.
        """
        self._is_ending = True

    def writelines(self, payload: list[bytes]) -> None:
        if not (self._is_ending and self._io_writer is not None and self._io_writer.is_closing()):
            super().writelines(payload)  # type: ignore[no-untyped-call]

    async def drain(self) -> None:
        try:
            await super().drain()  # type: ignore[no-untyped-call]
        except OSError:
            if not self._is_ending:
                raise

    async def wait_closed(self) -> None:
        """After a TLS handshake that failed, asyncio has cancelled what is waited for, and not who waits."""
        try:
            await super().wait_closed()  # type: ignore[no-untyped-call]
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self._is_ending = False
        if self._io_writer is not None:
            self._io_writer.close()  # of an attempt that was refused; nats-py leaves it open
        await super().connect(uri, max(buffer_size, READ_BYTES), connect_timeout)

    async def read(self, buffer_size: int) -> bytes:
        found: bytes = await super().read(max(buffer_size, READ_BYTES))
        return found


class LargePayloads(Parser):
    """nats-py's parser; a large payload is put together once, from the pieces that were read."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pieces: list[bytes] = []
        self._have = 0
        super().__init__(client)

    def reset(self) -> None:
        """Forget what has come of a message: the connection is another one."""
        super().reset()
        self._pieces, self._have = [], 0

    async def parse(self, data: bytes = b"") -> None:
        """Take in what was read; raises ProtocolError for what is not the protocol."""
        while data:
            if not self._is_in_large():
                await super().parse(data)
                if not self._is_in_large():
                    return
                data = bytes(self.buf)  # the beginning of a large payload, less than one read
                self.buf.clear()
            data = await self._add(data)

    def _is_in_large(self) -> bool:
        return self.state == AWAITING_MSG_PAYLOAD and self.header_needed == 0 and self.needed >= _LARGE_BYTES

    async def _add(self, data: bytes) -> bytes:
        """Add to the payload, and hand it on once it is whole; what follows it."""
        missing = self.needed + CRLF_SIZE - self._have
        if len(data) < missing:
            self._pieces.append(data)
            self._have += len(data)
            return b""
        payload = b"".join((*self._pieces, memoryview(data)[: max(0, missing - CRLF_SIZE)]))[: self.needed]
        found = self.msg_arg
        self._pieces, self._have = [], 0
        self.state = AWAITING_CONTROL_LINE
        await self._client._process_msg(found["sid"], found["subject"], found["reply"], payload, b"")  # noqa: SLF001
        return data[missing:]
