"""What the streams of one trainer hold and will read next, told to the runner as one.

A shard is verified once, however many streams read it; it counts as released when none of them holds it any more, and
must then be verified again before it is read, for nothing keeps it on the host. A stream that is gone holds nothing.
Out: verify, ahead. In: verified.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence

from railbus_runner.channel import TrainerChannel
from railbus_runner.frames import Ahead, Verified, Verify
from railbus_shared.contracts.requests import ShardRange
from railbus_shared.errors import error_from_wire


class ShardUse:
    """Shards as the trainer uses them; from its main thread."""

    def __init__(self, channel: TrainerChannel, *, verified: Iterable[ShardRange] = ()) -> None:
        """`verified` are shards that the dataloader has vouched for when it opened the stream."""
        self._channel = channel
        self._verified = {number for one in verified for number in range(one.first, one.first + one.shards)}
        self._in_use: set[int] = set()
        self._streams: weakref.WeakValueDictionary[int, StreamUse] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._told: tuple[int, ...] = ()

    def stream(self) -> StreamUse:
        """For one more stream; it counts for as long as somebody refers to it."""
        use = StreamUse(self)
        self._streams[next(self._numbers)] = use
        return use

    def verify(self, shards: Sequence[int]) -> None:
        """Raises ShardCorrupt, or what else kept the dataloader from vouching for a shard."""
        unknown = tuple(number for number in shards if number not in self._verified)
        if unknown:
            answer = self._channel.ask(Verify(shards=unknown), Verified)
            if answer.error is not None:
                raise error_from_wire(answer.error.to_map())
        self._verified.update(unknown)
        self._in_use.update(shards)

    def tell(self) -> None:
        """Tell the runner what has changed since it was last told."""
        streams = list(self._streams.values())  # the oldest first
        released = self._in_use.difference(*(use.held for use in streams))
        self._in_use -= released
        self._verified -= released
        in_turns = itertools.zip_longest(*(use.ahead for use in streams))
        ahead = tuple(dict.fromkeys(number for turn in in_turns for number in turn if number is not None))
        if released or ahead != self._told:
            self._told = ahead
            self._channel.send(Ahead(shards=ahead, released=tuple(sorted(released))))


class StreamUse:
    """Shards as one stream uses them."""

    def __init__(self, use: ShardUse) -> None:
        self._use = use
        self.held: set[int] = set()
        self.ahead: tuple[int, ...] = ()

    def ensure_verified(self, shards: Sequence[int]) -> None:
        """The stream is about to open these; see `ShardUse.verify`."""
        self._use.verify(shards)
        self.held.update(shards)

    def on_ahead(self, ahead: Sequence[int], closed: Sequence[int]) -> None:
        """The stream will read these, and has closed those."""
        self.ahead = tuple(ahead)
        self.held.difference_update(closed)
        self._use.tell()
