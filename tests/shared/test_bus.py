"""The connection: errors that travel, faults that do not deafen it, restarts that it survives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats.errors
import nkeys
import pytest
from nats.aio.msg import Msg

from railbus_shared import wire
from railbus_shared.bus import connection, topology
from railbus_shared.bus.connection import ERROR_CODE_HEADER, ERROR_HEADER, Bus, BusClosed, Outgoing
from railbus_shared.bus.consume import Delivery, consume_batches
from railbus_shared.bus.follow import follow
from railbus_shared.errors import (
    BusUnavailable,
    IncarnationMismatch,
    InsecureUrl,
    JobNotFound,
    MessageTooLarge,
    NoResponder,
    NotAuthorized,
    QueueFull,
    RequestTimeout,
    RevisionConflict,
    StoreMissing,
    TransientError,
)
from railbus_shared.settings import CommonSettings
from railbus_shared.store_marker import read_marker, write_marker
from railbus_shared.topology import event_consumer
from railbus_shared.waiting import end
from rawnats import RawClient
from servers import Server
from until import PATIENCE_S, until

MALFORMED = {
    "no header line": b"XX",
    "no line end": b"NATS/1.0",
    "a status that is no text": b"NATS/1.0 \xff\xfe\xfd x\xff\r\n\r\n",
    "a status of the server": b"NATS/1.0 409 Consumer Deleted\r\n\r\n",
    "an idle heartbeat": b"NATS/1.0 100 Idle Heartbeat\r\n\r\n",
    "noise": bytes(range(256)),
}


@contextlib.asynccontextmanager
async def _running(bus: Bus) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.ensure_future(bus.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def _reader(bus: Bus) -> asyncio.Task[None]:
    reader = bus.client._reading_task
    assert reader is not None
    return reader


async def _echo(bus: Bus, subject: str) -> None:
    async def answer(message: Msg) -> None:
        await bus.send(message.reply, message.data)

    await bus.client.subscribe(subject, cb=answer)
    await bus.client.flush()


async def test_an_error_that_a_service_answers_is_raised_at_the_asker(bus: Bus) -> None:
    error = JobNotFound("job has value 'x': there is no such job", hint="look", details={"field": "job", "n": 3})

    async def answer(message: Msg) -> None:
        headers = {ERROR_HEADER: "x", ERROR_CODE_HEADER: "404"}
        await bus.send(message.reply, wire.encode(error.to_wire()), headers=headers)

    await bus.client.subscribe("railbus.req.x", cb=answer)
    with pytest.raises(JobNotFound) as caught:
        await bus.request("railbus.req.x", {})
    assert caught.value.to_wire() == error.to_wire()


async def test_a_request_is_answered_or_says_why_not(bus: Bus) -> None:
    await _echo(bus, "railbus.req.echo")
    assert await bus.request("railbus.req.echo", {"a": [1]}) == {"a": [1]}
    with pytest.raises(NoResponder, match=r"railbus\.req\.nobody"):
        await bus.request("railbus.req.nobody", {})
    await bus.client.subscribe("railbus.req.silent")
    with pytest.raises(RequestTimeout, match=r"railbus\.req\.silent"):
        await bus.request("railbus.req.silent", {}, timeout_s=0.1)
    with pytest.raises(MessageTooLarge):
        await bus.request("railbus.req.echo", {"a": "x" * wire.MAX_BYTES})
    assert bus.is_connected


async def test_a_flush_confirms_all_that_was_sent_before(bus: Bus, common: CommonSettings) -> None:
    async def keep_silent(_: Msg) -> None:
        pass

    async with Bus.open(common, name="asker") as asker:
        for number in range(50):
            await bus.client.subscribe(f"railbus.req.x{number}", cb=keep_silent)
            await bus.client.flush()
            with pytest.raises(RequestTimeout):  # and not NoResponder
                await asker.request(f"railbus.req.x{number}", {}, timeout_s=0.005)


async def test_a_flush_that_is_given_up_does_not_end_the_connection(bus: Bus, server: Server) -> None:
    reader = bus.client._reading_task
    server.pause()
    try:
        with pytest.raises(nats.errors.FlushTimeoutError):
            await bus.client.flush(timeout=1)
        cancelled = asyncio.ensure_future(bus.client.flush())
        await asyncio.sleep(0)  # it has sent its ping
        await end(cancelled)
    finally:
        server.resume()
    await bus.client.flush()
    assert bus.is_connected
    assert bus.client._reading_task is reader


async def test_a_payload_over_the_limit_is_refused_here_and_the_connection_stays(bus: Bus) -> None:
    for size in (wire.MAX_BYTES + 1, 1 << 20, 3 << 20):
        with pytest.raises(MessageTooLarge) as caught:
            await bus.publish(Outgoing("railbus.evt.a.b.c", b"x" * size, ""))
        assert caught.value.details["size_bytes"] == size
        with pytest.raises(MessageTooLarge):
            await bus.send("_INBOX.x", b"x" * size)
    assert await bus.publish(Outgoing("railbus.evt.a.b.c", b"x" * wire.MAX_BYTES, "")) == 1
    assert bus.generation == 0


async def test_the_same_message_is_stored_once_also_after_a_restart(bus: Bus, server: Server) -> None:
    message = Outgoing("railbus.evt.a.b.c", b"\x80", "id-1")
    first = await bus.publish(message)
    assert await bus.publish(message) == first
    server.kill()
    server.start()
    await until(lambda: bus.generation == 1)
    assert await bus.publish(message) == first
    assert await bus.last_sequence(bus.subjects.events_stream) == first


async def test_messages_that_go_together_are_stored_all_or_none(bus: Bus) -> None:
    def of(number: int, expected: int) -> Outgoing:
        headers = {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        return Outgoing(f"railbus.evt.a.b.c{number}", b"\x80", "", headers)

    assert await bus.publish_together([of(1, 0), of(2, 0), of(3, 0)]) == 3
    with pytest.raises(RevisionConflict):
        await bus.publish_together([of(4, 0), of(1, 0)])
    assert await bus.last_sequence(bus.subjects.events_stream) == 3
    with pytest.raises(ValueError, match="at least one"):
        await bus.publish_together([])


@pytest.mark.parametrize("headers", MALFORMED.values(), ids=MALFORMED)
async def test_no_header_deafens_a_subscriber_or_a_consumer(bus: Bus, server: Server, headers: bytes) -> None:
    reader = bus.client._reading_task
    heard: list[bytes] = []

    async def hear(message: Msg) -> None:
        heard.append(message.data)

    await bus.client.subscribe("railbus.req.x", cb=hear)
    await bus.client.flush()
    with RawClient(server.port) as raw:
        raw.publish(b"railbus.req.x", b"hi", headers=headers)
        raw.publish(b"railbus.evt.a.b.c", b"hi", headers=headers)
        raw.publish(b"railbus.req.x", b"after")
        raw.publish(b"railbus.evt.a.b.c", b"\x81\xa1n\x01")
    await until(lambda: b"after" in heard)
    taken = await _taken(bus, 2)
    assert [delivery.data for delivery in taken] == [b"hi", b"\x81\xa1n\x01"]
    assert [delivery.is_malformed for delivery in taken] == [headers != MALFORMED["noise"], False] or taken[
        0
    ].headers == {}
    followed = [event async for event in _first(follow(bus, bus.subjects.all_events), 1)]
    assert followed == [{"n": 1}]
    assert bus.client._reading_task is reader
    assert bus.is_connected


async def test_a_subject_that_is_no_text_deafens_nobody(bus: Bus, server: Server) -> None:
    reader = bus.client._reading_task
    heard: list[bytes] = []

    async def hear(message: Msg) -> None:
        heard.append(message.data)

    await bus.client.subscribe("railbus.req.>", cb=hear)
    await bus.client.flush()
    with RawClient(server.port) as raw:
        raw.publish(b"railbus.req.\xff\xfe", b"one", reply=b"_INBOX.\xff")
        raw.publish(b"railbus.evt.a.\xff.c", b"one")
        raw.publish(b"railbus.req.x", b"two")
        raw.publish(b"railbus.evt.a.b.c", b"two")
    await until(lambda: heard == [b"one", b"two"])
    assert [delivery.data for delivery in await _taken(bus, 2)] == [b"one", b"two"]
    assert bus.client._reading_task is reader


async def _first(events: AsyncIterator[dict[str, object]], count: int) -> AsyncIterator[dict[str, object]]:
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            yield event
            count -= 1
            if not count:
                return


async def _taken(bus: Bus, count: int) -> list[Delivery]:
    """The next messages of the stream of events, acknowledged."""
    stopping, taken = asyncio.Event(), list[Delivery]()

    async def take(batch: list[Delivery]) -> bool:
        taken.extend(batch)
        if len(taken) >= count:
            stopping.set()
        return True

    async with asyncio.timeout(PATIENCE_S):
        await consume_batches(bus, event_consumer(bus.subjects), take, stopping=stopping)
    return taken


async def test_a_killed_server_that_comes_back_is_used_again(bus: Bus, server: Server) -> None:
    changes: list[bool] = []
    bus.on_connection(changes.append)
    await _echo(bus, "railbus.req.echo")
    server.kill()
    await until(lambda: not bus.is_connected)
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match="not connected"):
        await bus.request("railbus.req.echo", {})
    with pytest.raises(BusUnavailable):
        await bus.publish(Outgoing("railbus.evt.a.b.c", b"\x80", ""))
    with pytest.raises(BusUnavailable):
        await bus.check_jetstream()
    assert time.monotonic() - began < 5  # the three would take 11 s if each waited for its answer
    server.start()
    await until(lambda: bus.generation == 1)
    assert await bus.request("railbus.req.echo", {"a": 1}) == {"a": 1}
    assert await bus.publish(Outgoing("railbus.evt.a.b.c", b"\x80", "")) == 1
    assert changes == [False, True]


async def test_a_cancellation_that_comes_at_the_moment_of_the_answer_is_not_lost(bus: Bus) -> None:
    """By `asyncio.wait_for` of Python 3.11 it would be: whoever asks again and again would do so for ever."""
    asked: list[Msg] = []

    async def take(message: Msg) -> None:
        asked.append(message)

    await bus.client.subscribe("railbus.req.late", cb=take)
    asking = asyncio.ensure_future(bus.request("railbus.req.late", {}, timeout_s=PATIENCE_S))
    await until(lambda: bool(asked))
    (answer,) = bus.client._resp_map.values()
    answer.add_done_callback(lambda _: asking.cancel())
    await asked[0].respond(wire.encode({}))
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_what_was_asked_while_disconnected_is_not_stored_later(bus: Bus, server: Server) -> None:
    server.kill()
    await until(lambda: not bus.is_connected)
    for _ in range(3):
        with pytest.raises(BusUnavailable):
            await bus.publish(Outgoing("railbus.evt.a.b.c", b"\x80", ""))
    server.start()
    await until(lambda: bus.is_connected)
    await asyncio.sleep(0.2)
    assert await bus.last_sequence(bus.subjects.events_stream) == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second each, instead of three, for an answer to a ping and for an acknowledgement."""
    monkeypatch.setattr(connection, "_PING_S", 1)
    monkeypatch.setattr(connection, "_PUBLISH_TIMEOUT_S", 1.0)


