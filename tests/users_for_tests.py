"""A server that knows all users of railbus, and clients that join it as one of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import nkeys
from nats.aio.client import Client

from railbus.embedded.credentials import UserKey, ensure_keys
from railbus.embedded.nats_server import NatsServer, find_server
from railbus.embedded.permissions import HUMAN, OPERATOR, SERVICE_USERS, Role, policy
from railbus.embedded.server_config import ServerFiles, render
from railbus_shared.bus.client import RailbusClient
from railbus_shared.bus.connection import Bus
from railbus_shared.settings import CommonSettings
from until import PATIENCE_S

T = TypeVar("T")
_OF_SERVICES = (*SERVICE_USERS, OPERATOR)
"""Whose inboxes are those of services."""


async def within(answer: Awaitable[T], *, timeout_s: float = PATIENCE_S) -> T:
    async with asyncio.timeout(timeout_s):
        return await answer


class Cluster:
    """A server with all users."""

    def __init__(self, server: NatsServer, keys: dict[str, UserKey], root: Path) -> None:
        self.server, self.keys, self.root = server, keys, root

    def settings(self, user: str) -> CommonSettings:
        return CommonSettings(root=self.root, nats_url=self.server.url, nats_key_file=self.keys[user].seed_path)

    @contextlib.asynccontextmanager
    async def bus(self, user: str) -> AsyncIterator[Bus]:
        """As our own programs connect."""
        async with Bus.open(self.settings(user), name=user, service=user in _OF_SERVICES) as bus:
            yield bus

    @contextlib.asynccontextmanager
    async def client(self, user: str) -> AsyncIterator[tuple[Client, list[str]]]:
        """A plain client, and the errors that the server has told it."""
        errors: list[str] = []

        async def note(error: Exception) -> None:
            errors.append(str(error))

        client = RailbusClient()  # whose `flush` is a barrier
        await client.connect(
            self.server.url,
            nkeys_seed_str=self.keys[user].seed_path.read_text().strip(),
            inbox_prefix=f"_RINBOX.{user}".encode() if user in _OF_SERVICES else b"_INBOX",
            error_cb=note,
            allow_reconnect=False,
        )
        try:
            yield client, errors
        finally:
            await client.close()


@contextlib.contextmanager
def running_cluster(folder: Path, people: Mapping[str, Role] | None = None) -> Iterator[Cluster]:
    """A server with every service and these people; with the one that everyone has, if none are named."""
    roles: Mapping[str, Role] = {HUMAN: "user"} if people is None else people
    keys = ensure_keys(folder / "keys", (*_OF_SERVICES, *roles))
    where = ServerFiles(folder / "nats")

    def content(port: int) -> bytes:
        return render(where, port=port, name="test", keys=keys, policy=policy(people=roles))

    server = NatsServer(find_server(), where=where, render=content, port=0)
    server.start()
    try:
        yield Cluster(server, keys, folder / "learning")
    finally:
        server.stop()


def signature(key: UserKey, nonce: str) -> str:
    """What proves to the server that one has the seed."""
    signed: bytes = nkeys.from_seed(key.seed_path.read_bytes().strip()).sign(nonce.encode())
    return base64.urlsafe_b64encode(signed).decode().rstrip("=")


class Wire:
    """The bare protocol, so that what the server says to each line is known for certain: it answers in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, cluster: Cluster, user: str) -> Wire:
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.server.port)
        info = json.loads((await reader.readline()).removeprefix(b"INFO "))
        key = cluster.keys[user]
        options = {"verbose": False, "nkey": key.public, "sig": signature(key, info["nonce"]), "protocol": 1}
        writer.write(b"CONNECT " + json.dumps(options).encode() + b"\r\n")
        wire = cls(reader, writer)
        try:
            assert await wire.is_allowed(b"")
        except AssertionError:
            await wire.close()
            raise
        return wire

    async def is_allowed(self, line: bytes) -> bool:
        """Send a line, and read until the answer to a ping after it."""
        self._writer.write(line + b"PING\r\n")
        allowed = True
        while (said := await within(self._reader.readline())) != b"PONG\r\n":
            assert said, "the server closed the connection"
            allowed = allowed and not said.startswith(b"-ERR")
        return allowed

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()
