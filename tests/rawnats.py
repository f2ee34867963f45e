"""A NATS client of bare bytes: it says what no library would."""

from __future__ import annotations

import json
import socket
from types import TracebackType
from typing import Self

from until import PATIENCE_S


class RawClient:
    """One TCP connection to a server, in the text protocol."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.send(
            b"CONNECT " + json.dumps({"verbose": False, "headers": True, "no_responders": True}).encode() + b"\r\n"
        )
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def settle(self) -> None:
        """Returns once the server has taken in everything that was sent."""
        self.send(b"PING\r\n")
        while True:
            line = self._file.readline()
            assert line, "the server closed the connection"
            assert not line.startswith(b"-ERR"), line
            if line == b"PONG\r\n":
                return

    def publish(self, subject: bytes, data: bytes = b"", *, reply: bytes = b"", headers: bytes | None = None) -> None:
        """`headers` go out as they are, whether they are any or not."""
        words = [subject, *([reply] if reply else [])]
        if headers is None:
            self.send(b"PUB %b %d\r\n%b\r\n" % (b" ".join(words), len(data), data))
        else:
            sizes = (len(headers), len(headers) + len(data))
            self.send(b"HPUB %b %d %d\r\n%b%b\r\n" % (b" ".join(words), *sizes, headers, data))
        self.settle()
