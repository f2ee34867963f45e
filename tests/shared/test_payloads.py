"""Large payloads over the bus: the same bytes, however they are cut on their way and whatever goes beside them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ProtocolError

from railbus_shared import wire
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.payloads import LargePayloads
from railbus_shared.errors import BusUnavailable, MessageTooLarge
from railbus_shared.settings import CommonSettings
from servers import Server
from until import until

SIZES = (0, 1, (1 << 16) - 1, 1 << 16, (1 << 18) - 2, 1 << 18, (1 << 18) + 1, 500_000)


class Taking(Client):
    """A client without a connection, which keeps what its parser hands to it."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[int, bytes, bytes, bytes, bytes | None]] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.taken.append((sid, subject, reply, data, headers or None))


def message(number: int, rng: random.Random, size: int) -> tuple[bytes, tuple[int, bytes, bytes, bytes, bytes | None]]:
    """As the server sends it, and as it should be taken; bytes of the protocol occur in the payload too."""
    data = (rng.randbytes(max(0, size - 12)) + b"\r\nMSG a 1 3\r\n")[-size:] if size else b""
    headers = b"NATS/1.0\r\nA: b\r\n\r\n" if number % 3 == 0 else None
    reply = b"r" if number % 2 else b""
    head = b" ".join((b"HMSG" if headers else b"MSG", b"s.%d" % number, b"7", *((reply,) if reply else ())))
    sizes = b" %d %d" % (len(headers), len(headers) + size) if headers else b" %d" % size
    return head + sizes + b"\r\n" + (headers or b"") + data + b"\r\n", (7, b"s.%d" % number, reply, data, headers)


def cuts(rng: random.Random, length: int, pieces: Sequence[int]) -> list[int]:
    found, at = [], 0
    while at < length:
        at += rng.choice(pieces)
        found.append(min(at, length))
    return found


@pytest.mark.parametrize("pieces", [(1 << 18,), (32_768,), (1, 2, 3, 4000, 70_000, 300_000), (65_535, 65_536, 65_537)])
@pytest.mark.parametrize("seed", range(5))
async def test_messages_are_the_same_wherever_the_stream_is_cut(pieces: tuple[int, ...], seed: int) -> None:
    rng = random.Random(seed)
    sent = [message(number, rng, rng.choice(SIZES)) for number in range(20)]
    stream = b"".join(data for data, _ in sent)
    client = Taking()
    parser = LargePayloads(client)
    at = 0
    for cut in cuts(rng, len(stream), pieces):
        await parser.parse(stream[at:cut])
        at = cut
    assert client.taken == [expected for _, expected in sent]


@pytest.mark.parametrize("back", range(5))
async def test_a_cut_around_the_end_of_a_large_payload_changes_nothing(back: int) -> None:
    first, second = message(1, random.Random(0), 1 << 17), message(2, random.Random(1), 10)
    stream, end = first[0] + second[0], len(first[0]) - back
    client = Taking()
    parser = LargePayloads(client)
    for piece in (stream[:1000], stream[1000:end], stream[end : end + 1], stream[end + 1 :]):
        await parser.parse(piece)
    assert client.taken == [first[1], second[1]]


async def test_after_a_reconnect_nothing_is_left_of_a_payload_that_was_cut_off() -> None:
    cut_off, whole = message(1, random.Random(0), 1 << 17), message(2, random.Random(1), 1 << 17)
    client = Taking()
    parser = LargePayloads(client)
    await parser.parse(cut_off[0][:100_000])
    parser.reset()
    await parser.parse(whole[0][:5])
    await parser.parse(whole[0][5:])
    assert client.taken == [whole[1]]


async def test_what_is_not_the_protocol_is_told_behind_a_large_payload_too() -> None:
    parser = LargePayloads(Taking())
    data, _ = message(1, random.Random(0), 1 << 17)
    await parser.parse(data[:1000])
    with pytest.raises(ProtocolError):
        await parser.parse(data[1000:] + b"NONSENSE\r\n")


async def test_parts_arrive_as_one_payload_whatever_is_sent_beside_them(bus: Bus) -> None:
    arrived: dict[str, list[bytes]] = {"parts": [], "whole": []}

    async def take(message: Msg) -> None:
        arrived[message.subject.rsplit(".", 1)[-1]].append(message.data)

    await bus.client.subscribe("_INBOX.x.*", cb=take)
    rng = random.Random(0)
    payloads = [rng.randbytes(rng.choice(SIZES)) for _ in range(40)]

    async def parts(data: bytes) -> None:
        cut = len(data) // 3
        await bus.send_parts("_INBOX.x.parts", data[:cut], memoryview(data)[cut:])

    await asyncio.gather(
        *(parts(data) for data in payloads),
        *(bus.send("_INBOX.x.whole", data) for data in payloads),
        bus.client.flush(),
    )
    await until(lambda: len(arrived["parts"]) == len(arrived["whole"]) == len(payloads))
    assert arrived == {"parts": payloads, "whole": payloads}


async def test_parts_that_are_too_large_or_have_no_connection_are_refused(
    server: Server, common: CommonSettings
) -> None:
    async with Bus.open(common, name="someone") as bus:
        with pytest.raises(MessageTooLarge):
            await bus.send_parts("_INBOX.x.y", bytes(8), bytes(wire.MAX_BYTES))
        server.stop()
        await until(lambda: not bus.is_connected)
        with pytest.raises(BusUnavailable):
            await bus.send_parts("_INBOX.x.y", b"x")