async def test_a_server_that_hangs_is_noticed(impatient: None, bus: Bus, server: Server) -> None:
    server.pause()
    try:
        with pytest.raises(RequestTimeout):
            await bus.publish(Outgoing("railbus.evt.a.b.c", b"\x80", "id"))
        assert "last write failed" in bus.storage_problem
        await until(lambda: not bus.is_connected)
    finally:
        server.resume()
    await until(lambda: bus.is_connected)
    await bus.publish(Outgoing("railbus.evt.a.b.c", b"\x80", "id"))
    assert bus.storage_problem == ""
    assert await bus.last_sequence(bus.subjects.events_stream) == 1


async def test_a_connection_that_is_closed_for_good_is_told(bus: Bus) -> None:
    async with _running(bus) as running:
        await bus.client._send_command(b"NONSENSE\r\n")  # the server says why it closes, and closes
        await bus.client._flush_pending()
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(BusClosed, match="closed"):
                await running


async def test_a_reader_that_has_died_is_noticed_and_replaced(bus: Bus) -> None:
    await _echo(bus, "railbus.req.echo")
    async with _running(bus):
        _reader(bus).cancel()
        await until(lambda: not bus.is_connected)
        with pytest.raises(BusUnavailable):
            await bus.request("railbus.req.echo", {})
        await until(lambda: bus.generation == 1 and bus.is_connected)
        assert await bus.request("railbus.req.echo", {"a": 1}) == {"a": 1}


