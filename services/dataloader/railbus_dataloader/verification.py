"""Which shards have been verified on this host, remembered over restarts.

A shard's hash is computed once, here or as its bytes were written. It counts for as long as the file's size,
modification time and inode stay what they were; several who ask for the same shard at the same time share one hashing.
Look-ahead hashes in a thread of its own, so that no reader waits behind it for a shard that nobody needs yet.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_shared import files
from railbus_shared.data.verified import Fingerprint, Verified, read_verified, write_verified
from railbus_shared.errors import IndexInvalid, ShardCorrupt, StorageFull

logger = logging.getLogger(__name__)

_THREADS: Final = 2


@dataclass(frozen=True)
class Wanted:
    """A shard and the hash that its index states."""

    path: Path
    sha256: str
    bytes: int


class Verification:
    """The memory of verified shards. Files are looked at and hashed in threads of its own; used from one event loop."""

    def __init__(
        self,
        memory: Path,
        *,
        hash_file: Callable[[Path], str] = files.sha256_file,
        hashed: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`hashed` is told, in a thread, the size of every file that was hashed and is whole."""
        self._memory = memory
        self._hash_file = hash_file
        self._hashed = hashed
        self._known = read_verified(memory)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
        self._ahead_thread = ThreadPoolExecutor(1, thread_name_prefix="verify-ahead")
        self._running: dict[tuple[Wanted, bool], asyncio.Future[None]] = {}

    def is_verified(self, wanted: Wanted) -> bool:
        """Whether the file is the one that was verified to have this hash; looks at it, so call it in a thread."""
        known = self._known.get(str(wanted.path))
        try:
            return known is not None and known == (Fingerprint.of(wanted.path), wanted.sha256)
        except OSError:
            return False  # whoever reads it is told why it cannot be read

    async def verify(self, wanted: Wanted, *, again: bool = False, is_ahead: bool = False) -> None:
        """Make sure that the shard has its hash; raises ShardCorrupt, or IndexInvalid if it cannot be read.

        With `again` it is hashed even if it is remembered. Who asks while the same is under way gets its outcome.
        """
        key = (wanted, again)
        running = self._running.get(key)
        if running is None:
            threads = self._ahead_thread if is_ahead else self._threads
            running = asyncio.get_running_loop().run_in_executor(threads, self._verify, wanted, again)
            self._running[key] = running
            running.add_done_callback(lambda done: self._forget(key, done))
        await asyncio.shield(running)

    async def close(self) -> None:
        """Wait for what is being hashed, and end the threads."""
        for threads in (self._threads, self._ahead_thread):
            await asyncio.to_thread(threads.shutdown)

    def _forget(self, key: tuple[Wanted, bool], done: asyncio.Future[None]) -> None:
        """The failure of a hashing whose askers have all gone has been logged, and is nobody's."""
        del self._running[key]
        if not done.cancelled():
            done.exception()

    # --- in a thread -------------------------------------------------------------------------------------------------

    def vouched(self, wanted: Wanted, was: Fingerprint) -> None:
        """Somebody hashed the file as it was written, and it had this hash and then this fingerprint.

        It is remembered as verified if it is still the same; else it will be hashed by whoever asks for it.
        """
        try:
            now = Fingerprint.settled(wanted.path)
        except OSError:
            return  # whoever reads it is told why it cannot be read
        if now == was:
            self._remember(wanted.path, Verified(now, wanted.sha256))

    def _verify(self, wanted: Wanted, again: bool) -> None:
        if not again and self.is_verified(wanted):
            return
        try:
            before = Fingerprint.settled(wanted.path)
            actual = self._hash_file(wanted.path)
        except OSError as exc:
            raise IndexInvalid(
                f"{wanted.path} cannot be read, but the index names it: {exc.strerror}",
                hint="import the dataset again",
                details={"path": str(wanted.path)},
            ) from exc
        is_whole = actual == wanted.sha256
        self._remember(wanted.path, Verified(before, actual) if is_whole else None)
        if not is_whole:
            logger.error("shard is damaged", extra={"path": str(wanted.path), "actual": actual})
            raise ShardCorrupt(path=str(wanted.path), expected=wanted.sha256, actual=actual)
        self._hashed(before.size)

    def _remember(self, path: Path, known: Verified | None) -> None:
        """Remember a shard, or forget it; a memory that cannot be written costs a hashing after the next start."""
        with self._lock:
            self._known.pop(str(path), None)
            if known is not None:
                self._known[str(path)] = known
            try:
                write_verified(self._memory, self._known)
            except (OSError, StorageFull) as exc:
                logger.warning("verified shards not remembered", extra={"problem": repr(exc)})
