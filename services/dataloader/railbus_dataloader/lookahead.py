"""Look-ahead: shards made ready in the order in which the trainers will need them.

Each session is followed by a task of its own that makes its next shard ready, one after another, as far ahead as its
share of the byte budget reaches; all sessions have the same share. When a trainer's word shows that it will not need a
shard after all, what is being done for it is given up; when a session ends, so is everything. Of sessions whose
trainers have not spoken yet a few are followed, by a guess: anybody may open a stream and never be heard of again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from railbus_dataloader.sessions import Session, Sessions, window
from railbus_shared.errors import RailbusError, TransientError
from railbus_shared.waiting import end

logger = logging.getLogger(__name__)

_RETRY_S: Final = 1.0
_MAX_GUESSED: Final = 8

Prepare = Callable[[Session, int], Awaitable[None]]
"""Make one shard ready for a session; raises what keeps it from being read."""


@dataclass
class _Following:
    """The task of one session."""

    session: Session
    news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class LookAhead:
    """Looks ahead for all sessions of a host."""

    def __init__(
        self,
        sessions: Sessions,
        *,
        prepare: Prepare,
        sizes: Callable[[Session], Sequence[int]],
        budget_bytes: Callable[[], int],
    ) -> None:
        """`sizes` are of all shards of a session's dataset; `budget_bytes` is asked for before every shard."""
        self._sessions = sessions
        self._prepare = prepare
        self._sizes = sizes
        self._budget_bytes = budget_bytes
        self._following: dict[str, _Following] = {}
        self._news = asyncio.Event()

    def heed(self) -> None:
        """A session has come, moved or ended; the shares of the others change with it."""
        self._news.set()

    async def run(self) -> None:
        """Look ahead until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._news.clear()
                live = {session.stream: session for session in self._to_follow()}
                for stream, following in list(self._following.items()):
                    if live.get(stream) is not following.session:
                        del self._following[stream]
                        if following.task is not None:
                            following.task.cancel()
                for stream, session in live.items():
                    if stream not in self._following:
                        following = self._following[stream] = _Following(session)
                        following.task = tasks.create_task(self._follow(following))
                for following in self._following.values():
                    following.news.set()
                await self._news.wait()

    def _to_follow(self) -> list[Session]:
        sessions = list(self._sessions)
        guessed = [session for session in sessions if not session.has_spoken]
        return [session for session in sessions if session.has_spoken] + guessed[:_MAX_GUESSED]

    async def _follow(self, following: _Following) -> None:
        """Make a session's shards ready, always the next one; one that is ready stays so until its place has passed."""
        session = following.session
        ready: set[int] = set()
        while True:
            following.news.clear()
            ready &= set(session.ahead)
            number = next((number for number in self._window(session) if number not in ready), None)
            if number is None:
                await following.news.wait()
            elif await self._unless_unwanted(following, number):
                ready.add(number)

    def _window(self, session: Session) -> list[int]:
        share_bytes = self._budget_bytes() // max(1, len(self._following))
        return window(session, self._sizes(session), share_bytes=share_bytes)

    async def _unless_unwanted(self, following: _Following, number: int) -> bool:
        """Make a shard ready, until it turns out that it is not wanted next; whether it need not be tried again."""
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(self._try(following.session, number))
            while not work.done():
                news = tasks.create_task(following.news.wait())
                await asyncio.wait({work, news}, return_when=asyncio.FIRST_COMPLETED)
                await end(news)
                following.news.clear()
                if number not in self._window(following.session):
                    await end(work)
        return not work.cancelled() and work.result()

    async def _try(self, session: Session, number: int) -> bool:
        """False if it is to be tried again; whoever reads a shard is told what is wrong with it."""
        try:
            await self._prepare(session, number)
        except (RailbusError, OSError) as exc:
            told = {"dataset": session.dataset, "shard": number, "problem": str(exc)}
            logger.warning("shard not ready", extra=told)
            if isinstance(exc, TransientError):
                await asyncio.sleep(_RETRY_S)
                return False
        return True