@contextlib.asynccontextmanager
async def _closing_port(port: int) -> AsyncIterator[list[float]]:
    """A port that closes every connection, as the proxy of a container that is gone does; the times of those."""
    accepted: list[float] = []

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(time.monotonic())
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", port):
        yield accepted


@pytest.mark.timeout(60)  # attempts become rarer after five seconds
async def test_a_server_that_is_away_for_long_is_looked_for_rarely_and_still_found_soon(
    bus: Bus, server: Server
) -> None:
    async with _running(bus):
        for times in (1, 2):  # the second time as quickly as the first
            server.kill()
            async with _closing_port(server.port) as accepted:
                await until(lambda: len(accepted) > 10)
                assert accepted[10] - accepted[0] < 9  # by far: every 0.25 s, and not every second
                await until(lambda: len(accepted) > 25)
                used_s, began_s = time.process_time(), time.monotonic()
                await until(lambda: len(accepted) > 28)
                assert time.monotonic() - began_s > 2
                assert time.process_time() - used_s < 0.1 * (time.monotonic() - began_s)
            server.start()
            came_back_s = time.monotonic()
            await until(lambda times=times: bus.generation == times)  # type: ignore[misc]
            assert time.monotonic() - came_back_s < 5


async def test_no_server_is_told_in_time(common: CommonSettings, server: Server) -> None:
    server.kill()
    settings = common.model_copy(update={"connect_timeout_s": 0.5})
    with pytest.raises(BusUnavailable, match="does not answer"):
        async with Bus.open(settings, name="test"):
            pass


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """A server that lets in one key only, and that has no JetStream."""
    guarded = Server(
        tmp_path, jetstream=False, extra=f"authorization {{ users: [{{ nkey: {_key().public_key.decode()} }}] }}"
    )
    guarded.start()
    yield guarded
    guarded.stop()


