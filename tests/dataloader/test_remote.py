"""Files from host to host over a real NATS: whole, in order, resumed, and never what a peer made of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

import small_datasets
from railbus_dataloader.fetching import FetchLimits, NatsSource
from railbus_dataloader.serving import SendLimits
from railbus_dataloader.sources import WantedFile
from railbus_shared import files, wire
from railbus_shared.bus.chunks import CHUNK_BYTES
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.requests import GrantCredit, SendFile, SendingFile
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import NoSource, RailbusError, ShardCorrupt, StorageFull, TooManyTransfers, TransientError
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from remote_hosts import bulk, serving_host
from servers import Server
from until import until

LIMITS = FetchLimits(window_bytes=4 * CHUNK_BYTES, stall_s=1.0, patience_s=3.0, pause_s=0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Without JetStream: nothing here is stored."""
    folder = tmp_path / "nats"
    folder.mkdir()
    running = Server(folder, jetstream=False)
    running.start()
    yield running
    running.stop()


def source(bus: Bus, *hosts: str, limits: FetchLimits = LIMITS) -> NatsSource:
    async def found(_: WantedFile) -> Sequence[str]:
        return hosts

    return NatsSource(bus, found, host="here", limits=limits)


def big(layout: Layout, samples: int = 100_000) -> DatasetIndex:
    """A dataset of one shard of 3.3 MB and a few chunks."""
    return small_datasets.write(layout, samples)


def wanted(index: DatasetIndex, number: int = 0) -> WantedFile:
    shard = index.file.shards[number]
    return WantedFile(index.schema.name, index.sha256, shard.file, shard.sha256, shard.bytes)


def size(want: WantedFile) -> int:
    assert want.bytes is not None
    return want.bytes


def is_whole(path: Path, want: WantedFile) -> bool:
    return files.sha256_file(path) == want.sha256


# --- two honest hosts ------------------------------------------------------------------------------------------------


