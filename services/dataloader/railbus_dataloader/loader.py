"""`ShardLoader`: the datasets that this host can read, and their shards here, verified and warm before a trainer wants
them.

What is under the root stays there; what lies elsewhere comes into the cache. A shard that was verified for a session
stays where it is until the session releases it or ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from railbus_dataloader import shelf
from railbus_dataloader.cache import Cache, Tell, stream_ended
from railbus_dataloader.catalogue import Catalogue, Located, LocatedShard
from railbus_dataloader.lookahead import LookAhead
from railbus_dataloader.measures import Measures
from railbus_dataloader.sessions import Session, Sessions
from railbus_dataloader.sources import Finder
from railbus_dataloader.verification import Verification, Wanted
from railbus_shared.contracts.requests import (
    MAX_VERIFIED_RANGES,
    DatasetSummary,
    OpenedStream,
    OpenStream,
    ShardRange,
    StreamProgress,
    VerifiedShards,
)
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import IndexInvalid, ShardCorrupt
from railbus_shared.layout import Layout

logger = logging.getLogger(__name__)

_CACHE_FRAC: Final = 0.5
"""Of the disk that is free, the cache itself counted as free."""
_WARM_BYTES: Final = 16 << 20
"""Warmed in one go; then the next session has its turn."""
_MIN_LOOK_S: Final = 0.05
_MAX_GUESSED: Final = 1024
"""Shards that are made ready for a trainer that has not spoken yet."""


@dataclass(frozen=True)
class Limits:
    """What the loader may use; see the settings of the same names."""

    session_ttl_s: float = 30.0
    cache_bytes: int = 0
    ahead_bytes: int = 0


class ShardLoader:
    """Datasets and sessions of one host."""

    def __init__(
        self,
        layout: Layout,
        *,
        host: str,
        state_dir: Path,
        measures: Measures,
        tell: Tell,
        limits: Limits = Limits(),
        finder: Finder | None = None,
    ) -> None:
        self._limits = limits
        self._measures = measures
        self._catalogue = Catalogue(layout, host=host, finder=finder)
        self._verification = Verification(state_dir / "verified.json", hashed=measures.hashed)
        self._sessions = Sessions(ttl_s=limits.session_ttl_s)
        self._located: dict[str, Located] = {}  # by stream
        self._cache = Cache(
            layout.cache,
            budget_bytes=limits.cache_bytes or _usual_cache_bytes(layout.cache),
            former_s=limits.session_ttl_s,
            verification=self._verification,
            measures=measures,
            tell=tell,
        )
        self._memory = _Memory()
        self._ahead = LookAhead(
            self._sessions,
            prepare=self._prepare,
            sizes=self._sizes,
            budget_bytes=lambda: limits.ahead_bytes or self._memory.half_bytes(),
        )
        self._warm_turn = asyncio.Semaphore(1)
        self._hash_turn = asyncio.Semaphore(1)

    async def run(self) -> None:
        """Fetch, evict, look ahead and end silent sessions, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._cache.run())
            tasks.create_task(self._ahead.run())
            while True:
                await asyncio.sleep(min(1.0, max(_MIN_LOOK_S, self._limits.session_ttl_s / 4)))
                for session in self._sessions.expired(time.monotonic()):
                    logger.info("session expired", extra={"stream": session.stream, "dataset": session.dataset})
                    self._ended(session.stream)

    async def close(self) -> None:
        """Wait for the hashing that is under way."""
        await self._verification.close()

    # --- what there is -----------------------------------------------------------------------------------------------

    async def list_all(self) -> list[DatasetSummary]:
        """All datasets under the root that hold together, by name; what does not is logged."""
        return await self._catalogue.list_all()

    async def describe(self, name: str) -> DatasetSummary:
        """Look at a dataset; raises DatasetNotFound, SchemaInvalid, IndexInvalid, InvalidName."""
        return await self._catalogue.describe(name)

    async def index_here(self, name: str) -> DatasetIndex:
        """The index of a dataset under the root; raises DatasetNotFound, SchemaInvalid, IndexInvalid, ShardCorrupt."""
        return await self._catalogue.index_here(name)

    # --- sessions ----------------------------------------------------------------------------------------------------

    async def open(self, request: OpenStream) -> OpenedStream:
        """Where a trainer finds a dataset's shards, or will once they have been verified for it.

        Until the trainer has said what it reads first, shards under the root are made ready by number.
        Raises DatasetNotFound, SchemaInvalid, IndexInvalid, ShardCorrupt.
        """
        dataset = await self._catalogue.locate(request.dataset)
        verified = await asyncio.to_thread(self._verified_ranges, dataset)
        session = self._known(f"s-{secrets.token_hex(8)}", request.dataset, dataset)
        if not dataset.is_remote:
            session.ahead = tuple(range(min(len(dataset.shards), _MAX_GUESSED)))
        self._ahead.heed()
        return OpenedStream(
            stream=session.stream,
            dataset=request.dataset,
            schema_path=str(dataset.schema_path),
            index_path=str(dataset.index_path),
            index_sha256=dataset.index.sha256,
            num_shards=len(dataset.shards),
            shards_path=str(dataset.shards_path),
            is_cached=dataset.is_remote,
            verified=verified,
            ttl_s=self._limits.session_ttl_s,
        )

    async def progress(self, told: StreamProgress) -> None:
        """Take a trainer's word; of a stream that is not known, only if it names its dataset.

        Raises DatasetNotFound, InvalidField.
        """
        if told.dataset is not None and told.stream not in self._located:
            self._known(told.stream, told.dataset, await self._catalogue.locate(told.dataset))
        moved = self._sessions.moved(told, now_s=time.monotonic())
        if moved is None:
            return
        session, released = moved
        dataset = self._located[session.stream]
        self._cache.keep(session.stream, _keys(dataset, told.held))
        self._cache.release(session.stream, _keys(dataset, released))
        self._cache.needs(session.stream, _keys(dataset, session.ahead))
        self._ahead.heed()

    def end_session(self, stream: str) -> None:
        """The trainer of a stream has ended; nothing happens if it is not known."""
        if self._sessions.close(stream) is not None:
            self._ended(stream)

    def _known(self, stream: str, name: str, dataset: Located) -> Session:
        """The session of a stream, made if it is not known; raises InvalidField if it reads another dataset."""
        session = self._sessions.heard(stream, name, now_s=time.monotonic())
        self._located.setdefault(stream, dataset)
        self._measures.sessions.set(len(self._sessions))
        return session

    def _ended(self, stream: str) -> None:
        self._located.pop(stream, None)
        self._cache.leave(stream)
        self._measures.sessions.set(len(self._sessions))
        self._ahead.heed()

    # --- verification ------------------------------------------------------------------------------------------------

    async def verify(
        self, name: str, shards: Sequence[int] | None = None, *, again: bool = False, stream: str | None = None
    ) -> VerifiedShards:
        """Make sure that shards are here and have their hashes, all of them if none are named.

        With `stream` they stay until its trainer releases them. Raises ShardCorrupt, IndexInvalid, CacheTooSmall,
        NotFound for a number that the index does not have, and what keeps a shard from being fetched.
        """
        dataset = self._located.get(stream or "") or await self._catalogue.locate(name)
        if stream is not None:
            self._known(stream, name, dataset)
        numbers = range(len(dataset.shards)) if shards is None else shards
        for number in numbers:
            dataset.shard(number)
        for number in numbers:
            if stream is None:
                await self._look_at(dataset, number, again=again)
            else:
                await self._hold(dataset, number, stream, again=again)
        size = sum(dataset.index.file.shards[number].bytes for number in numbers)
        return VerifiedShards(dataset=name, shards=tuple(numbers), bytes=size)

    async def _hold(self, dataset: Located, number: int, stream: str, *, again: bool) -> None:
        """Make a shard ready for a stream, whose trainer maps it then.

        Raises TransientError if its session ended meanwhile: what it held is held no more. Asked again, it is known.
        """
        session = self._known(stream, dataset.name, dataset)
        is_new = number not in session.held
        session.held.add(number)
        try:
            await self._make_ready(dataset, number, stream, again=again)
        except BaseException:
            if is_new:
                session.held.discard(number)
            raise
        if self._sessions.get(stream) is not session:
            raise stream_ended()

    async def _look_at(self, dataset: Located, number: int, *, again: bool) -> None:
        """Make a shard ready for somebody who only wants to know that it is whole."""
        reader = f"v-{secrets.token_hex(8)}"
        try:
            await self._make_ready(dataset, number, reader, again=again)
        finally:
            self._cache.leave(reader)

    async def _make_ready(self, dataset: Located, number: int, reader: str, *, again: bool) -> None:
        """One shard for a reader that waits; what is damaged in the cache is fetched once more."""
        shard = dataset.shard(number)
        if not shard.key:
            await self._verify_files(shard, again=again)
            return
        await self._cache.hold(dataset, number, reader, is_urgent=True)
        try:
            await self._verify_files(shard, again=again)
        except (ShardCorrupt, IndexInvalid) as exc:
            logger.warning("a cached shard is fetched again", extra={"path": str(shard.path), "problem": str(exc)})
            self._cache.discard(shard.key)
            await self._cache.hold(dataset, number, reader, is_urgent=True)
            await self._verify_files(shard, again=False)

    async def _verify_files(self, shard: LocatedShard, *, again: bool) -> None:
        for file in shard.files:
            await self._verification.verify(file, again=again)

    def _verified_ranges(self, dataset: Located) -> tuple[ShardRange, ...]:
        """In a thread: the files are looked at. What is in the cache must be asked for, so that it stays there."""
        if dataset.is_remote:
            return ()
        are_verified = self._verification.is_verified
        return ranges_of(
            number for number, shard in enumerate(dataset.shards) if all(are_verified(file) for file in shard.files)
        )

    # --- look-ahead --------------------------------------------------------------------------------------------------

    def _sizes(self, session: Session) -> Sequence[int]:
        """Of all shards of a session's dataset; none once it has ended."""
        dataset = self._located.get(session.stream)
        return dataset.sizes if dataset is not None else ()

    async def _prepare(self, session: Session, number: int) -> None:
        """Have a shard here, warm and verified, though nobody waits for it yet."""
        dataset = self._located.get(session.stream)
        if dataset is None:
            return  # it has ended just now
        shard = dataset.shard(number)
        if shard.key:
            await self._cache.hold(dataset, number, session.stream, is_urgent=False)
        for file in shard.files:
            await self._warm(file)
            async with self._hash_turn:
                await self._verification.verify(file, is_ahead=True)
        self._measures.ahead_bytes.inc(shard.bytes)

    async def _warm(self, file: Wanted) -> None:
        """Have the system bring a file into the page cache, piece by piece, in turn with other sessions."""
        for offset in range(0, file.bytes, _WARM_BYTES):
            async with self._warm_turn:
                await asyncio.to_thread(_warm, file.path, offset)


