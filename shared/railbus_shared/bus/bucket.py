"""Key-value buckets, changed only by compare-and-set on the revision of a key.

A node of a cluster may lag behind and answers direct reads nevertheless: one that was paused for a moment gives
values that have been replaced. There a key is read from the leader of its bucket, and a snapshot is taken only from a
node that has all that the leader had when it was asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import nats.errors
import nats.js.api
import nats.js.errors
from nats.aio.msg import Msg

from railbus_shared import wire
from railbus_shared.bus.client import bus_errors
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.pull import tailing
from railbus_shared.errors import BusUnavailable, RequestTimeout, RevisionConflict, WireError

_OPERATION: Final = "KV-Operation"
_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
_RETRY_S: Final = 0.25
_SNAPSHOT_TIMEOUT_S: Final = 3.0
_READ_ALL_S: Final = 10.0
_LAGGING_TRIES: Final = 20
_LAGGING_S: Final = 0.1
_NO_MESSAGE: Final = 10037
_SNAPSHOT_MAX: Final = 1024  # of the server, for one multi-get


@dataclass(frozen=True)
class Entry:
    """A key's value and revision; a value of None means that the key was deleted."""

    key: str
    value: dict[str, object] | None
    revision: int


@dataclass(frozen=True)
class Write:
    """A change of one key that holds only if its revision is still `revision` (0: the key does not exist)."""

    key: str
    value: Mapping[str, object] | None
    """None deletes."""
    revision: int
    ttl_s: int | None = None
    """Whole seconds until the key vanishes by itself; it must be stated at every write of a key that is to expire."""


@dataclass(frozen=True)
class SnapshotEnd:
    """Told by `watch` once everything that was there has been told; also after a reconnect."""


