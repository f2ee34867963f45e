"""What a holder of a person's key tries: each attack has worked where all users share one account of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from railbus.embedded.permissions import HUMAN, Role
from railbus_shared import wire
from railbus_shared.bus import topology
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.bus.follow import follow, seam
from railbus_shared.bus.reading import stored_after
from railbus_shared.errors import NotAuthorized
from until import PATIENCE_S, until
from users_for_tests import Cluster, Wire, running_cluster

PEOPLE: dict[str, Role] = {HUMAN: "user", "ann": "user", "looks": "read-only", "submits": "submit-only"}
LEASE = "$KV.railbus_leases.dev0"
ORDER = "railbus.req.runner.h1.start"
MOVE = "railbus.req.data.h1.progress"
FORGED = "railbus.evt.job.j1.succeeded"
PURGE = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
SOON_S = 0.1
"""Until what is refused without a word can be taken as refused; what gets through comes with the barrier before it."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests of this module: what they try leaves no trace."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), PEOPLE) as cluster:
        yield cluster


@pytest.fixture
async def person(cluster: Cluster) -> AsyncIterator[Client]:
    async with cluster.bus("device_manager") as bus:
        await topology.ensure(bus, cluster.root / "store.json")
    async with cluster.client(HUMAN) as (client, _):
        yield client


async def _last(cluster: Cluster, stream: str) -> int:
    async with cluster.bus("device_manager") as bus:
        return await bus.last_sequence(stream)


async def _stored_event(cluster: Cluster, person: Client) -> int:
    """A message of the attacker's own making in the stream of events; its sequence."""
    await person.request("railbus.evt.app.mine.made", b'{"holder": "mallory"}', timeout=PATIENCE_S)
    return await _last(cluster, "RAILBUS_EVENTS")


ASKED = {
    "the receipt of a job": ("railbus.jobs.submit", b"{}"),
    "the receipt of an event": ("railbus.evt.app.mine.made", b"{}"),
    "a message": ("$JS.API.DIRECT.GET.RAILBUS_EVENTS", b'{"seq": %d}'),
    "messages": ("$JS.API.DIRECT.GET.RAILBUS_EVENTS", b'{"seq": %d, "batch": 9, "next_by_subj": "railbus.evt.>"}'),
    "a key": ("$JS.API.DIRECT.GET.RAILBUS_EVENTS.railbus.evt.app.mine.made", b""),
    "what a stream is": ("$JS.API.STREAM.INFO.RAILBUS_EVENTS", b""),
    "what the account is": ("$JS.API.INFO", b""),
    "an answer": ("railbus.req.jobs.list", b"{}"),
    "an answer of a micro service": ("$SRV.PING", b""),
}


@pytest.mark.parametrize("headers", [None, PURGE], ids=["plain", "purge"])
@pytest.mark.parametrize(("subject", "body"), ASKED.values(), ids=ASKED)
async def test_no_answer_can_be_sent_into_state_or_to_a_runner_or_among_the_events(
    cluster: Cluster, person: Client, subject: str, body: bytes, headers: dict[str, str] | None
) -> None:
    sequence = await _stored_event(cluster, person)
    async with (
        cluster.client("runner") as (runner, _),
        cluster.client("device_manager") as (manager, errors),
        cluster.client("dataloader") as (dataloader, _),
    ):
        orders = await runner.subscribe(ORDER)
        moves = await dataloader.subscribe("railbus.req.data.h1.>")

        async def answer(message: Msg) -> None:
            await manager.publish(message.reply, b'{"holder": "mallory"}', headers=message.headers)

        await manager.subscribe("railbus.req.jobs.list", cb=answer)  # as trusting as can be
        await manager.flush()
        await runner.flush()
        await dataloader.flush()
        before = [await _last(cluster, stream) for stream in ("KV_railbus_leases", "RAILBUS_EVENTS")]
        for reply in (LEASE, ORDER, MOVE, FORGED, "$JS.API.STREAM.DELETE.RAILBUS_JOBS", "railbus.jobs.submit"):
            await person.publish(subject, body % sequence if b"%" in body else body, reply=reply, headers=headers)
        await person.request("$JS.API.INFO", b"", timeout=PATIENCE_S)  # all that was asked before has been seen
        async with cluster.bus("device_manager") as bus:
            assert await Bucket(bus, "railbus_leases").get_with_deleted("dev0") is None
            forged = [event async for event in _events(cluster, FORGED)]
        own = 6 if subject.startswith("railbus.evt.") and headers is None else 0
        after = [await _last(cluster, stream) for stream in ("KV_railbus_leases", "RAILBUS_EVENTS")]
        assert (after[0], after[1] <= before[1] + own, forged) == (before[0], True, [])
        with pytest.raises(nats.errors.TimeoutError):
            await orders.next_msg(SOON_S)
        assert (moves.pending_msgs, errors) == (0, [])


