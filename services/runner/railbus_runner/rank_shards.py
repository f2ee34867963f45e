"""The shards that the ranks of one job hold and will read next, told to the runner as those of one trainer. Pure.

A shard is asked for once, by whichever rank needs it first, and is released when no rank holds it any more. A rank
counts as a holder from the moment it asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from railbus_runner.frames import Ahead, Verified, Verify
from railbus_shared.contracts.requests import ShardRange


class RankShards:
    """Questions and answers of all ranks."""

    def __init__(self, num_ranks: int, *, vouched: Iterable[ShardRange] = ()) -> None:
        """`vouched` are shards that the dataloader has vouched for when it opened the stream."""
        self._vouched = {number for one in vouched for number in range(one.first, one.first + one.shards)}
        self._held: list[set[int]] = [set() for _ in range(num_ranks)]
        self._ahead: list[tuple[int, ...]] = [() for _ in range(num_ranks)]
        self._waiting: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []  # rank, what it asked, what we asked
        self._told: tuple[int, ...] = ()

    def asked(self, rank: int, frame: Verify) -> tuple[Verified | None, Verify | None]:
        """A rank's answer, if it can be given now, and the question for the runner otherwise."""
        unknown = tuple(number for number in frame.shards if number not in self._vouched)
        self._held[rank].update(frame.shards)
        if not unknown:
            return Verified(shards=frame.shards), None
        is_asked = any(asked == unknown for _, _, asked in self._waiting)
        self._waiting.append((rank, frame.shards, unknown))
        return None, None if is_asked else Verify(shards=unknown)

    def verified(self, answer: Verified) -> list[tuple[int, Verified]]:
        """The ranks that waited for this answer of the runner, and theirs."""
        answered = [one for one in self._waiting if one[2] == answer.shards]
        self._waiting = [one for one in self._waiting if one[2] != answer.shards]
        if answer.error is None:
            self._vouched.update(answer.shards)
        else:
            for rank, shards, _ in answered:
                self._held[rank].difference_update(shards)
        return [(rank, Verified(shards=shards, error=answer.error)) for rank, shards, _ in answered]

    def ahead(self, rank: int, frame: Ahead) -> Ahead | None:
        """What the runner is to be told when a rank has moved on; None if it is nothing new."""
        self._ahead[rank] = frame.shards
        self._held[rank].difference_update(frame.released)
        released = set(frame.released) & self._vouched - set().union(*self._held)
        self._vouched -= released
        in_turns = itertools.zip_longest(*self._ahead)
        ahead = tuple(dict.fromkeys(number for turn in in_turns for number in turn if number is not None))
        if not released and ahead == self._told:
            return None
        self._told = ahead
        return Ahead(shards=ahead, released=tuple(sorted(released)))