class Bucket:
    """One bucket. Values are maps on the wire; keys are checked by whoever builds them."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self._name = name
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."

    async def get(self, key: str) -> Entry | None:
        """The newest value of a key, read from the store itself, or None."""
        entry = await self.get_with_deleted(key)
        return entry if entry is not None and entry.value is not None else None

    async def get_with_deleted(self, key: str) -> Entry | None:
        """Like `get`, but a deleted key's marker is told too: a new value must name its revision."""
        if self._bus.is_clustered:
            return await self._leaders(key)
        with bus_errors(self._prefix + key):
            reply: Msg = await self._bus.client.request(
                f"$JS.API.DIRECT.GET.{self._stream}.{self._prefix}{key}", b"", timeout=_SNAPSHOT_TIMEOUT_S
            )
        if reply.headers and reply.headers.get("Status") == "404":
            return None
        return self._entry(reply)

    async def _leaders(self, key: str) -> Entry | None:
        with bus_errors(self._prefix + key):
            try:
                found = await self._bus.client.jetstream().get_last_msg(self._stream, self._prefix + key)
            except nats.js.errors.NotFoundError as exc:
                if exc.err_code != _NO_MESSAGE:
                    raise
                return None
        return self._entry_of(found.subject or "", found.data or b"", found.headers or {}, found.seq or 0)

    async def write(self, change: Write) -> int:
        """Change one key and return its new revision; raises RevisionConflict if it has moved.

        A write whose acknowledgement is lost raises RequestTimeout, and may have been stored.
        """
        return await self._bus.publish(self._outgoing(change))

    async def write_all(self, changes: Sequence[Write]) -> list[int]:
        """Change several keys all or none; returns their new revisions. The bucket must allow atomic batches."""
        last = await self._bus.publish_together([self._outgoing(change) for change in changes])
        return [last - len(changes) + 1 + position for position in range(len(changes))]

    async def create(self, key: str, value: Mapping[str, object], *, ttl_s: int | None = None) -> int:
        """Create a key that does not exist or was deleted; raises RevisionConflict if it exists."""
        try:
            return await self.write(Write(key, value, 0, ttl_s))
        except RevisionConflict:
            entry = await self.get_with_deleted(key)
            if entry is not None and entry.value is not None:
                raise
            return await self.write(Write(key, value, entry.revision if entry else 0, ttl_s))

    async def put(self, key: str, value: Mapping[str, object], *, ttl_s: int | None = None) -> int:
        """Write a key that has one writer only, whatever its revision: reports and summaries."""
        return await self._bus.publish(self._outgoing(Write(key, value, -1, ttl_s)))

    async def remove(self, key: str) -> None:
        """Delete a key whatever its revision; one that does not exist is left alone."""
        if await self.get(key) is not None:
            await self._bus.publish(self._outgoing(Write(key, None, -1)))

    async def snapshot(self) -> dict[str, Entry]:
        """All keys and values; one request where there are at most 1024 keys, those that were deleted counted.

        As in a watch, what cannot be decoded is left out.

        Source: ADR-31, multi-get of nats-server 2.11.
        """
        if not self._bus.is_clustered:
            found, _ = await self._multi_get()
            return await self._all_of_many() if found is None else found
        for _ in range(_LAGGING_TRIES):
            newest = await self._bus.newest(self._stream)
            found, up_to = await self._multi_get()
            if found is None:
                return await self._all_of_many()
            if up_to >= newest:
                return found
            await asyncio.sleep(_LAGGING_S)
        raise BusUnavailable(f"bucket {self._name!r} is read from a node that lags behind", hint="it is tried again")

    async def _all_of_many(self) -> dict[str, Entry]:
        with bus_errors(self._stream):
            async with asyncio.timeout(_READ_ALL_S):
                return await self.read_all()

    async def _multi_get(self) -> tuple[dict[str, Entry] | None, int]:
        """The keys, None if there are too many; and the sequence up to which the node that answered has the stream."""
        client = self._bus.client
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox)
        body = wire.encode({"multi_last": [self._prefix + ">"], "batch": _SNAPSHOT_MAX}, encoding=wire.Encoding.JSON)
        found: dict[str, Entry] = {}
        try:
            with bus_errors(self._stream):
                await client.publish(f"$JS.API.DIRECT.GET.{self._stream}", body, reply=inbox)
                while True:
                    reply: Msg = await subscription.next_msg(_SNAPSHOT_TIMEOUT_S)
                    status = (reply.headers or {}).get("Status")
                    if status in {"204", "404"}:
                        return found, int((reply.headers or {}).get("Nats-UpTo-Sequence", 0))
                    if status == "413":
                        return None, 0
                    if status is not None:
                        raise BusUnavailable(f"bucket {self._name!r} cannot be read: {reply.headers}")
                    with contextlib.suppress(WireError):
                        entry = self._entry(reply)
                        if entry.value is not None:
                            found[entry.key] = entry
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def read_all(self) -> dict[str, Entry]:
        """All keys and values of a bucket of any size, as they stood at one moment."""
        found: dict[str, Entry] = {}
        async with contextlib.aclosing(self.watch()) as told:
            async for entry in told:
                if isinstance(entry, SnapshotEnd):
                    break
                if entry.value is not None:
                    found[entry.key] = entry
        return found

    async def watch(self) -> AsyncGenerator[Entry | SnapshotEnd, None]:
        """Everything that is there, then SnapshotEnd, then every change; begins anew after a reconnect.

        A hint and not the truth: it may lag. Keys that expire are not told.
        """
        while True:
            try:
                async with contextlib.aclosing(self._watch_once()) as entries:
                    async for entry in entries:
                        yield entry
            except (BusUnavailable, RequestTimeout):
                await asyncio.sleep(_RETRY_S)  # until the connection is back; every await here is bounded

    async def _watch_once(self) -> AsyncGenerator[Entry | SnapshotEnd, None]:
        config = nats.js.api.ConsumerConfig(
            filter_subject=self._prefix + ">", deliver_policy=nats.js.api.DeliverPolicy.LAST_PER_SUBJECT
        )
        async with tailing(self._bus, self._stream, config) as tail:
            left = tail.num_pending
            if left == 0:
                yield SnapshotEnd()
            while (messages := await tail.next_messages()) is not None:
                for message in messages:
                    with contextlib.suppress(WireError):
                        yield self._entry(message)
                    is_last = left == 1 or int(message.metadata.num_pending or 0) == 0
                    if left > 0 and is_last:
                        yield SnapshotEnd()
                    left = 0 if is_last else max(0, left - 1)

    def _entry(self, message: Msg) -> Entry:
        """From a direct get, whose headers name subject and sequence, or from a consumer."""
        headers = message.headers or {}
        subject = str(headers.get("Nats-Subject", message.subject))
        revision = (
            int(headers["Nats-Sequence"]) if "Nats-Sequence" in headers else int(message.metadata.sequence.stream)
        )
        return self._entry_of(subject, message.data, headers, revision)

    def _entry_of(self, subject: str, data: bytes, headers: Mapping[str, str], revision: int) -> Entry:
        deleted = _OPERATION in headers or "Nats-Marker-Reason" in headers
        return Entry(subject.removeprefix(self._prefix), None if deleted else wire.decode(data), revision)

    def _outgoing(self, change: Write) -> Outgoing:
        headers: dict[str, str] = {}
        if change.revision >= 0:
            headers[_EXPECTED] = str(change.revision)
        if change.ttl_s is not None:
            headers["Nats-TTL"] = str(change.ttl_s)
        if change.value is None:
            headers[_OPERATION] = "DEL"
        data = b"" if change.value is None else wire.encode(change.value)
        return Outgoing(self._prefix + change.key, data, "", headers)


def nonce() -> str:
    """A word that tells a writer whose acknowledgement was lost that the value is its own."""
    return secrets.token_hex(8)