async def _events(cluster: Cluster, subject: str) -> AsyncIterator[dict[str, object]]:
    """Those on a subject now."""
    async with cluster.bus("device_manager") as bus:
        found = await bus.api("STREAM.INFO.RAILBUS_EVENTS", {"subjects_filter": subject})
        if found["state"].get("subjects"):  # type: ignore[attr-defined]
            async with contextlib.aclosing(follow(bus, subject)) as events:
                yield await anext(events)


CONSUMER = {"name": "mine", "ack_policy": "none", "filter_subject": "railbus.evt.app.mine.made"}


@pytest.mark.parametrize("target", [LEASE, ORDER, "_RINBOX.runner.x"])
@pytest.mark.parametrize("named", ["", ".mine", ".mine.railbus.evt.app.mine.made"])
async def test_a_person_makes_no_consumer_that_would_deliver_where_it_must_not_write(
    cluster: Cluster, person: Client, target: str, named: str
) -> None:
    await _stored_event(cluster, person)
    request = {"stream_name": "RAILBUS_EVENTS", "config": {**CONSUMER, "deliver_subject": target}}
    with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
        await person.request(
            f"$JS.API.CONSUMER.CREATE.RAILBUS_EVENTS{named}", json.dumps(request).encode(), timeout=SOON_S
        )
    async with cluster.bus("device_manager") as bus:
        found = await bus.api("CONSUMER.NAMES.RAILBUS_EVENTS")
        assert found["consumers"] == ["telemetry-writer"]


async def test_a_person_takes_no_job_from_the_queue_and_destroys_nothing(cluster: Cluster, person: Client) -> None:
    await person.request("railbus.jobs.submit", b'{"model": "m"}', timeout=PATIENCE_S)
    before = await _last(cluster, "RAILBUS_JOBS")
    for verb in (
        "CONSUMER.MSG.NEXT.RAILBUS_JOBS.device-manager", "CONSUMER.DELETE.RAILBUS_JOBS.device-manager",
        "STREAM.MSG.GET.RAILBUS_JOBS", "DIRECT.GET.RAILBUS_JOBS", "STREAM.DELETE.RAILBUS_JOBS",
        "STREAM.PURGE.RAILBUS_JOBS", "STREAM.MSG.DELETE.RAILBUS_JOBS", "STREAM.UPDATE.RAILBUS_JOBS",
        "STREAM.CREATE.MINE", "STREAM.SNAPSHOT.RAILBUS_JOBS", "CONSUMER.PAUSE.RAILBUS_JOBS.device-manager",
    ):  # fmt: skip
        with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
            await person.request(f"$JS.API.{verb}", b'{"seq": 1}', timeout=0.02)
    await person.publish("$JS.ACK.RAILBUS_JOBS.device-manager.1.1.1.1.0", b"+TERM")
    await person.request("$JS.API.INFO", b"", timeout=PATIENCE_S)
    async with cluster.bus("device_manager") as bus:
        info = await bus.client.jetstream().consumer_info("RAILBUS_JOBS", "device-manager")
        assert (info.num_ack_pending, info.ack_floor and info.ack_floor.consumer_seq) == (0, 0)
    assert await _last(cluster, "RAILBUS_JOBS") == before


