"""What a trainer says reaches the dataloader: the latest word, again and again, and through outages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from railbus_runner.frames import Ahead, FrameBuffer, Verified, Verify, pack
from railbus_runner.telling import StreamTeller
from railbus_shared import wire
from railbus_shared.contracts.requests import OpenedStream, StreamProgress, VerifiedShards, VerifyShards
from railbus_shared.errors import NotFound, RailbusError, RequestTimeout
from until import PATIENCE_S, until

SHA = "0" * 64
_MOST_MAPS = 65_530
"""`vm.max_map_count` where nobody has raised it."""


class Dataloader:
    """Takes words, or does not."""

    def __init__(self) -> None:
        self.heard: list[StreamProgress] = []
        self.problem: RailbusError | None = None
        self.tries = 0

    async def take(self, word: StreamProgress) -> None:
        self.tries += 1
        if self.problem is not None:
            raise self.problem
        self.heard.append(word)


@contextlib.asynccontextmanager
async def telling(dataloader: Dataloader, *, ttl_s: float = 60.0) -> AsyncIterator[StreamTeller]:
    opened = OpenedStream(
        stream="s-1",
        dataset="d",
        schema_path="",
        index_path="",
        index_sha256=SHA,
        num_shards=0,
        shards_path="",
        ttl_s=ttl_s,
    )
    teller = StreamTeller(opened, dataloader.take)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(teller.run())
        yield teller
        running.cancel()


async def test_a_word_is_told_at_once_and_names_all_that_is_held() -> None:
    dataloader = Dataloader()
    async with telling(dataloader) as teller:
        teller.holds([1, 0])
        teller.heed(Ahead(shards=(2, 3), released=(0,)))
        await until(lambda: len(dataloader.heard) == 1)
    expected = StreamProgress(stream="s-1", dataset="d", number=1, ahead=(2, 3), held=(1,), released=(0,))
    assert dataloader.heard == [expected]


def test_words_on_all_shards_that_a_process_can_map_fit_into_their_messages() -> None:
    shards = tuple(range(2**31, 2**31 + _MOST_MAPS))
    for frame in (Verify(shards=shards), Verified(shards=shards), Ahead(shards=shards[:64], released=shards)):
        assert FrameBuffer().feed(pack(frame)) == [frame]
    for message in (
        VerifyShards(dataset="d", shards=shards, stream="s"),
        VerifiedShards(dataset="d", shards=shards, bytes=2**62),
        StreamProgress(stream="s", dataset="d", ahead=shards[:64], held=shards[64:], released=shards[:64]),
    ):
        assert type(message).parse(wire.decode(wire.encode(message.to_map()))) == message


async def test_a_silent_trainer_is_told_of_three_times_before_its_stream_would_be_closed() -> None:
    dataloader = Dataloader()
    async with telling(dataloader, ttl_s=0.3) as teller:
        teller.heed(Ahead(shards=(5,)))
        await until(lambda: len(dataloader.heard) >= 4)
    assert {word.ahead for word in dataloader.heard} == {(5,)}
    assert {word.released for word in dataloader.heard} == {()}


async def test_after_an_outage_the_latest_word_is_told_with_everything_that_was_released() -> None:
    dataloader = Dataloader()
    dataloader.problem = RequestTimeout("away")
    async with telling(dataloader) as teller:
        for number in range(3):
            teller.holds([number])
            teller.heed(Ahead(shards=(number + 1,), released=(number,)))
        await until(lambda: dataloader.tries >= 1)
        dataloader.problem = None
        await teller.releases_told()
    assert [(word.ahead, word.released) for word in dataloader.heard] == [((3,), (0, 1, 2))]
    assert dataloader.heard[0].number == dataloader.tries  # so that one that was given up and comes late is known


async def test_a_shard_that_is_mapped_again_is_not_told_to_be_released() -> None:
    dataloader = Dataloader()
    dataloader.problem = RequestTimeout("away")
    async with telling(dataloader) as teller:
        teller.heed(Ahead(released=(1, 2)))
        teller.holds([1])
        dataloader.problem = None
        await teller.releases_told()
    assert (dataloader.heard[-1].held, dataloader.heard[-1].released) == ((1,), (2,))


async def test_a_word_that_is_refused_holds_nothing_up() -> None:
    dataloader = Dataloader()
    dataloader.problem = NotFound("no such dataset")
    async with telling(dataloader) as teller:
        teller.heed(Ahead(released=(1,)))
        async with asyncio.timeout(PATIENCE_S):
            await teller.releases_told()
