"""Who may bring which shard into the cache, and what must leave for it. The rules, without I/O; time is an argument.

Invariants: the bytes of all entries, those that are still being fetched counted in full, never exceed the budget; what
a session has pinned or what is being fetched is never evicted; whoever asks is admitted or refused in the end.

Room is given in this order. A reader that waits (an urgent ask) goes before anybody's look-ahead; among equals, the
session whose last admission is longest ago goes first. A reader may push out anything that is not pinned; look-ahead
only what is needed later than its own shard. What is needed last leaves first (Belady, with the order that the trainers
told), and of what nobody is known to need, what was not used for longest.

A reader that must wait for room keeps others, and all look-ahead, from passing it for as long as those who hold the
room let go of shards now and then and are not waiting themselves. One that waits for what nobody will let go of is
passed, and refused after a while: if what its own session holds leaves no room for it, or if all who hold room wait for
each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from enum import Enum, auto

from railbus_shared.errors import CacheTooSmall


class State(Enum):
    """Of an entry of the cache."""

    FETCHING = auto()
    HERE = auto()
    LEAVING = auto()
    """Its bytes count until they are gone from the disk."""


@dataclass(frozen=True)
class Ask:
    """A session wants a shard here."""

    session: str
    key: str
    bytes: int
    is_urgent: bool
    """A reader waits for it; otherwise it is look-ahead."""


@dataclass(frozen=True)
class Fetch:
    """The room for it is reserved: fetch it, then call `fetched` or `gone`."""

    key: str


@dataclass(frozen=True)
class Evict:
    """Remove it, then call `gone`."""

    key: str


@dataclass(frozen=True)
class Refuse:
    """It will never fit."""

    ask: Ask
    error: CacheTooSmall


Action = Fetch | Evict | Refuse


@dataclass
class _Entry:
    bytes: int
    state: State


class Admission:
    """The bytes of one cache, and everybody who wants some."""

    def __init__(self, budget_bytes: int, *, patience_s: float = 0.0) -> None:
        """Who waits for what will never be free is refused after `patience_s`: a word may be under way."""
        self.budget_bytes = budget_bytes
        self._patience_s = patience_s
        self._entries: dict[str, _Entry] = {}  # the least recently used first
        self._pins: dict[str, set[str]] = {}  # by key
        self._needs: dict[str, dict[str, int]] = {}  # by session: when each key is needed, in shards from its place
        self._asks: dict[Ask, None] = {}  # in order of arrival
        self._turns: dict[str, int] = {}  # by session: the number of its last admission
        self._admitted = 0
        self._giving: set[str] = set()  # sessions that have let go of something
        self._stuck_since: dict[Ask, float] = {}

    # --- what is there -----------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values())

    @property
    def num_waiting(self) -> int:
        """Asks that wait for room."""
        return len(self._asks)

    def state(self, key: str) -> State | None:
        """None if it is neither here nor on its way."""
        entry = self._entries.get(key)
        return entry.state if entry is not None else None

    def found(self, key: str, size_bytes: int) -> None:
        """An entry lay here at the start; call it for the least recently used first, and for no more than fit."""
        self._entries[key] = _Entry(size_bytes, State.HERE)

    def touch(self, key: str) -> None:
        """An entry is used now."""
        self._entries[key] = self._entries.pop(key)

    def fetched(self, key: str) -> None:
        self._entries[key].state = State.HERE
        self.touch(key)

    def spoil(self, key: str) -> bool:
        """An entry is damaged: it leaves, whoever has pinned it; False if it is not here."""
        if self.state(key) is not State.HERE:
            return False
        self._entries[key].state = State.LEAVING
        return True

    def gone(self, key: str) -> None:
        """An entry has left the disk, or its fetch has failed and left nothing there."""
        del self._entries[key]

    def remains(self, key: str, name: str) -> None:
        """An entry has left, but not its bytes: they go on counting under another name."""
        entry = self._entries.pop(key)
        self._entries[name] = _Entry(entry.bytes, State.HERE)

    # --- who wants what ----------------------------------------------------------------------------------------------

    def ask(self, ask: Ask) -> None:
        """Wait for room, until an action names the key or the ask; raises CacheTooSmall if it is larger than all."""
        if ask.bytes > self.budget_bytes:
            raise _too_small(ask, 0, self.budget_bytes, "which is smaller than the shard alone")
        self._asks[ask] = None

    def withdraw(self, ask: Ask) -> None:
        """Wait no more."""
        self._asks.pop(ask, None)
        self._stuck_since.pop(ask, None)

    def pin(self, session: str, key: str) -> None:
        """Keep an entry, or one that is to come, until the session unpins it or leaves."""
        self._pins.setdefault(key, set()).add(session)

    def unpin(self, session: str, key: str) -> None:
        if self.has_pinned(session, key):
            if key in self._entries:
                self._giving.add(session)
            self._drop_pin(session, key)

    def has_pinned(self, session: str, key: str) -> bool:
        return session in self._pins.get(key, ())

    def needs(self, session: str, keys: Sequence[str]) -> None:
        """What a session needs next, in order, in place of what it said before."""
        self._needs[session] = {key: place for place, key in reversed(list(enumerate(keys)))}

    def leave(self, session: str) -> None:
        """Forget a session, its pins and its asks."""
        for key in [key for key, sessions in self._pins.items() if session in sessions]:
            self._drop_pin(session, key)
        for ask in [ask for ask in self._asks if ask.session == session]:
            self.withdraw(ask)
        self._needs.pop(session, None)
        self._turns.pop(session, None)
        self._giving.discard(session)

    def _drop_pin(self, session: str, key: str) -> None:
        self._pins[key].discard(session)
        if not self._pins[key]:
            del self._pins[key]

    # --- what is to be done ------------------------------------------------------------------------------------------

    def decide(self, now_s: float) -> list[Action]:
        """What is to be done now; call it whenever anything has changed, and from time to time while anybody waits."""
        actions: list[Action] = []
        asks = self._in_turn()
        readers = [ask for ask in asks if ask.is_urgent]
        waiting, may_pass = self._serve_readers(readers, actions)
        if may_pass:
            for ask in asks:
                if not ask.is_urgent:
                    self._serve(ask, actions)
        actions += self._refused(waiting, now_s)
        return actions

    def _in_turn(self) -> list[Ask]:
        return sorted(self._asks, key=lambda ask: self._turns.get(ask.session, 0))

    def _serve_readers(self, asks: list[Ask], actions: list[Action]) -> tuple[list[Ask], bool]:
        """Give readers room in turn; those that must wait, and whether look-ahead may pass them."""
        may_pass = True
        waiting: list[Ask] = []
        for ask in asks:
            if ask not in self._asks:
                continue  # its shard was admitted for another session
            if may_pass and self._serve(ask, actions):
                continue
            may_pass = may_pass and not self._is_coming(ask)
            waiting.append(ask)
        return waiting, may_pass

    def _serve(self, ask: Ask, actions: list[Action]) -> bool:
        """Admit an ask, or see to it that what makes room for it leaves; whether it was admitted."""
        if ask not in self._asks or ask.key in self._entries:
            return (
                False  # it was admitted for another session; or it leaves just now, and can come back once it is gone
            )
        missing = ask.bytes - (self.budget_bytes - self.used_bytes)
        if missing > 0:
            beyond = -1.0 if ask.is_urgent else self._needs.get(ask.session, {}).get(ask.key, math.inf)
            actions.extend(self._evict(self._victims(missing - self._leaving_bytes, beyond=beyond)))
            return False
        self._admit(ask)
        actions.append(Fetch(ask.key))
        return True

    def _admit(self, ask: Ask) -> None:
        self._admitted += 1
        self._turns[ask.session] = self._admitted
        self._entries[ask.key] = _Entry(ask.bytes, State.FETCHING)
        for same in [same for same in self._asks if same.key == ask.key]:
            self.withdraw(same)

    def _evict(self, keys: list[str]) -> Iterator[Action]:
        for key in keys:
            self._entries[key].state = State.LEAVING
            yield Evict(key)

    def _victims(self, wanted_bytes: int, *, beyond: float) -> list[str]:
        """Entries whose leaving gives so many bytes, those needed last first; none if all together give less."""
        found: list[str] = []
        for key in sorted(self._evictable(beyond), key=self._next_need, reverse=True):
            if wanted_bytes <= 0:
                break
            found.append(key)
            wanted_bytes -= self._entries[key].bytes
        return found if wanted_bytes <= 0 else []

    def _evictable(self, beyond: float) -> list[str]:
        """Entries that nobody has pinned and nobody needs so soon, the least recently used first."""
        return [
            key
            for key, entry in self._entries.items()
            if entry.state is State.HERE
            and key not in self._pins
            and ((need := self._next_need(key)) > beyond or math.isinf(need))
        ]

    def _next_need(self, key: str) -> float:
        return min((places.get(key, math.inf) for places in self._needs.values()), default=math.inf)

    @property
    def _leaving_bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values() if entry.state is State.LEAVING)

    # --- who waits in vain -------------------------------------------------------------------------------------------

    def _is_coming(self, ask: Ask) -> bool:
        """Whether room for it comes by itself: nobody keeps it who does not let go of shards now and then."""
        return ask.key in self._entries or self.budget_bytes - self._kept_bytes(but=self._giving_now()) >= ask.bytes

    def _giving_now(self) -> set[str]:
        """Sessions that have let go of shards before, and are not waiting."""
        return self._giving - {ask.session for ask in self._asks if ask.is_urgent}

    def _kept_bytes(self, *, but: Set[str] = frozenset()) -> int:
        """Bytes of what is pinned by others than these sessions; all else leaves when there is need."""
        return sum(
            entry.bytes
            for key, entry in self._entries.items()
            if entry.state is not State.LEAVING and self._pins.get(key, set()) - but
        )

    def _refused(self, waiting: list[Ask], now_s: float) -> Iterator[Action]:
        """Refuse, of those that have waited in vain for long enough, all that bar their own way, else the newest."""
        in_vain = self._in_vain(waiting)
        self._stuck_since = {ask: self._stuck_since.get(ask, now_s) for ask in in_vain}
        for ask, error in in_vain.items():
            if now_s - self._stuck_since[ask] >= self._patience_s:
                self.withdraw(ask)
                yield Refuse(ask, error)

    def _in_vain(self, waiting: list[Ask]) -> dict[Ask, CacheTooSmall]:
        in_vain: dict[Ask, CacheTooSmall] = {}
        for ask in waiting:
            held = self._held_bytes(ask.session)
            if held + ask.bytes > self.budget_bytes:
                why = f"of which {held} bytes are held by the same trainer"
                in_vain[ask] = _too_small(ask, held, self.budget_bytes, why)
        if in_vain or not self._is_deadlock(waiting):
            return in_vain
        newest = [ask for ask in self._asks if ask in waiting and self._held_bytes(ask.session)][-1:]
        why = "of which the rest is held by trainers that wait for each other"
        return {ask: _too_small(ask, self._held_bytes(ask.session), self.budget_bytes, why) for ask in newest}

    def _is_deadlock(self, waiting: list[Ask]) -> bool:
        """Whether none of those that wait can be given room until another of them lets go."""
        room = self.budget_bytes - self._kept_bytes()
        holders = {session for key in self._entries for session in self._pins.get(key, ())}
        return holders <= {ask.session for ask in waiting} and all(ask.bytes > room for ask in waiting)

    def _held_bytes(self, session: str) -> int:
        return sum(
            entry.bytes
            for key, entry in self._entries.items()
            if entry.state is not State.LEAVING and session in self._pins.get(key, ())
        )


def _too_small(ask: Ask, held_bytes: int, budget_bytes: int, why: str) -> CacheTooSmall:
    return CacheTooSmall(needed_bytes=ask.bytes, held_bytes=held_bytes, budget_bytes=budget_bytes, why=why)