async def test_nobody_hears_anothers_answers_though_all_listen_everywhere(cluster: Cluster, person: Client) -> None:
    async with cluster.client("ann") as (ann, errors):
        everything = [await ann.subscribe(subject) for subject in (">", "_INBOX.>", "_R_.>", "_RINBOX.>", "$JS.>")]
        await ann.flush()
        await person.request("railbus.jobs.submit", b"{}", timeout=PATIENCE_S)
        await person.publish("railbus.req.jobs.list", b"secret")
        await person.publish(f"{person._inbox_prefix.decode()}.x", b"to itself")
        await person.request("$JS.API.INFO", b"", timeout=PATIENCE_S)
        await ann.flush()
        assert [one.pending_msgs for one in everything] == [0] * 5
        assert errors == []


@pytest.mark.parametrize(
    ("who", "subject", "is_answered"),
    [
        ("looks", "$JS.API.DIRECT.GET.RAILBUS_EVENTS", True), ("looks", "railbus.jobs.submit", False),
        ("looks", "railbus.req.jobs.submit", False), ("looks", "railbus.req.jobs.cancel", False),
        ("looks", "railbus.req.devices.lease", False), ("looks", "railbus.evt.app.a.b", False),
        ("submits", "railbus.jobs.submit", True), ("submits", "$JS.API.DIRECT.GET.RAILBUS_EVENTS", False),
        ("submits", "railbus.req.jobs.list", False), ("submits", "$JS.API.STREAM.INFO.RAILBUS_JOBS", False),
        ("submits", "$KV.railbus_leases.dev0", False), ("submits", "$SRV.PING", False),
    ],
)  # fmt: skip
async def test_a_role_is_answered_what_it_may_ask_and_nothing_else(
    cluster: Cluster, person: Client, who: str, subject: str, is_answered: bool
) -> None:
    async with cluster.client(who) as (client, errors):
        if is_answered:
            sequence = await _stored_event(cluster, person)  # this may be the first test of its cluster
            assert (await client.request(subject, b'{"seq": %d}' % sequence, timeout=PATIENCE_S)).data
            assert errors == []
            return
        with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
            await client.request(subject, b'{"seq": 1}', timeout=SOON_S)
        await until(lambda: bool(errors))
        assert "permissions violation" in errors[0]


async def test_a_fact_whose_id_somebody_used_before_is_stored_all_the_same(cluster: Cluster, person: Client) -> None:
    fact = Outgoing("railbus.evt.job.j3.succeeded", b"{}", "job-end/j3")
    await person.request("railbus.evt.app.mine.made", b"{}", headers={"Nats-Msg-Id": fact.msg_id}, timeout=PATIENCE_S)
    async with cluster.bus("runner") as runner:
        first = await runner.publish(fact)
        assert await runner.last_sequence("RAILBUS_EVENTS") == first
        found = await runner.api("DIRECT.GET.RAILBUS_EVENTS.railbus.evt.job.j3.succeeded")
        assert found == {}
        other = Outgoing("railbus.evt.job.j4.succeeded", b"{}", "job-end/j4")
        assert await runner.publish(other) == await runner.publish(other) == first + 1