def _key() -> Any:  # nkeys annotates what it gives wrongly
    return nkeys.from_seed(nkeys.encode_seed(b"k" * 32, nkeys.PREFIX_BYTE_USER))


@pytest.mark.parametrize("name", ["anonymous", "another key"])
async def test_refused_credentials_are_told_at_once(guarded: Server, tmp_path: Path, name: str) -> None:
    settings = CommonSettings(nats_url=guarded.url, nats_key_file=tmp_path / "key" if name != "anonymous" else None)
    (tmp_path / "key").write_bytes(nkeys.encode_seed(b"x" * 32, nkeys.PREFIX_BYTE_USER))
    (tmp_path / "key").chmod(0o600)
    async with asyncio.timeout(settings.connect_timeout_s - 1):
        with pytest.raises(NotAuthorized, match="refused the credentials"):
            async with Bus.open(settings, name="test"):
                pass


async def test_a_server_without_jetstream_is_worth_trying_again(guarded: Server, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(_key().seed))
    (tmp_path / "key").chmod(0o600)
    settings = CommonSettings(nats_url=guarded.url, nats_key_file=tmp_path / "key")
    async with Bus.open(settings, name="test") as bus:
        with pytest.raises(TransientError):
            await topology.ensure(bus, tmp_path / "store.json")
        with pytest.raises(TransientError):
            await bus.check_jetstream()


async def test_an_insecure_url_is_never_dialled(common: CommonSettings) -> None:
    with pytest.raises(InsecureUrl):
        async with Bus.open(common.model_copy(update={"nats_url": "nats://192.0.2.1:4222"}), name="test"):
            pass