class _Memory:
    """The memory that is available, looked at once a second."""

    def __init__(self) -> None:
        self._looked_s = -math.inf
        self._half_bytes = 0

    def half_bytes(self) -> int:
        """More would push out of the page cache what is read now."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= 1:
            self._looked_s, self._half_bytes = now_s, psutil.virtual_memory().available // 2
        return self._half_bytes


def ranges_of(numbers: Iterable[int], *, limit: int = MAX_VERIFIED_RANGES) -> tuple[ShardRange, ...]:
    """Rising numbers as ranges; the first ones, if they are more than so many."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        elif len(found) < limit:
            found.append((number, 1))
        else:
            break
    return tuple(ShardRange(first=first, shards=shards) for first, shards in found)


def _keys(dataset: Located, numbers: Iterable[int]) -> list[str]:
    """Of those shards that belong into the cache."""
    if not dataset.is_remote:
        return []
    return [dataset.shards[number].key for number in numbers if number < len(dataset.shards)]


def _usual_cache_bytes(folder: Path) -> int:
    """Half of the disk that would be free without the cache."""
    present = folder
    while not present.exists():
        present = present.parent
    return int((psutil.disk_usage(str(present)).free + shelf.size_of(folder)) * _CACHE_FRAC)


def _warm(path: Path, offset: int) -> None:
    """Ask the system to bring a piece of a file into the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), offset, _WARM_BYTES, os.POSIX_FADV_WILLNEED)