async def test_a_persons_own_event_is_stored_once_and_no_other_person_keeps_it_out(
    cluster: Cluster, person: Client
) -> None:
    """Both under the same id and on the same subject, as far as each of them knows."""
    told = [Outgoing("railbus.evt.app.theirs.made", wire.encode({"of": who}), "script-h-1") for who in ("ann", HUMAN)]
    async with cluster.bus("ann") as ann, cluster.bus(HUMAN) as other:
        first = await ann.publish(told[0])
        assert await ann.publish(told[0]) == first
        assert await other.publish(told[1]) == first + 1
        found = await stored_after(other, "RAILBUS_EVENTS", "railbus.evt.app.theirs.>", first - 1)
    assert [(one.subject, one.data) for one in found] == [
        (f"railbus.evt.app.theirs.made.{who}", one.data) for who, one in zip(("ann", HUMAN), told, strict=True)
    ]


@pytest.mark.parametrize("end", ["x", "x.y.ann", "x.y.device_manager", "x.y.z.ann", "x.y.*", "x.y.>", "*.*.ann"])
async def test_a_person_tells_no_event_under_the_name_of_another(cluster: Cluster, person: Client, end: str) -> None:
    before = await _last(cluster, "RAILBUS_EVENTS")
    for area in ("app", "log"):
        with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
            await person.request(f"railbus.evt.{area}.{end}", b"{}", timeout=SOON_S)
    assert await _last(cluster, "RAILBUS_EVENTS") == before


@pytest.mark.parametrize(
    ("who", "ask"),
    [
        ("submits", lambda bus: bus.request("railbus.req.jobs.list", {})),
        ("submits", lambda bus: bus.last_sequence("RAILBUS_EVENTS")),
        ("submits", lambda bus: stored_after(bus, "RAILBUS_EVENTS", "railbus.evt.>", 0)),
        ("submits", seam),
        ("looks", lambda bus: bus.request("railbus.req.jobs.cancel", {})),
        ("looks", lambda bus: bus.publish(Outgoing("railbus.evt.app.a.b", b"{}", ""))),
    ],
)
async def test_a_key_that_may_not_ask_is_told_so_at_once(
    cluster: Cluster, person: Client, who: str, ask: Callable[[Bus], Awaitable[object]]
) -> None:
    async with cluster.bus(who) as bus:
        for refused in await asyncio.gather(ask(bus), ask(bus), return_exceptions=True):
            assert isinstance(refused, NotAuthorized), refused
        await bus.check_jetstream()  # what it may is answered as before


async def test_a_person_who_may_only_submit_hears_no_events(cluster: Cluster, person: Client) -> None:
    async with cluster.client("submits") as (client, _), cluster.client("looks") as (looks, _):
        heard, seen = await client.subscribe("railbus.evt.>"), await looks.subscribe("railbus.evt.>")
        await client.flush()
        await looks.flush()
        async with cluster.client("runner") as (runner, _):
            await runner.request("railbus.evt.job.j2.started", b"{}", timeout=PATIENCE_S)
        assert (await seen.next_msg(PATIENCE_S)).subject == "railbus.evt.job.j2.started"
        await client.flush()
        assert heard.pending_msgs == 0


async def test_a_person_can_neither_subscribe_nor_connect_without_end_and_nobody_else_notices(
    cluster: Cluster, person: Client
) -> None:
    wires: list[Wire] = []
    try:
        while (wire := await _let_in(cluster, "ann")) is not None:
            wires.append(wire)
            assert len(wires) <= 256
        lines = [f"SUB of.mine.{number} {number}\r\n".encode() for number in range(20_000)]
        assert await wires[0].is_allowed(b"".join(lines[:5000]))
        assert not await wires[0].is_allowed(b"".join(lines[5000:]))
        await wires.pop().close()
        assert not await wires[0].is_allowed(b"SUB of.mine.too 20001\r\n")
        await person.request("$JS.API.INFO", b"", timeout=PATIENCE_S)
        await person.subscribe("railbus.evt.>")
        await person.flush()
    finally:
        for wire in wires:
            await wire.close()


async def _let_in(cluster: Cluster, name: str) -> Wire | None:
    """A further connection, unless the server closes it at once."""
    try:
        return await Wire.open(cluster, name)
    except AssertionError:
        return None
