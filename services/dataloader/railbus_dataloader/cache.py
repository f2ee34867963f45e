"""The cache: shards of datasets that lie elsewhere, on this host's disk, within a budget that is never exceeded.

`Admission` decides; here files are fetched and removed as it says. What lies on the disk is the truth: a shard is a
folder that appears whole, by one rename, once its files have come and have their hashes. What a crash has left is
removed at the start, and what lies there then is kept for as long as a session may live in silence, so that trainers
that went on meanwhile find their shards.

Everybody who waits for a shard shares one fetch of it; a fetch that nobody waits for any more is given up. The budget
counts the bytes of files; room is reserved in full before the first byte of a shard is fetched, and given back once
the last one is gone.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from railbus_dataloader import shelf
from railbus_dataloader.admission import Action, Admission, Ask, Evict, Fetch, Refuse, State
from railbus_dataloader.catalogue import Located, LocatedShard
from railbus_dataloader.measures import Measures
from railbus_dataloader.sources import Source
from railbus_dataloader.verification import Verification, Wanted
from railbus_shared import files
from railbus_shared.data.verified import Fingerprint
from railbus_shared.errors import RailbusError, ShardCorrupt, TransientError
from railbus_shared.layout import cached_shard
from railbus_shared.waiting import is_set_within

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.5
_PATIENCE_S: Final = 2.0
"""A trainer's word that it has released a shard may be under way for so long."""
_FORMER: Final = "former"
"""Holds what lay here at the start; no stream is called so."""
_AGAIN_S: Final = 30.0
"""Until it is tried again to remove what could not be removed."""

Tell = Callable[[str, dict[str, object]], None]
"""Told what has happened, as the type and the data of an event."""


@dataclass
class _Fetching:
    """A fetch under way, and how many wait for it."""

    outcome: asyncio.Future[None]
    task: asyncio.Task[None]
    waiting: int = 0


@dataclass
class _Asking:
    """An ask that waits for room, and how many wait with it."""

    admitted: asyncio.Future[None]
    parcel: _Parcel
    waiting: int = 0


@dataclass(frozen=True)
class _Parcel:
    """What is to be fetched, and from where."""

    dataset: Located
    shard: LocatedShard
    began_s: float = field(default_factory=time.monotonic)