async def test_a_shard_arrives_whole_with_its_schema_and_index(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        index = big(host.layout)
        want = wanted(index)
        assert size(want) > 4 * CHUNK_BYTES
        others = [
            WantedFile("d", index.sha256, "schema", index.file.schema_sha256, None),
            WantedFile("d", index.sha256, "index", index.sha256, None),
        ]
        for one in (want, *others):
            await source(bus, "here", "a").fetch(one, tmp_path / one.file)
            assert is_whole(tmp_path / one.file, one)
        assert DatasetIndex.read(tmp_path / "schema", tmp_path / "index").sha256 == index.sha256


async def test_a_file_is_gone_on_with_from_what_is_there(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        want = wanted(big(host.layout))
        whole = (host.layout.shards("d") / want.file).read_bytes()
        into = tmp_path / "got"
        for size in (0, 1, CHUNK_BYTES + 7, len(whole) - 1, len(whole)):
            into.write_bytes(whole[:size])
            await source(bus, "a").fetch(want, into)
            assert is_whole(into, want)
        assert [request.offset for request in host.requests] == [0, 1, CHUNK_BYTES + 7, len(whole) - 1]


async def test_a_wrong_beginning_is_found_out_and_nothing_of_it_stays(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        want = wanted(big(host.layout))
        into = tmp_path / "got"
        into.write_bytes(b"x" * 1000)
        with pytest.raises(ShardCorrupt, match=r"host a/d/shard-00000\.data"):
            await source(bus, "a").fetch(want, into)
        assert not into.exists()
        into.write_bytes(b"x" * (size(want) + 1))  # more than it can have: thrown away
        await source(bus, "a").fetch(want, into)
        assert is_whole(into, want)


async def test_a_version_that_was_appended_to_is_still_sent_to_who_reads_it(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        first = big(host.layout, 100)
        older = host.layout.dataset("d") / "versions" / "000001"
        older.mkdir(parents=True)
        for name in ("schema.json", "index.json"):
            shutil.copy(host.layout.dataset("d") / name, older / name)
        index = host.layout.index("d")
        second = json.loads(index.read_bytes()) | {"version": 2, "parent_sha256": first.sha256}
        index.write_bytes(json.dumps(second).encode())
        newest = DatasetIndex.load(host.layout.dataset("d"))
        for version in (first, newest):
            for want in (wanted(version), WantedFile("d", version.sha256, "index", version.sha256, None)):
                into = tmp_path / f"{version.sha256}-{want.file}"
                await source(bus, "a").fetch(want, into)
                assert is_whole(into, want)


async def test_what_is_no_file_of_this_version_is_not_sent(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        index = big(host.layout, 10)
        (host.layout.shards("d") / "other.data").write_bytes(b"secret")
        shard = host.layout.shards("d") / "shard-00000.data"

        async def code(**change: object) -> str:
            request = {"dataset": "d", "index_sha256": index.sha256, "file": shard.name, "offset": 0, "asker": "h"}
            request |= {"window_bytes": 1 << 20, "to": bus.client.new_inbox()}
            with pytest.raises(RailbusError) as told:
                await bus.request("railbus.req.data.a.shard", request | change)
            return told.value.code

        assert await code(index_sha256="0" * 64) == "NOT_FOUND"
        assert await code(dataset="e") == "DATASET_NOT_FOUND"
        assert await code(dataset="../d") == "INVALID_NAME"
        assert await code(file="other.data") == "NOT_FOUND"
        assert await code(file="../index.json") == "INVALID_FIELD"
        assert await code(offset=1 << 40) == "INVALID_FIELD"
        assert await code(window_bytes=1 << 40) == "INVALID_FIELD"
        assert await code(to="$KV.railbus_leases.x") == "UNSAFE_REPLY"
        shard.rename(tmp_path / "elsewhere")
        shard.symlink_to(tmp_path / "elsewhere")
        assert await code() == "INDEX_INVALID"


async def test_a_shard_that_changes_under_the_server_is_not_sent_on(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        want = wanted(big(host.layout, 200_000))
        shard = host.layout.shards("d") / want.file
        taker = Taker(bus)
        async with taker.asking(want, window_bytes=2 * CHUNK_BYTES):
            await until(lambda: taker.position == 2 * CHUNK_BYTES)
            small_datasets.flip(shard, at=-1)
            await taker.grant(size(want))
            await until(lambda: "TRANSFER_BROKEN" in taker.errors)
        assert taker.position == 2 * CHUNK_BYTES
        with pytest.raises(ShardCorrupt):
            await source(bus, "a").fetch(want, tmp_path / "got")


async def test_a_file_that_is_cut_under_the_server_ends_one_transfer_only(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        want = wanted(big(host.layout, 200_000))
        other = wanted(small_datasets.write(host.layout, 10, name="e"))
        taker = Taker(bus)
        async with taker.asking(want, window_bytes=2 * CHUNK_BYTES):
            await until(lambda: taker.position == 2 * CHUNK_BYTES)
            os.truncate(host.layout.shards("d") / want.file, 100)
            await taker.grant(size(want))
            await until(lambda: "TRANSFER_BROKEN" in taker.errors)
        await source(bus, "a").fetch(other, tmp_path / "got")
        assert is_whole(tmp_path / "got", other)


async def test_a_slow_receiver_gets_no_more_than_it_granted_and_is_given_up_in_the_end(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a", SendLimits(transfers=1, stall_s=0.5)) as host, bulk(common) as bus:
        want = wanted(big(host.layout, 200_000))
        taker = Taker(bus)
        async with taker.asking(want, window_bytes=3 * CHUNK_BYTES):
            await until(lambda: bool(taker.errors))
            assert taker.position == 3 * CHUNK_BYTES
            assert host.bus.client.pending_data_size == 0
        await source(bus, "a").fetch(want, tmp_path / "got")  # its place is free again


async def test_hosts_take_turns_and_one_that_waits_is_told_so(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with (
        serving_host(common, tmp_path, "a", SendLimits(transfers=1, stall_s=60.0, sign_s=0.2)) as host,
        bulk(common) as bus,
    ):
        want = wanted(big(host.layout, 200_000))
        holder = Taker(bus)
        async with holder.asking(want, window_bytes=2 * CHUNK_BYTES):
            await until(lambda: holder.position > 0)
            async with asyncio.TaskGroup() as tasks:
                patient = FetchLimits(window_bytes=4 * CHUNK_BYTES, stall_s=2.0, pause_s=0.02)
                waiting = tasks.create_task(source(bus, "a", limits=patient).fetch(want, tmp_path / "got"))
                await asyncio.sleep(3.0)  # longer than silence is borne, but there were signs of life
                assert not waiting.done()
                await holder.grant(0, done=True)
        assert is_whole(tmp_path / "got", want)
        assert len(host.requests) == 2


async def test_more_that_wait_than_may_are_told_to_come_later(
    server: Server, common: CommonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("railbus_dataloader.serving._MAX_WAITING", 1)
    async with serving_host(common, tmp_path, "a", SendLimits(transfers=1)) as host, bulk(common) as bus:
        want = wanted(big(host.layout, 200_000))
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(Taker(bus).asking(want, window_bytes=CHUNK_BYTES * 2))
            with pytest.raises(TooManyTransfers, match="1 files are being sent, and 1 wait"):
                await stack.enter_async_context(Taker(bus).asking(want, window_bytes=CHUNK_BYTES * 2))


# --- hosts that fail -------------------------------------------------------------------------------------------------


async def test_the_next_host_goes_on_where_one_died(server: Server, common: CommonSettings, tmp_path: Path) -> None:
    async with bulk(common) as bus, serving_host(common, tmp_path, "b") as second:
        want = wanted(big(second.layout, 200_000))
        whole = (second.layout.shards("d") / want.file).read_bytes()
        first = asked_before_b(want)
        async with hostile(server, first, whole, dies_at(3 * CHUNK_BYTES)):
            await source(bus, first, "b").fetch(want, tmp_path / "got")
        assert is_whole(tmp_path / "got", want)
        assert [request.offset for request in second.requests] == [3 * CHUNK_BYTES]


async def test_a_cut_connection_is_resumed(server: Server, common: CommonSettings, tmp_path: Path) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        want = wanted(big(host.layout, 2_000_000))
        into = tmp_path / "got"
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(source(bus, "a").fetch(want, into))
            await until(lambda: into.exists() and into.stat().st_size > 4 * CHUNK_BYTES)
            server.kill()
            assert not fetching.done()
            server.start()
        assert is_whole(into, want)
        assert len(host.requests) > 1
        assert host.requests[-1].offset > 0


async def test_nobody_who_has_the_file_is_told_as_something_to_try_again(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    want = wanted(big(Layout(tmp_path / "x"), 10))
    async with bulk(common) as bus:
        for hosts in ((), ("here",), ("gone", "lost")):
            with pytest.raises(NoSource):
                await source(bus, *hosts).fetch(want, tmp_path / "got")


async def test_a_full_disk_is_told_and_not_blamed_on_the_host(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with serving_host(common, tmp_path, "a") as host, bulk(common) as bus:
        want = wanted(big(host.layout))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES, hard))  # as a full disk, for this process
        try:
            with pytest.raises(StorageFull):
                await source(bus, "a", "b").fetch(want, tmp_path / "got")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await source(bus, "a").fetch(want, tmp_path / "got")
        assert is_whole(tmp_path / "got", want)


# --- hosts that lie --------------------------------------------------------------------------------------------------

Say = Callable[[Client, SendFile, bytes, int], Awaitable[None]]
"""What a hostile host sends for a request; the last is how often it was asked before."""


def chunk(offset: int, data: bytes) -> bytes:
    return struct.pack("<Q", offset) + data


async def _send(client: Client, request: SendFile, whole: bytes, offsets: Sequence[int]) -> None:
    for offset in offsets:
        await client.publish(request.to, chunk(offset, whole[offset : offset + CHUNK_BYTES]))
    await client.flush()


def dies_at(end: int) -> Say:
    """Sends up to a place; asked again, it does not answer."""

    async def say(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
        if asked:
            await client.close()
            return
        await _send(client, request, whole, range(0, end, CHUNK_BYTES))

    return say


async def twice(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await _send(client, request, whole, [request.offset, request.offset])


async def swapped(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await _send(client, request, whole, [request.offset + CHUNK_BYTES, request.offset])


async def with_a_gap(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await _send(client, request, whole, [request.offset, request.offset + 2 * CHUNK_BYTES])


async def beyond_the_end(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await client.publish(request.to, chunk(request.offset, whole[request.offset :][:CHUNK_BYTES]))
    await client.publish(request.to, chunk(request.offset + CHUNK_BYTES, b"x" * (900 * 1024)))


async def beyond_its_credit(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await _send(client, request, whole, range(request.offset, len(whole), CHUNK_BYTES))


async def crumbs(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await client.publish(request.to, chunk(request.offset, whole[request.offset :][:1]))


async def noise(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await client.publish(request.to, b"no")


async def silence(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    return


async def only_signs_of_life(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    for _ in range(12):
        await client.publish(request.to, chunk(request.offset, b""))
        await asyncio.sleep(0.3)


async def nonsense_as_an_error(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
    await client.publish(request.to, b"{", headers={"Nats-Service-Error-Code": "500"})


@contextlib.asynccontextmanager
async def hostile(
    server: Server, name: str, whole: bytes, say: Say, *, size: int | None = None, credit: str = "_INBOX.x"
) -> AsyncIterator[list[SendFile]]:
    """A host whose answers a test makes up, on a plain client."""
    asked: list[SendFile] = []
    client = await nats.connect(server.url, allow_reconnect=False)

    async def answer(message: Msg) -> None:
        request = SendFile.parse(wire.decode(message.data))
        asked.append(request)
        told = SendingFile(bytes=len(whole) if size is None else size, credit=credit)
        if not (say.__qualname__.startswith("dies_at") and len(asked) > 1):
            await client.publish(message.reply, wire.encode(told.to_map()))
        await say(client, request, whole, len(asked) - 1)

    await client.subscribe(f"railbus.req.data.{name}.shard", cb=answer)
    await client.flush()
    try:
        yield asked
    finally:
        await client.close()


def asked_before_b(want: WantedFile) -> str:
    """The name of a host that is asked for this file before host `b`."""
    return "a" if int(want.sha256[:8], 16) % 2 == 0 else "c"


@pytest.mark.parametrize(
    "say",
    [
        twice,
        swapped,
        with_a_gap,
        beyond_the_end,
        beyond_its_credit,
        crumbs,
        noise,
        silence,
        only_signs_of_life,
        nonsense_as_an_error,
    ],
    ids=lambda say: say.__name__,
)
async def test_what_a_host_sends_wrong_never_reaches_the_file_and_the_next_host_is_asked(
    server: Server, common: CommonSettings, tmp_path: Path, say: Say
) -> None:
    limits = FetchLimits(window_bytes=2 * CHUNK_BYTES, stall_s=0.4, patience_s=0.8, pause_s=0.02)
    async with bulk(common) as bus, serving_host(common, tmp_path, "b") as honest:
        want = wanted(big(honest.layout, 100_000))
        whole = (honest.layout.shards("d") / want.file).read_bytes()
        first = asked_before_b(want)
        async with hostile(server, first, whole, say) as asked:
            await source(bus, first, "b", limits=limits).fetch(want, tmp_path / "got")
        assert asked
        assert is_whole(tmp_path / "got", want)


async def test_a_host_that_lies_about_the_bytes_is_named_and_nothing_of_them_stays(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async with bulk(common) as bus:
        want = wanted(big(Layout(tmp_path / "x")))
        lie = b"y" * size(want)

        async def all_of_it(client: Client, request: SendFile, whole: bytes, asked: int) -> None:
            await _send(client, request, whole, range(request.offset, len(whole), CHUNK_BYTES))

        roomy = FetchLimits(window_bytes=32 << 20, stall_s=1.0, pause_s=0.02)
        async with hostile(server, "a", lie, all_of_it):
            with pytest.raises(ShardCorrupt, match=r"host a/d/shard-00000\.data"):
                await source(bus, "a", limits=roomy).fetch(want, tmp_path / "got")
        assert not (tmp_path / "got").exists()


@pytest.mark.parametrize("size", [0, 1, 1 << 62])
async def test_a_host_that_lies_about_the_size_is_not_believed(
    server: Server, common: CommonSettings, tmp_path: Path, size: int
) -> None:
    async with bulk(common) as bus:
        index = big(Layout(tmp_path / "x"), 10)
        unknown = WantedFile("d", index.sha256, "index", index.sha256, None)
        async with hostile(server, "a", b"", silence, size=size):
            for want in (wanted(index), unknown):
                with pytest.raises((TransientError, ShardCorrupt)):
                    await source(bus, "a", limits=FetchLimits(stall_s=0.2, pause_s=0.02)).fetch(want, tmp_path / "got")


async def test_credit_is_granted_in_inboxes_only(server: Server, common: CommonSettings, tmp_path: Path) -> None:
    async with bulk(common) as bus:
        want = wanted(big(Layout(tmp_path / "x"), 10))
        heard: list[Msg] = []

        async def hear(message: Msg) -> None:
            heard.append(message)

        await bus.client.subscribe("railbus.jobs.>", cb=hear)
        async with hostile(server, "a", b"", silence, size=want.bytes, credit="railbus.jobs.submit"):
            with pytest.raises(NoSource):
                await source(bus, "a", limits=FetchLimits(stall_s=0.2, pause_s=0.02)).fetch(want, tmp_path / "got")
        assert heard == []


# --- a receiver by hand ----------------------------------------------------------------------------------------------


class Taker:
    """Asks for a file and takes its chunks, granting credit only when a test says so."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._credit = ""
        self.position = 0
        self.errors: list[str] = []

    @contextlib.asynccontextmanager
    async def asking(self, want: WantedFile, *, window_bytes: int) -> AsyncIterator[None]:
        inbox = self._bus.client.new_inbox()
        subscription = await self._bus.client.subscribe(inbox, cb=self._take)
        request = SendFile(
            dataset=want.dataset,
            index_sha256=want.index_sha256,
            file=want.file,
            window_bytes=window_bytes,
            to=inbox,
            asker="slow",
        )
        try:
            answer = await self._bus.request("railbus.req.data.a.shard", request.to_map())
            self._credit = SendingFile.parse(answer).credit
            yield
            await self.grant(0, done=True)
        finally:
            await subscription.unsubscribe()

    async def grant(self, up_to: int, *, done: bool = False) -> None:
        await self._bus.send(self._credit, wire.encode(GrantCredit(up_to=up_to, done=done).to_map()))

    async def _take(self, message: Msg) -> None:
        if message.headers:
            self.errors.append(str(wire.decode(message.data)["code"]))
            return
        (offset,) = struct.unpack_from("<Q", message.data)
        assert offset == self.position
        self.position += len(message.data) - 8