async def test_events_are_followed_from_now_on_through_a_restart(bus: Bus, server: Server) -> None:
    async def publish(number: int) -> None:
        await bus.publish(Outgoing("railbus.evt.a.b.c", wire.encode({"n": number}), f"id-{number}"))

    await publish(0)
    before = len(bus.client._subs)
    events = _first(follow(bus, bus.subjects.all_events, since="new"), 3)
    first = asyncio.ensure_future(anext(events))
    await until(lambda: len(bus.client._subs) > before)
    server.kill()
    server.start()
    await until(lambda: bus.generation == 1)
    for number in (1, 2, 3):
        await publish(number)
    assert [await first, await anext(events), await anext(events)] == [{"n": 1}, {"n": 2}, {"n": 3}]
    everything = [event async for event in _first(follow(bus, bus.subjects.all_events), 4)]
    assert everything == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]


async def test_another_store_in_the_place_of_the_one_followed_is_followed_from_its_beginning(
    bus: Bus, server: Server, tmp_path: Path
) -> None:
    """Its sequences begin anew: what waits behind an old one would miss all until the new store has as many."""
    for number in range(3):
        await bus.publish(Outgoing("railbus.evt.a.b.c", wire.encode({"n": number}), ""))
    events = _first(follow(bus, bus.subjects.all_events), 4)
    assert [(await anext(events))["n"] for _ in range(3)] == [0, 1, 2]
    server.kill()
    (server.folder / "store").rename(server.folder / "before")
    server.start()
    await until(lambda: bus.generation == 1)
    await topology.ensure(bus, tmp_path / "another.json")
    await bus.publish(Outgoing("railbus.evt.a.b.c", wire.encode({"n": 3}), ""))
    assert (await anext(events))["n"] == 3


async def test_a_batch_is_followed_event_by_event(bus: Bus) -> None:
    batch = {"v": 1, "common": {"a": 1}, "events": [{"n": 1}, {"n": 2, "a": 3}]}
    await bus.publish(Outgoing("railbus.evt.a.b.c", b"garbage", ""))
    await bus.publish(Outgoing("railbus.evt.a.b.c", wire.encode(batch), ""))
    followed = [event async for event in _first(follow(bus, bus.subjects.all_events), 2)]
    assert followed == [{"a": 1, "n": 1}, {"a": 3, "n": 2}]


@pytest.mark.parametrize("kind", ["job.succeeded", ["app.x"], 5, None])
async def test_an_event_of_another_area_than_its_subject_is_not_followed(bus: Bus, kind: object) -> None:
    """Persons may publish below `app.` alone, and what they tell there must end nobody's following of a job."""
    false = {"v": 1, "common": {"job": "j-1"}, "events": [{"type": kind, "n": 1}, {"type": "app.x", "n": 2}]}
    await bus.publish(Outgoing("railbus.evt.app.j-1.x", wire.encode(false), ""))
    await bus.publish(Outgoing("railbus.evt.job.j-1.succeeded", wire.encode({"type": "job.succeeded", "n": 3}), ""))
    followed = [event async for event in _first(follow(bus, bus.subjects.all_events), 2)]
    assert [event["n"] for event in followed] == [2, 3]


async def test_who_follows_is_told_which_person_told_an_event_and_by_the_subject_only(bus: Bus) -> None:
    batch = {"v": 1, "common": {"type": "app.x", "person": "ben"}, "events": [{"n": 1}, {"n": 2, "person": "ben"}]}
    for behind in ("", ".ann"):
        await bus.publish(Outgoing(f"railbus.evt.app.j-1.x{behind}", wire.encode(batch), ""))
        await bus.publish(Outgoing(f"railbus.evt.app.j-1.x{behind}", wire.encode({"type": "app.x", "n": 3}), ""))
    followed = [event async for event in _first(follow(bus, bus.subjects.all_events), 6)]
    assert [(event["n"], event.get("person")) for event in followed] == [
        *((n, None) for n in (1, 2, 3)),
        *((n, "ann") for n in (1, 2, 3)),
    ]


