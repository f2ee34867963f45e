"""`NatsSource`: files of a dataset from the dataloaders of other hosts, in credited chunks over the bus.

A host that is cut off, stalls or sends what was not asked for is asked again from where the file ends, a few times;
then the next host goes on from there. A host whose bytes turn out not to be those of the index is left for good, and
nothing of the file stays. The hosts of a dataset are begun with in another order for each file, so that a dataset that
several hosts have comes from all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_dataloader.arrival import Arrival, Intake
from railbus_dataloader.sources import WantedFile
from railbus_shared.bus.chunks import Chunk, ChunkReceiver, receiving
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.requests import SendFile, SendingFile
from railbus_shared.data.verified import Fingerprint
from railbus_shared.errors import (
    BadMessage,
    BusUnavailable,
    NoSource,
    RailbusError,
    RequestTimeout,
    ShardCorrupt,
    StorageFull,
    TooManyTransfers,
    TransferBroken,
)

logger = logging.getLogger(__name__)

_ATTEMPTS: Final = 3
"""Without a single byte more; an attempt that brought some does not count."""
_MAX_ATTEMPTS: Final = 50
"""In all, of one host for one file."""
_LOOK_S: Final = 0.2
_MAX_AT_ONCE: Final = 32
"""Chunks that are written and hashed in one go."""
_AGAIN: Final = (TransferBroken, RequestTimeout, BusUnavailable, BadMessage, TooManyTransfers)
"""What may be otherwise at the next attempt; after anything else the next host is asked at once."""

Hosts = Callable[[WantedFile], Awaitable[Sequence[str]]]
"""Which other hosts say that they have this version of the dataset."""


@dataclass(frozen=True)
class FetchLimits:
    """How much is under way, and how long silence is borne."""

    window_bytes: int = 16 << 20
    """Credit. 16 to 32 MiB was as fast as any; less waits for the way there and back."""
    stall_s: float = 10.0
    """Without a chunk or a sign of life."""
    patience_s: float = 60.0
    """Without a chunk, whatever signs of life there are: a host may have others to serve first."""
    pause_s: float = 0.2
    """Before a host is asked again; more after each time in vain, and never the same, so that askers do not march."""


class NatsSource:
    """A `Source`: the dataloaders of other hosts."""

    def __init__(self, bus: Bus, hosts: Hosts, *, host: str, limits: FetchLimits) -> None:
        """`bus` is for bulk only; `host` is this one."""
        self._bus = bus
        self._hosts = hosts
        self._host = host
        self._limits = limits

    async def fetch(self, wanted: WantedFile, into: Path) -> Fingerprint:
        """See `Source.fetch`. Raises NoSource if no host has the file now, ShardCorrupt if one sent a wrong one."""
        corrupt: ShardCorrupt | None = None
        for host in await self._candidates(wanted):
            try:
                return await self._fetch_from(host, wanted, into)
            except StorageFull:
                raise
            except ShardCorrupt as exc:
                corrupt = exc
                logger.warning("another host has a damaged file", extra={"host": host, "error": exc.to_wire()})
            except RailbusError as exc:
                logger.warning("file not fetched", extra={"host": host, "file": wanted.file, "problem": str(exc)})
        if corrupt is not None:
            raise corrupt
        raise NoSource(f"no other host sends {wanted.file!r} of dataset {wanted.dataset!r}", hint="it is tried again")

    async def _candidates(self, wanted: WantedFile) -> list[str]:
        hosts = sorted(set(await self._hosts(wanted)) - {self._host})
        first = int(wanted.sha256[:8], 16) % len(hosts) if hosts else 0
        return hosts[first:] + hosts[:first]

    async def _fetch_from(self, host: str, wanted: WantedFile, into: Path) -> Fingerprint:
        """The rest of a file from one host, over as many attempts as it takes while each brings something."""
        arrival = Arrival(wanted, into)
        try:
            await asyncio.to_thread(arrival.open)
            await self._attempts(host, arrival)
            return await asyncio.to_thread(arrival.check, f"host {host}")
        finally:
            arrival.close()

    async def _attempts(self, host: str, arrival: Arrival) -> None:
        fruitless = 0
        for attempt in range(_MAX_ATTEMPTS):
            began = arrival.position
            try:
                await self._attempt(host, arrival)
                return
            except _AGAIN as exc:
                fruitless = fruitless + 1 if arrival.position == began else 0
                if fruitless == _ATTEMPTS or attempt == _MAX_ATTEMPTS - 1:
                    raise
                logger.info("file asked for again", extra={"host": host, "from": began, "problem": str(exc)})
                await self._pause(self._limits.pause_s * (1 + fruitless) * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    async def _pause(self, seconds: float) -> None:
        """Some time, and as long as the connection is away, up to the time that silence is borne."""
        given_up = time.monotonic() + self._limits.stall_s
        await asyncio.sleep(seconds)
        while not self._bus.is_connected and time.monotonic() < given_up:  # noqa: ASYNC110 - it tells by callbacks only
            await asyncio.sleep(_LOOK_S)

    async def _attempt(self, host: str, arrival: Arrival) -> None:
        """Ask a host for what is missing, and take it in."""
        if arrival.is_complete:
            return
        async with receiving(self._bus, window_bytes=self._limits.window_bytes) as receiver:
            answer = SendingFile.parse(await self._ask(host, arrival, receiver.subject))
            arrival.expect(answer.bytes)
            try:
                await self._receive(receiver, arrival, answer.credit)
            finally:
                with contextlib.suppress(RailbusError):  # it finds out by itself, later
                    await receiver.grant(answer.credit, arrival.position, done=True)

    async def _ask(self, host: str, arrival: Arrival, to: str) -> dict[str, object]:
        wanted = arrival.wanted
        request = SendFile(
            dataset=wanted.dataset,
            index_sha256=wanted.index_sha256,
            file=wanted.file,
            offset=arrival.position,
            window_bytes=self._limits.window_bytes,
            to=to,
            asker=self._host,
        )
        subject = self._bus.subjects.request(f"data.{host}", "shard")
        try:
            return await self._bus.request(subject, request.to_map(), timeout_s=self._limits.stall_s)
        except StorageFull as exc:  # of theirs, which must not be taken for ours
            raise TransferBroken(f"the host answers: {exc.message}") from exc

    async def _receive(self, receiver: ChunkReceiver, arrival: Arrival, credit: str) -> None:
        """Take chunks until the file is complete, granting more as they are written."""
        window = self._limits.window_bytes
        granted = arrival.position + window
        intake = Intake(arrival)
        given_up = time.monotonic() + self._limits.patience_s
        while not arrival.is_complete:
            chunks = await self._at_hand(receiver)
            _check_credit(chunks, granted)
            before = arrival.position
            await intake.take(chunks)
            if arrival.position > before:
                given_up = time.monotonic() + self._limits.patience_s
            elif time.monotonic() > given_up:
                raise TransferBroken(f"signs of life for {self._limits.patience_s:g} s, and no bytes")
            if arrival.position + window - granted >= window // 4:
                granted = arrival.position + window
                await receiver.grant(credit, granted)

    async def _at_hand(self, receiver: ChunkReceiver) -> list[Chunk]:
        """The next chunk, and those that are there already."""
        chunks = [await receiver.next(self._limits.stall_s)]
        while len(chunks) < _MAX_AT_ONCE and receiver.at_hand():
            chunks.append(await receiver.next(0))
        return chunks


def _check_credit(chunks: list[Chunk], granted: int) -> None:
    """Raises TransferBroken if a sender goes beyond its credit: it would fill our memory."""
    last = chunks[-1]
    if last.offset + len(last.data) > granted:
        raise TransferBroken(f"{len(last.data)} bytes came at {last.offset}, but no more than {granted} were granted")