class Cache:
    """All cached shards of one host."""

    def __init__(
        self,
        folder: Path,
        *,
        budget_bytes: int,
        former_s: float,
        verification: Verification,
        measures: Measures,
        tell: Tell,
    ) -> None:
        """What lies in `folder` at the start is kept for `former_s`, whoever wants room."""
        self._folder = folder
        self._former_s = former_s
        self._verification = verification
        self._measures = measures
        self._tell = tell
        self._admission = Admission(budget_bytes, patience_s=_PATIENCE_S)
        self._asking: dict[Ask, _Asking] = {}
        self._fetching: dict[str, _Fetching] = {}
        self._spoiled: set[str] = set()
        self._news = asyncio.Event()
        self._is_stocked = asyncio.Event()

    # --- what sessions want ------------------------------------------------------------------------------------------

    async def hold(self, dataset: Located, number: int, session: str, *, is_urgent: bool) -> None:
        """Have a shard here. With `is_urgent` a reader waits, and the shard stays until it is released.

        Raises CacheTooSmall if there will never be room for it, what the last source raised if none could bring it,
        StorageFull.
        """
        await self._is_stocked.wait()
        shard = dataset.shard(number)
        was_pinned = self._admission.has_pinned(session, shard.key)
        if is_urgent:
            self._admission.pin(session, shard.key)
            is_here = self._admission.state(shard.key) is State.HERE
            (self._measures.cache_hits if is_here else self._measures.cache_misses).inc()
        try:
            await self._until_here(_Parcel(dataset, shard), session, is_urgent=is_urgent)
        except BaseException:
            if is_urgent and not was_pinned:
                self.release(session, [shard.key])
            raise
        if is_urgent:
            self._admission.touch(shard.key)
            await asyncio.to_thread(shelf.mark_used, shard.path.parent)

    def keep(self, session: str, keys: Sequence[str]) -> None:
        """A session says that it holds these."""
        for key in keys:
            self._admission.pin(session, key)

    def release(self, session: str, keys: Sequence[str]) -> None:
        for key in keys:
            self._admission.unpin(session, key)
        self._news.set()

    def needs(self, session: str, keys: Sequence[str]) -> None:
        """What a session will need, in order."""
        self._admission.needs(session, keys)
        self._news.set()

    def leave(self, session: str) -> None:
        """A session has ended."""
        self._admission.leave(session)
        for ask in [ask for ask in self._asking if ask.session == session]:
            self._asking.pop(ask).admitted.set_exception(stream_ended())
        self._news.set()

    def discard(self, key: str) -> None:
        """A shard that lies here is damaged: remove it, whoever holds it."""
        if self._admission.spoil(key):
            self._spoiled.add(key)
            self._news.set()

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def _until_here(self, parcel: _Parcel, session: str, *, is_urgent: bool) -> None:
        key = parcel.shard.key
        ask = Ask(session, key, parcel.shard.bytes, is_urgent)
        while (state := self._admission.state(key)) is not State.HERE:
            if state is State.FETCHING:
                await self._fetched(key)
            else:
                await self._admitted(ask, parcel)

    async def _admitted(self, ask: Ask, parcel: _Parcel) -> None:
        """Wait until the shard's fetch has begun; raises CacheTooSmall."""
        asking = self._asking.get(ask)
        if asking is None:
            self._admission.ask(ask)
            asking = self._asking[ask] = _Asking(asyncio.get_running_loop().create_future(), parcel)
            self._news.set()
        asking.waiting += 1
        try:
            await asyncio.shield(asking.admitted)
        finally:
            asking.waiting -= 1
            if not asking.waiting and not asking.admitted.done():
                del self._asking[ask]
                self._admission.withdraw(ask)

    async def _fetched(self, key: str) -> None:
        """Wait for the end of a fetch; raises what it failed with."""
        fetching = self._fetching[key]
        fetching.waiting += 1
        try:
            await asyncio.shield(fetching.outcome)
        finally:
            fetching.waiting -= 1
            if not fetching.waiting and not fetching.outcome.done():
                fetching.task.cancel()

    # --- acting ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Fetch and evict until cancelled."""
        await self._take_stock()
        former_until_s = time.monotonic() + self._former_s
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._news.clear()
                now_s = time.monotonic()
                if now_s >= former_until_s:
                    self._admission.leave(_FORMER)
                while self._spoiled:
                    tasks.create_task(self._evict(self._spoiled.pop()))
                for action in self._admission.decide(now_s):
                    self._act(action, tasks)
                self._measures.cache_bytes.set(self._admission.used_bytes)
                self._measures.cache_waiting.set(self._admission.num_waiting)
                await is_set_within(self._news, _LOOK_S)

    def _act(self, action: Action, tasks: asyncio.TaskGroup) -> None:
        match action:
            case Fetch(key):
                parcel = self._let_look(key)[0].parcel
                outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                outcome.add_done_callback(lambda done: done.exception())  # it may be that nobody waits any more
                task = tasks.create_task(self._fetch(parcel, outcome))
                self._fetching[key] = _Fetching(outcome, task)
            case Evict(key):
                tasks.create_task(self._evict(key))
            case Refuse(ask, error):
                logger.warning("shard refused", extra={"session": ask.session, "error": error.to_wire()})
                self._asking.pop(ask).admitted.set_exception(error)

    def _let_look(self, key: str) -> list[_Asking]:
        """Have all who wait for room for a shard look again where it is; these."""
        found = [ask for ask in self._asking if ask.key == key]
        for ask in found:
            self._admission.withdraw(ask)
        looking = [self._asking.pop(ask) for ask in found]
        for asking in looking:
            asking.admitted.set_result(None)
        return looking

    async def _take_stock(self) -> None:
        self._measures.cache_budget_bytes.set(self._admission.budget_bytes)
        for key, size_bytes in await asyncio.to_thread(
            shelf.stock, self._folder, budget_bytes=self._admission.budget_bytes
        ):
            self._admission.found(key, size_bytes)
            self._admission.pin(_FORMER, key)
        self._is_stocked.set()

    async def _fetch(self, parcel: _Parcel, outcome: asyncio.Future[None]) -> None:
        """Bring a shard; whoever waits looks again, or is told why it cannot be had."""
        key = parcel.shard.key
        temporary = files.temporary_path(parcel.shard.path.parent)
        error: BaseException | None = None
        is_here = False
        try:
            await self._bring(parcel, temporary)
            is_here = True
        except (RailbusError, OSError) as exc:
            logger.warning("shard not fetched", extra={"path": str(parcel.shard.path), "problem": str(exc)})
            error = exc if isinstance(exc, RailbusError) else _unwritable(parcel.shard.path, exc)
        finally:
            if not is_here:
                await asyncio.to_thread(shutil.rmtree, temporary, ignore_errors=True)
            self._settle(key, is_here=is_here)
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

    def _settle(self, key: str, *, is_here: bool) -> None:
        del self._fetching[key]
        if is_here:
            self._admission.fetched(key)
        else:
            self._admission.gone(key)
        self._news.set()

    async def _bring(self, parcel: _Parcel, temporary: Path) -> None:
        dataset, shard = parcel.dataset, parcel.shard
        began_s = time.monotonic()
        await asyncio.to_thread(shelf.make_empty, temporary)
        brought = [await self._bring_file(dataset, file, temporary / file.path.name) for file in shard.files]
        await asyncio.to_thread(self._publish, shard, temporary, [fingerprint for _, fingerprint in brought])
        self._measures.fetched_bytes.inc(shard.bytes)
        self._tell(
            "dataset.fetched",
            {
                "dataset": dataset.name,
                "file": shard.path.name,
                "bytes": shard.bytes,
                "seconds": round(time.monotonic() - began_s, 3),
                "waited_s": round(began_s - parcel.began_s, 3),
                "source": type(brought[0][0]).__name__,
            },
        )

    async def _bring_file(self, dataset: Located, file: Wanted, into: Path) -> tuple[Source, Fingerprint]:
        """One file, whole: who brought it, and what it was when it had been hashed; raises what the last one raised."""
        error: RailbusError = TransientError(f"there is no source for {file.path.name!r} of {dataset.name!r}")
        for source in dataset.sources:
            try:
                with files.storage_errors(into):
                    return source, await source.fetch(dataset.wanted_file(file), into)
            except TransientError as exc:
                error = exc
            except ShardCorrupt as exc:
                await asyncio.to_thread(into.unlink, missing_ok=True)
                error = exc
            logger.info("the next source is tried", extra={"file": file.path.name, "problem": str(error)})
        raise error

    def _publish(self, shard: LocatedShard, temporary: Path, fingerprints: Sequence[Fingerprint]) -> None:
        """Give a fetched shard its place, and remember that its bytes were hashed as they came; in a thread."""
        shelf.publish(temporary, shard.path.parent)
        for file, fingerprint in zip(shard.files, fingerprints, strict=True):
            self._verification.vouched(file, fingerprint)

    async def _evict(self, key: str) -> None:
        """Remove a shard that is to leave. One that cannot leave its place stays, and may be read."""
        folder = cached_shard(self._folder, key)
        try:
            leaving = await asyncio.to_thread(shelf.retire, folder)
        except OSError as exc:
            self._admission.fetched(key)
            self._let_look(key)
            await self._let_be(key, folder, exc)
            self._admission.leave(_unremovable(key))
            self._news.set()
            return
        entry = key
        while (problem := await _problem_of_clearing(leaving)) is not None:
            if entry == key:
                entry = leaving.name
                self._admission.remains(key, entry)
            await self._let_be(entry, leaving, problem)
        self._admission.gone(entry)
        self._admission.leave(_unremovable(entry))
        self._measures.cache_evictions.inc()
        self._tell("dataset.evicted", {"key": key, "cache_bytes": self._admission.used_bytes})
        self._news.set()

    async def _let_be(self, entry: str, path: Path, problem: OSError) -> None:
        """What cannot be removed goes on counting, and is not to leave; returns when it may be tried again."""
        told = {"path": str(path), "problem": repr(problem)}
        logger.error("a shard cannot be removed, and goes on counting", extra=told)
        self._tell("dataset.evicted", {"key": entry, "problem": repr(problem)})
        self._admission.pin(_unremovable(entry), entry)
        self._news.set()
        await asyncio.sleep(_AGAIN_S)


def _unremovable(entry: str) -> str:
    """What holds an entry that cannot be removed; no stream is called so."""
    return f"unremovable {entry}"


async def _problem_of_clearing(leaving: Path) -> OSError | None:
    try:
        await asyncio.to_thread(shelf.clear, leaving)
    except OSError as exc:
        return exc
    return None


def _unwritable(path: Path, exc: OSError) -> TransientError:
    return TransientError(f"{path} cannot be fetched: {exc.strerror or exc!r}", hint="it is tried again")


def stream_ended() -> TransientError:
    return TransientError(
        "the stream was silent for too long and was closed", hint="ask again, and it is taken up again"
    )
