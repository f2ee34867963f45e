"""Whole streams out of NATS and back into it, by JetStream's own snapshots, and what a snapshot leaves out.

nats-server 2.15 reads a snapshot message by message, up to the sequence that the stream had when it was asked, and lets
everybody write meanwhile. So what is overwritten or removed before its turn is in no snapshot, neither as it was nor as
it is: a key that changes would be lost. `messages_after` reads what has come since, which has its newest value; both
together are the stream at the moment when the reading came to its end.

A restore that ends halfway leaves a stream that looks like any other: whoever restores must mark it, and remove it.

Source: the types of `stream_snapshot` and `stream_restore` in jsm.go; everything said here was tried with 2.15.1.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from railbus_shared import clock
from railbus_shared.bus.client import bus_errors
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BusUnavailable, NotAuthorized, RequestTimeout

Json = dict[str, Any]

CHUNK_BYTES: Final = 256 << 10
_WINDOW_BYTES: Final = 8 << 20
"""On its way and not yet on disk; it bounds the memory of both ends."""
_START_S: Final = 120.0
"""The server reads and checks the whole stream before it answers."""
_CHUNK_S: Final = 30.0
_LEAST_BYTES: Final = 256
_SOON_S: Final = 0.1
_SLOW_S: Final = 0.5
_END_S: Final = 300.0
_PING_S: Final = 1.0
_DELETED_S: Final = 10.0
_AGAIN_S: Final = 0.1
_NO_MESSAGE: Final = 10037
_NO_STREAM: Final = 10059
_TAKEN: Final = {10058, 10130}
_DONE: Final = {None, "204"}
"""How a snapshot ends well: a small one says nothing."""
_OF_ONE_WRITE: Final = ("Nats-Expected-", "Nats-Batch-", "Nats-Msg-Id")
"""Headers that held when a message was written, and mean nothing when it is written again."""
_TTL: Final = "Nats-TTL"


@dataclass(frozen=True)
class Taken:
    """A stream as it was when its snapshot began."""

    config: Json
    state: Json

    @property
    def last_sequence(self) -> int:
        return int(self.state["last_seq"])


async def snapshot(bus: Bus, stream: str, write: Callable[[bytes], None]) -> Taken:
    """Have a stream and its consumers sent, each message's checksum compared before, and give each chunk to `write`.

    A chunk is asked for once there is room for it: not before those that are on their way have been written. `write`
    runs in a thread. Raises NotFound, RequestTimeout, BusUnavailable, NotAuthorized, and what `write` raises.
    """
    asked = f"$JS.API.STREAM.SNAPSHOT.{stream}"
    inbox = bus.client.new_inbox()
    wanted = {"deliver_subject": inbox, "chunk_size": CHUNK_BYTES, "window_size": _WINDOW_BYTES, "jsck": True}
    with bus_errors(stream):
        chunks = await bus.client.subscribe(inbox)
    try:
        async with bus.asking(asked, name=stream):
            reply: Msg = await bus.client.request(asked, json.dumps(wanted).encode(), timeout=_START_S)
            answer = _checked(reply.data)
        await _receive(bus, stream, chunks, write)
    finally:
        with contextlib.suppress(nats.errors.Error):
            await chunks.unsubscribe()
    return Taken(answer["config"], answer["state"])


async def _receive(bus: Bus, stream: str, chunks: Subscription, write: Callable[[bytes], None]) -> None:
    number = 0
    while True:
        with bus_errors(stream):
            chunk: Msg = await chunks.next_msg(_CHUNK_S)
        if not chunk.data:
            break
        number += 1
        if chunk.reply and chunk.reply.rpartition(".")[2] != str(number):
            raise BusUnavailable(f"a piece of stream {stream!r} was lost on its way", hint="try again")
        await asyncio.to_thread(write, chunk.data)
        if chunk.reply:
            await bus.send(chunk.reply, b"")
    status = (chunk.headers or {}).get("Status")
    if status not in _DONE:
        said = (chunk.headers or {}).get("Description", "")
        raise BusUnavailable(f"NATS gave up sending stream {stream!r}: {status} {said}", hint="try again")


async def put_back(
    bus: Bus, config: Mapping[str, object], state: Mapping[str, object], chunks: Iterable[bytes]
) -> Json:
    """Make a stream of what `snapshot` gave, with its consumers; returns its state.

    If it raises, or its process is ended, a part of the stream may be there. Raises BusUnavailable, RequestTimeout,
    StorageFull, NotAuthorized, and what `chunks` raises.
    """
    name = str(config["name"])
    asked = f"$JS.API.STREAM.RESTORE.{name}"
    begin = json.dumps({"config": config, "state": state}).encode()
    async with bus.asking(asked, name=name):
        target = str((await _once_free(bus, asked, begin))["deliver_subject"])
    pace = _Pace()
    for piece in pace.pieces(chunks):
        asked_s = clock.boottime_s()
        async with bus.asking(target, name=name):
            answered: Msg = await bus.client.request(target, piece, timeout=_CHUNK_S)
            if answered.data:
                _checked(answered.data)
        pace.heed(clock.boottime_s() - asked_s)
    async with bus.asking(target, name=name):
        done: Msg = await bus.client.request(target, b"", timeout=_END_S)
        restored: Json = _checked(done.data)["state"]
    return restored


class _Pace:
    """How much is sent at once: what the server unpacks soon.

    It answers a piece when it has unpacked it, and gives up if that takes 5 s. A few kilobytes may become 50 MB.
    """

    def __init__(self) -> None:
        self.size_bytes = _LEAST_BYTES

    def pieces(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The same bytes, in pieces of the size that is right then."""
        for chunk in chunks:
            begin = 0
            while begin < len(chunk):
                piece = chunk[begin : begin + self.size_bytes]
                begin += len(piece)
                yield piece

    def heed(self, took_s: float) -> None:
        """Learn from how long the last piece took."""
        if took_s > _SLOW_S:
            self.size_bytes = max(_LEAST_BYTES, self.size_bytes // 4)
        elif took_s < _SOON_S:
            self.size_bytes = min(CHUNK_BYTES, 2 * self.size_bytes)


async def _once_free(bus: Bus, asked: str, begin: bytes) -> Json:
    """The answer to a request to restore; in a cluster a name is free only some time after its stream was removed."""
    give_up_s = clock.boottime_s() + _DELETED_S
    while True:
        reply: Msg = await bus.client.request(asked, begin, timeout=_START_S)
        try:
            return _checked(reply.data)
        except nats.js.errors.APIError as exc:
            if not bus.is_clustered or exc.err_code not in _TAKEN or clock.boottime_s() > give_up_s:
                raise
        await asyncio.sleep(_AGAIN_S)


async def messages_after(bus: Bus, stream: str, sequence: int) -> AsyncIterator[Json]:
    """The messages that a stream holds behind a sequence, as its leader says them, until there are no more.

    What is overwritten before its turn does not come; what has overwritten it does, as it is further behind.
    Raises BusUnavailable, RequestTimeout, NotAuthorized.
    """
    while True:
        with bus_errors(stream):
            try:
                answer = await _api(bus, f"STREAM.MSG.GET.{stream}", {"seq": sequence + 1, "next_by_subj": ">"})
            except nats.js.errors.NotFoundError as exc:
                if exc.err_code == _NO_MESSAGE:
                    return
                raise
        message: Json = answer["message"]
        sequence = int(message["seq"])
        yield message


async def write_again(bus: Bus, message: Mapping[str, Any]) -> None:
    """Store a message that `messages_after` gave, in the stream that takes its subject; its lifetime goes on."""
    headers = _parsed(base64.b64decode(message.get("hdrs") or b""))
    if headers.get(_TTL, "").isdecimal():
        age_s = (clock.now_ns() - clock.parse_rfc3339(str(message["time"]))) / clock.NS_PER_S
        headers[_TTL] = str(max(1, round(int(headers[_TTL]) - age_s)))
    subject, data = str(message["subject"]), base64.b64decode(message.get("data") or b"")
    async with bus.asking(subject):
        await bus.client.jetstream().publish(subject, data, headers=headers or None, timeout=_CHUNK_S)


def _parsed(raw: bytes) -> dict[str, str]:
    """Headers as NATS stores them, without those of the write itself."""
    lines = raw.decode("utf-8", "replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name: value.strip() for name, _, value in pairs if not name.startswith(_OF_ONE_WRITE)}


async def need_operator(bus: Bus) -> None:
    """Raises NotAuthorized for the key of a service, which hears no answer here; RequestTimeout, BusUnavailable."""
    try:
        await bus.check_jetstream()
    except RequestTimeout as exc:
        if "permissions violation" not in bus.problem.lower():
            raise
        raise NotAuthorized(
            "this key is not the operator's", hint="it is operator.nk among the keys of the root or the deployment"
        ) from exc


# --- what a restore asks of streams ----------------------------------------------------------------------------------


async def stream_info(bus: Bus, stream: str) -> Json | None:
    """What the server says of a stream; None if there is none. Raises BusUnavailable, RequestTimeout, NotAuthorized."""
    with bus_errors(stream):
        try:
            return await _api(bus, f"STREAM.INFO.{stream}")
        except nats.js.errors.NotFoundError as exc:
            if exc.err_code != _NO_STREAM:
                raise
            return None


async def delete_stream(bus: Bus, stream: str) -> None:
    """Remove a stream with all that it holds; nothing if there is none."""
    with bus_errors(stream):
        try:
            await _api(bus, f"STREAM.DELETE.{stream}")
        except nats.js.errors.NotFoundError as exc:
            if exc.err_code != _NO_STREAM:
                raise


async def delete_message(bus: Bus, stream: str, sequence: int) -> None:
    """Remove one message of a stream; nothing if it is gone."""
    with bus_errors(stream):
        try:
            await _api(bus, f"STREAM.MSG.DELETE.{stream}", {"seq": sequence, "no_erase": True})
        except nats.js.errors.APIError as exc:
            if exc.err_code not in {_NO_MESSAGE, 10043, 10057}:  # 10043, 10057: there is no such message
                raise


async def set_metadata(bus: Bus, stream: str, metadata: Mapping[str, str]) -> None:
    """Put other metadata in the place of those that a stream has; raises NotFound."""
    with bus_errors(stream):
        found = await _api(bus, f"STREAM.INFO.{stream}")
        await _api(bus, f"STREAM.UPDATE.{stream}", {**found["config"], "metadata": dict(metadata)})


async def forget_consumers_ahead(bus: Bus, stream: str, last_sequence: int) -> list[str]:
    """Remove consumers that have been given more than the stream holds, and would not see what comes next.

    Whoever needs them makes them again, and is given everything. Returns their names.
    """
    with bus_errors(stream):
        found = await _api(bus, f"CONSUMER.LIST.{stream}")
        ahead = [str(one["name"]) for one in found["consumers"] if int(one["delivered"]["stream_seq"]) > last_sequence]
        for name in ahead:
            await _api(bus, f"CONSUMER.DELETE.{stream}.{name}")
    return ahead


async def running_services(bus: Bus) -> list[str]:
    """Names of the services that answer on the bus."""
    names: set[str] = set()
    inbox = bus.client.new_inbox()
    async with bus.asking("$SRV.PING"):
        answers = await bus.client.subscribe(inbox)
        await bus.client.publish("$SRV.PING", b"", reply=inbox)
        with contextlib.suppress(nats.errors.TimeoutError, TimeoutError):
            while True:
                answer: Msg = await answers.next_msg(_PING_S)
                if not answer.data:  # nobody is there
                    break
                names.add(str(json.loads(answer.data)["name"]))
        await answers.unsubscribe()
    return sorted(names)


def server_version(bus: Bus) -> str:
    """Of the nats-server that the bus is connected to."""
    return str(bus.client._server_info.get("version", ""))  # noqa: SLF001 - nats-py has it parsed only


async def _api(bus: Bus, verb: str, body: Mapping[str, object] | None = None) -> Json:
    """The answer to a request to JetStream; raises APIError of nats-py, which callers tell apart."""
    answer: Json = await bus.api(verb, body)
    if "error" in answer:
        nats.js.errors.APIError.from_error(answer["error"])
    return answer


def _checked(data: bytes) -> Json:
    """An answer of JetStream that is no error; raises APIError of nats-py, RequestTimeout for one that is none."""
    try:
        answer: Json = json.loads(data)
    except ValueError as exc:
        raise RequestTimeout(f"NATS answered {data[:80]!r}", hint="whether it was carried out is unknown") from exc
    if "error" in answer:
        nats.js.errors.APIError.from_error(answer["error"])
    return answer
