"""Sessions: who reads which dataset now, what each will read next, and which shards each holds.

A session is opened with a stream, moved by what its trainer says, and ends when it is closed or has not been heard of
for a while. Shards that it holds stay where they are until it releases them or ends. A session that is not known (this
process was started since) is made again from whatever names its dataset, so that nothing is lost but its look-ahead,
which comes with the next word of its trainer. No I/O; time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from railbus_shared.contracts.requests import StreamProgress
from railbus_shared.errors import InvalidField

_MAX_SESSIONS: Final = 1024
"""Beyond that the one that has been silent longest ends; a trainer speaks every few seconds."""


@dataclass
class Session:
    """One stream of one trainer."""

    stream: str
    dataset: str
    heard_s: float
    ahead: tuple[int, ...] = ()
    """Shards in the order of their first need, from the trainer's place on."""
    held: set[int] = field(default_factory=set)
    """Shards that the trainer has mapped, or is about to."""
    word: int = 0
    """The number of the trainer's latest word."""
    has_spoken: bool = False
    """Whether `ahead` is its trainer's word, and not a guess."""


class Sessions:
    """All sessions of one host."""

    def __init__(self, *, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._sessions: dict[str, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, stream: str) -> Session | None:
        return self._sessions.get(stream)

    def heard(self, stream: str, dataset: str, *, now_s: float) -> Session:
        """The session of a stream, made if it is not known; raises InvalidField if it reads another dataset."""
        session = self._sessions.get(stream)
        if session is None:
            session = self._sessions[stream] = Session(stream, dataset, now_s)
        if session.dataset != dataset:
            raise InvalidField(
                field="stream",
                value=stream,
                problem=f"it reads dataset {session.dataset!r}, not {dataset!r}",
                hint="open a stream for each dataset",
            )
        session.heard_s = max(session.heard_s, now_s)
        return session

    def moved(self, told: StreamProgress, *, now_s: float) -> tuple[Session, frozenset[int]] | None:
        """Take a trainer's word; its session and what it really released.

        None if nothing is known of it, or if a later word has come already: what this one holds may have been released
        since. What is released and held in one word is held: it was mapped again before the word came.
        """
        dataset = told.dataset
        if dataset is None:
            known = self._sessions.get(told.stream)
            if known is None:
                return None
            dataset = known.dataset
        session = self.heard(told.stream, dataset, now_s=now_s)
        if told.number < session.word:
            return None
        session.word = told.number
        session.ahead, session.has_spoken = tuple(dict.fromkeys(told.ahead)), True
        released = frozenset(told.released) & session.held - set(told.held)
        session.held |= set(told.held)
        session.held -= released
        return session, released

    def close(self, stream: str) -> Session | None:
        """End a session; None if there is none."""
        return self._sessions.pop(stream, None)

    def expired(self, now_s: float) -> list[Session]:
        """End those that have been silent for too long, and the most silent of too many; returns them."""
        by_silence = sorted(self, key=lambda one: one.heard_s)
        surplus = max(0, len(self) - _MAX_SESSIONS)
        ended = [one for place, one in enumerate(by_silence) if place < surplus or now_s - one.heard_s >= self.ttl_s]
        for session in ended:
            del self._sessions[session.stream]
        return ended


def window(session: Session, sizes: Sequence[int], *, share_bytes: int) -> list[int]:
    """Shards to make ready now, in order: those not held, as far ahead as the share reaches, and one at least."""
    found: list[int] = []
    left_bytes = share_bytes
    for number in session.ahead:
        if number in session.held or number >= len(sizes):
            continue
        left_bytes -= sizes[number]
        if found and left_bytes < 0:
            break
        found.append(number)
    return found
