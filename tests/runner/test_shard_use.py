"""What a trainer's streams hold and will read, told to a runner's end of a real socket as one."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator

import pytest

from railbus_runner.channel import TrainerChannel
from railbus_runner.frames import Ahead, Frame, FrameBuffer, Verified, Verify, pack
from railbus_runner.shard_use import ShardUse
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.contracts.requests import ShardRange
from railbus_shared.errors import ShardCorrupt


class Runner:
    """The other end: its answers lie ready before they are asked for."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self._sock, self._theirs = ours, theirs
        self._buffer = FrameBuffer()
        self.use = ShardUse(TrainerChannel(theirs), verified=[ShardRange(first=0, shards=1)])

    def answer(self, *shards: int, error: ErrorBody | None = None) -> None:
        self._sock.sendall(pack(Verified(shards=shards, error=error)))

    def received(self) -> list[Frame]:
        self._sock.setblocking(False)
        try:
            return self._buffer.feed(self._sock.recv(1 << 16))
        except BlockingIOError:
            return []


@pytest.fixture
def runner() -> Iterator[Runner]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Runner(ours, theirs)


def test_a_shard_is_verified_once_for_all_streams_and_not_where_it_was_vouched_for(runner: Runner) -> None:
    first, second = runner.use.stream(), runner.use.stream()
    runner.answer(1, 2)
    first.ensure_verified([0, 1, 2])
    second.ensure_verified([2, 0])
    assert runner.received() == [Verify(shards=(1, 2))]


def test_a_shard_is_released_when_no_stream_holds_it_and_then_verified_again(runner: Runner) -> None:
    first, second = runner.use.stream(), runner.use.stream()
    first.ensure_verified([0])
    second.ensure_verified([0])
    first.on_ahead([3], [0])
    assert runner.received() == [Ahead(shards=(3,))]
    second.on_ahead([4], [0])
    assert runner.received() == [Ahead(shards=(3, 4), released=(0,))]
    runner.answer(0)
    first.ensure_verified([0])
    assert runner.received() == [Verify(shards=(0,))]


def test_the_streams_take_turns_in_what_comes_next(runner: Runner) -> None:
    first, second = runner.use.stream(), runner.use.stream()
    first.on_ahead([1, 2, 3], [])
    second.on_ahead([3, 7], [])
    (_, told) = runner.received()
    assert isinstance(told, Ahead)
    assert sorted(told.shards) == [1, 2, 3, 7]
    assert {told.shards[0], told.shards[1]} == {1, 3}


def test_nothing_is_told_twice(runner: Runner) -> None:
    stream = runner.use.stream()
    stream.on_ahead([1, 2], [])
    stream.on_ahead([1, 2], [])
    assert runner.received() == [Ahead(shards=(1, 2))]


def test_a_stream_that_is_gone_holds_nothing(runner: Runner) -> None:
    gone, left = runner.use.stream(), runner.use.stream()
    gone.ensure_verified([0])
    gone.on_ahead([5], [])
    del gone
    gc.collect()
    left.on_ahead([6], [])
    assert runner.received()[-1] == Ahead(shards=(6,), released=(0,))


def test_a_shard_that_is_refused_is_not_held(runner: Runner) -> None:
    stream = runner.use.stream()
    body = ShardCorrupt(path="shard-00001.data", expected="a", actual="b").to_wire()
    runner.answer(1, error=ErrorBody.parse(body))
    with pytest.raises(ShardCorrupt):
        stream.ensure_verified([1])
    assert not stream.held