async def test_the_store_is_recognised_and_a_wiped_one_is_refused(
    bus: Bus, common: CommonSettings, tmp_path: Path
) -> None:
    marker, other = common.layout.state / "store.json", tmp_path / "other.json"
    first = bus.incarnation
    assert first
    await topology.ensure(bus, marker)
    await topology.ensure(bus, other)
    assert bus.incarnation == first
    other.write_bytes(other.read_bytes().replace(first.encode(), b"another"))
    with pytest.raises(IncarnationMismatch, match="another"):
        await topology.ensure(bus, other)
    await bus.client.jetstream().delete_stream(bus.subjects.events_stream)
    with pytest.raises(StoreMissing, match="RAILBUS_EVENTS"):
        await topology.ensure(bus, marker)
    await bus.client.jetstream().delete_stream(bus.subjects.jobs_stream)
    with pytest.raises(StoreMissing, match="RAILBUS_JOBS"):
        await topology.ensure(bus, marker)
    marker.write_bytes(b"{}")
    with pytest.raises(IncarnationMismatch, match="damaged"):
        await topology.ensure(bus, marker)


async def test_many_that_start_at_once_agree_on_one_store(
    server: Server, common: CommonSettings, tmp_path: Path
) -> None:
    async def start(number: int) -> str:
        async with Bus.open(common, name=f"s{number}", service=True) as bus:
            await topology.ensure(bus, tmp_path / f"{number}.json")
            return bus.incarnation

    found = await asyncio.gather(*(start(number) for number in range(5)))
    assert len(set(found)) == 1
    assert found[0]


async def test_a_connection_that_is_closed_while_it_reconnects_leaves_nothing_running(
    common: CommonSettings, server: Server
) -> None:
    buses = [Bus(common, name="test", inbox="_INBOX") for _ in range(30)]
    for bus in buses:
        await bus.connect()
    server.kill()
    await until(lambda: not any(bus.is_connected for bus in buses))
    async with asyncio.timeout(PATIENCE_S):
        for number, bus in enumerate(buses):
            await asyncio.sleep(number * 0.003)
            await bus.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_queue_that_is_full_refuses_what_comes_with_a_code_and_takes_it_once_there_is_room(bus: Bus) -> None:
    jetstream, name = bus.client.jetstream(), bus.subjects.jobs_stream
    config = (await jetstream.stream_info(name)).config
    await jetstream.update_stream(replace(config, max_msgs=3))
    told = await asyncio.gather(
        *(bus.publish(Outgoing(bus.subjects.submit, b"{}", f"job-{number}")) for number in range(8)),
        return_exceptions=True,
    )
    assert sum(not isinstance(one, BaseException) for one in told) == 3
    assert {one.code for one in told if isinstance(one, QueueFull)} == {"QUEUE_FULL"}
    assert sum(isinstance(one, QueueFull) for one in told) == 5
    await jetstream.purge_stream(name)
    await bus.publish(Outgoing(bus.subjects.submit, b"{}", "job-7"))


async def test_a_store_that_was_restored_is_accepted_whole_and_renewed_once(bus: Bus, tmp_path: Path) -> None:
    first_host, second_host = tmp_path / "first.json", tmp_path / "second.json"
    for marker in (first_host, second_host):
        await topology.ensure(bus, marker)
    old = bus.incarnation
    write_marker(first_host, read_marker(first_host).restored(joins=False))
    unread = first_host.read_bytes()
    await topology.ensure(bus, first_host)
    renewed = bus.incarnation
    assert renewed != old
    first_host.write_bytes(unread)  # as another service of this root has read it, which starts at the same time
    await topology.ensure(bus, first_host)
    assert bus.incarnation == renewed
    await topology.check(bus, first_host)
    with pytest.raises(IncarnationMismatch, match="railbus restore"):
        await topology.ensure(bus, second_host)
    write_marker(second_host, read_marker(second_host).restored(joins=True))
    await topology.ensure(bus, second_host)
    assert bus.incarnation == renewed == read_marker(second_host).incarnation


async def test_a_store_that_was_restored_without_a_stream_is_refused(bus: Bus, tmp_path: Path) -> None:
    marker = tmp_path / "store.json"
    await topology.ensure(bus, marker)
    for stream in (bus.subjects.events_stream, bus.subjects.jobs_stream):
        write_marker(marker, read_marker(marker).restored(joins=False))
        await bus.client.jetstream().delete_stream(stream)
        with pytest.raises(StoreMissing, match=stream):
            await topology.ensure(bus, marker)
