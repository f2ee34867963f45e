"""What each user may really do, asked of a real server by real clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.msg import Msg

import small_datasets
from railbus.embedded.credentials import ensure_keys
from railbus.embedded.permissions import HUMAN, OPERATOR, SERVICE_USERS, USERS, policy
from railbus_dataloader.fetching import FetchLimits, NatsSource
from railbus_dataloader.sources import WantedFile
from railbus_shared import catalogue
from railbus_shared.bus import topology
from railbus_shared.bus.bucket import Bucket, Write
from railbus_shared.bus.connection import Outgoing
from railbus_shared.bus.consume import consume_batches
from railbus_shared.bus.follow import follow, seam
from railbus_shared.topology import event_consumer
from remote_hosts import bulk, serving_host
from until import PATIENCE_S, until
from users_for_tests import Cluster, Wire, running_cluster, signature, within

STREAMS = ("RAILBUS_JOBS", "RAILBUS_EVENTS", "KV_railbus_jobs")
OWN = ("railbus.evt.app.mine.happened", "railbus.evt.log.mine.line")
BUCKETS = ("jobs", "devices", "leases", "datasets", "leader")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def stores(cluster: Cluster) -> Cluster:
    """With all streams and buckets."""
    async with cluster.bus("runner") as bus:
        await topology.ensure(bus, cluster.root / "store.json")
    return cluster


async def _may(cluster: Cluster, user: str, lines: dict[str, bytes]) -> list[str]:
    wire = await Wire.open(cluster, user)
    try:
        return [subject for subject, line in lines.items() if await wire.is_allowed(line)]
    finally:
        await wire.close()


async def _may_publish(cluster: Cluster, user: str, subjects: list[str]) -> list[str]:
    return await _may(cluster, user, {subject: f"PUB {subject} 2\r\n{{}}\r\n".encode() for subject in subjects})


async def _may_subscribe(cluster: Cluster, user: str, subjects: list[str]) -> list[str]:
    lines = {subject: f"SUB {subject} {number}\r\n".encode() for number, subject in enumerate(subjects, start=1)}
    return await _may(cluster, user, lines)


WRITERS = {
    HUMAN: (),
    "device_manager": BUCKETS,
    "runner": ("jobs", "devices", "leases"),
    "dataloader": ("datasets",),
    "telemetry": (),
    OPERATOR: BUCKETS,
}


@pytest.mark.parametrize("user", USERS)
async def test_state_is_written_by_its_owners_only(cluster: Cluster, user: str) -> None:
    subjects = [f"$KV.railbus_{bucket}.some.key" for bucket in BUCKETS] + ["$KV.foreign.key"]
    expected = [f"$KV.railbus_{bucket}.some.key" for bucket in BUCKETS if bucket in WRITERS[user]]
    assert await _may_publish(cluster, user, subjects) == expected


REQUESTS = [
    f"railbus.req.{one}" for one in ("jobs.list", "devices.list", "data.list", "runner.h1.start", "telemetry.query")
]
ASKS = {
    HUMAN: ("jobs", "devices", "data", "telemetry"),  # a runner obeys the device_manager alone
    "device_manager": ("data", "runner"),
    "runner": ("data",),
    "dataloader": ("data",),
    "telemetry": (),
    OPERATOR: (),
}
ANSWERS = {
    HUMAN: (),
    "device_manager": ("jobs", "devices"),
    "runner": ("runner",),
    "dataloader": ("data",),
    "telemetry": ("telemetry",),
    OPERATOR: (),
}


BETWEEN_SERVICES = {
    *("runner.*.start", "runner.*.stop", "runner.*.save", "devices.*.check"),
    *("data.*.progress", "data.*.close", "data.*.shard"),
}


def test_a_person_is_offered_every_request_but_those_between_services() -> None:
    """What is not offered cannot be reached by a reply subject either, for which nobody's rights are asked."""
    known = {one.tokens.replace(catalogue.HOST, "*") for one in catalogue.REQUESTS}
    granted = policy()
    offered = {one.removeprefix("railbus.req.") for one in granted.exports.once if one.startswith("railbus.req.")}
    assert offered == known - BETWEEN_SERVICES
    assert granted.people[HUMAN].once == granted.exports.once


@pytest.mark.parametrize("user", USERS)
async def test_requests_are_made_and_answered_by_those_who_must(cluster: Cluster, user: str) -> None:
    asked = await _may_publish(cluster, user, REQUESTS)
    assert asked == [s for s in REQUESTS if s.split(".")[2] in ASKS[user]]
    answered = await _may_subscribe(cluster, user, REQUESTS) if user != HUMAN else []
    assert answered == [s for s in REQUESTS if s.split(".")[2] in ANSWERS[user]]


@pytest.mark.parametrize(
    ("user", "expected"), [(HUMAN, ["open", "verify"]), ("runner", ["open", "verify", "progress", "close"])]
)
async def test_a_stream_is_moved_and_closed_by_its_runner_only(
    cluster: Cluster, user: str, expected: list[str]
) -> None:
    subjects = {verb: f"railbus.req.data.h1.{verb}" for verb in ("open", "verify", "progress", "close")}
    assert await _may_publish(cluster, user, list(subjects.values())) == [subjects[verb] for verb in expected]


@pytest.mark.parametrize("user", USERS)
async def test_a_runner_has_devices_checked_and_nobody_else_does(cluster: Cluster, user: str) -> None:
    subjects = ["railbus.req.devices.h1.check", "railbus.req.devices.cordon", "railbus.req.devices.revoke"]
    expected = {"runner": subjects[:1], HUMAN: subjects[1:]}.get(user, [])
    assert await _may_publish(cluster, user, subjects) == expected


@pytest.mark.parametrize("user", SERVICE_USERS)
async def test_no_service_listens_on_anothers_inboxes_or_on_everything(cluster: Cluster, user: str) -> None:
    own = f"_RINBOX.{user}.x.>"
    others = [*(f"_RINBOX.{other}.x" for other in SERVICE_USERS if other != user), "_INBOX.x", "_R_.x"]
    subjects = [own, *others, "_RINBOX.>", "_RINBOX.*.x", ">", "*.>", "$KV.>", "$JS.>", "railbus.>", "railbus.req.>"]
    assert await _may_subscribe(cluster, user, subjects) == [own]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (HUMAN, ["railbus.jobs.submit", *OWN]),
        ("device_manager", ["railbus.jobs.submit", *OWN, "railbus.evt.job.j1.queued"]),
        ("runner", [*OWN, "railbus.evt.job.j1.queued"]),
        ("dataloader", [*OWN, "railbus.evt.job.j1.queued"]),
        ("telemetry", [*OWN, "railbus.evt.job.j1.queued"]),
        (OPERATOR, []),
    ],
)
async def test_a_person_submits_and_tells_of_its_own_but_forges_no_event(
    cluster: Cluster, user: str, expected: list[str]
) -> None:
    subjects = [
        "railbus.jobs.submit",
        "railbus.jobs.other",
        *OWN,
        "railbus.evt.job.j1.queued",
        "railbus",
        "elsewhere",
    ]
    assert await _may_publish(cluster, user, subjects) == expected


@pytest.mark.parametrize("user", [*SERVICE_USERS, HUMAN])
async def test_nobody_destroys_a_stream_or_copies_it_and_a_person_steals_no_delivery(
    stores: Cluster, user: str
) -> None:
    verbs = ("STREAM.DELETE", "STREAM.PURGE", "STREAM.RESTORE", "STREAM.SNAPSHOT", "STREAM.MSG.DELETE")
    subjects = [f"$JS.API.{verb}.{stream}" for verb in verbs for stream in STREAMS]
    if user == HUMAN:
        subjects += [
            "$JS.API.STREAM.CREATE.MINE",
            "$JS.API.STREAM.UPDATE.RAILBUS_EVENTS",
            "$JS.API.CONSUMER.MSG.NEXT.RAILBUS_JOBS.device-manager",
            "$JS.API.CONSUMER.CREATE.RAILBUS_JOBS.mine",
            "$JS.API.CONSUMER.DURABLE.CREATE.RAILBUS_EVENTS.mine",
            "$JS.API.CONSUMER.DELETE.RAILBUS_JOBS.device-manager",
            "$JS.ACK.RAILBUS_JOBS.device-manager.1.1.1.1.0",
        ]
    assert await _may_publish(stores, user, subjects) == []


async def test_an_operator_copies_streams_of_railbus_and_puts_them_back_and_no_others(stores: Cluster) -> None:
    verbs = ("SNAPSHOT", "RESTORE", "DELETE", "UPDATE", "PURGE", "CREATE")
    subjects = [f"$JS.API.STREAM.{verb}.{stream}" for verb in verbs for stream in (*STREAMS, "FOREIGN")]
    assert await _may_publish(stores, OPERATOR, subjects) == [
        f"$JS.API.STREAM.{verb}.{stream}" for verb in verbs[:4] for stream in STREAMS
    ]
    own, others = f"_RINBOX.{OPERATOR}.x.>", ["_RINBOX.runner.x", "_RINBOX.>", ">", "$KV.>", "railbus.evt.>", "$JS.>"]
    assert await _may_subscribe(stores, OPERATOR, [own, *others]) == [own]


async def test_a_person_neither_takes_from_nor_removes_the_consumer_of_a_service(stores: Cluster) -> None:
    consumer = "telemetry-writer"
    subjects = [
        f"$JS.API.CONSUMER.{verb}.RAILBUS_EVENTS.{consumer}"
        for verb in ("CREATE", "MSG.NEXT", "DELETE", "DURABLE.CREATE")
    ] + [f"$JS.ACK.RAILBUS_EVENTS.{consumer}.1.1.1.1.0"]
    assert await _may_publish(stores, HUMAN, subjects) == []


@pytest.mark.parametrize("user", SERVICE_USERS)
async def test_any_service_may_be_the_first_to_create_what_must_exist(cluster: Cluster, user: str) -> None:
    async with cluster.bus(user) as bus:
        await topology.ensure(bus, cluster.root / "store.json")
        assert bus.incarnation


async def test_a_person_submits_a_job_and_gets_the_receipt(stores: Cluster) -> None:
    async with stores.client(HUMAN) as (client, errors):
        reply = await client.request("railbus.jobs.submit", b'{"model": "m"}', timeout=PATIENCE_S)
        assert json.loads(reply.data) == {"stream": "RAILBUS_JOBS", "seq": 1}
        assert errors == []


@pytest.mark.parametrize("user", USERS)
async def test_who_writes_the_log_says_where_and_nobody_else_does_but_those_who_lead(
    cluster: Cluster, user: str
) -> None:
    subjects = ["$KV.railbus_leader.log", "$KV.railbus_leader.placer", "$KV.railbus_leader.log.more"]
    expected = {"telemetry": subjects[:1], "device_manager": subjects, OPERATOR: subjects}.get(user, [])
    assert await _may_publish(cluster, user, subjects) == expected


async def test_a_person_reads_state(stores: Cluster) -> None:
    async with stores.bus("device_manager") as manager, stores.bus(HUMAN) as person:
        await Bucket(manager, "railbus_jobs").write(Write("j1", {"state": "queued"}, 0))
        bucket = Bucket(person, "railbus_jobs")
        entry = await bucket.get("j1")
        assert entry is not None
        assert entry.value == {"state": "queued"}
        assert set(await bucket.snapshot()) == {"j1"}


@pytest.mark.parametrize("user", [*SERVICE_USERS, HUMAN])
async def test_whoever_follows_events_hears_of_them(cluster: Cluster, user: str) -> None:
    """Those of which nothing is heard come with the next look only, up to a second late."""
    assert await _may_subscribe(cluster, user, ["railbus.evt.>", "railbus.evt.*.j-1.>"]) == [
        "railbus.evt.>",
        "railbus.evt.*.j-1.>",
    ]


async def test_a_person_hears_events_live_and_from_the_stream(stores: Cluster) -> None:
    async with stores.client("runner") as (runner, _), stores.client(HUMAN) as (person, errors):
        live = await person.subscribe("railbus.evt.>")
        await person.flush()
        await runner.request("railbus.evt.job.j1.started", b"{}", timeout=PATIENCE_S)
        assert (await live.next_msg(PATIENCE_S)).subject == "railbus.evt.job.j1.started"
        await person.request("railbus.evt.app.mine.done", b'{"n": 2}', timeout=PATIENCE_S)
        async with stores.bus(HUMAN) as bus, contextlib.aclosing(follow(bus, "railbus.evt.>")) as events:
            own = {"person": HUMAN}
            assert [await within(anext(events)), await within(anext(events))] == [{}, {"n": 2, **own}]
            await runner.request("railbus.evt.job.j1.succeeded", b'{"n": 3}', timeout=PATIENCE_S)
            await person.request("railbus.evt.app.mine.done", b'{"n": 4}', timeout=PATIENCE_S)
            assert [await within(anext(events)), await within(anext(events))] == [{"n": 3}, {"n": 4, **own}]
        assert errors == []


async def test_a_person_learns_up_to_where_the_log_files_go(stores: Cluster) -> None:
    async with stores.bus("runner") as runner:
        incarnation = await topology.incarnation_of_store(runner)
        last = await runner.publish(Outgoing("railbus.evt.job.j-1.queued", b"{}", msg_id="e-1"))
    async with stores.bus(HUMAN) as person:
        assert await seam(person) == (incarnation, 0)
    stopping = asyncio.Event()

    async def write(_: object) -> bool:
        stopping.set()
        return True

    async with stores.bus("telemetry") as telemetry:
        await consume_batches(telemetry, event_consumer(telemetry.subjects), write, stopping=stopping)
    async with stores.bus(HUMAN) as person:
        assert await seam(person) == (incarnation, last)


async def test_a_write_of_the_runner_into_the_datasets_is_refused_and_stores_nothing(stores: Cluster) -> None:
    async with stores.client("runner") as (client, errors):
        with pytest.raises((nats.errors.Error, TimeoutError)):
            await client.request("$KV.railbus_datasets.digits", b"{}", timeout=0.3)
        await until(lambda: any("railbus_datasets" in error for error in errors))
    async with stores.bus("dataloader") as bus:
        assert await Bucket(bus, "railbus_datasets").get("digits") is None


async def test_a_service_answers_a_person_and_another_service(cluster: Cluster) -> None:
    async with cluster.client("dataloader") as (server, errors):

        async def answer(message: Msg) -> None:
            await message.respond(b"here")

        await server.subscribe("railbus.req.data.list", cb=answer)
        await server.flush()
        for user in (HUMAN, "runner", "device_manager"):
            async with cluster.client(user) as (asker, _):
                assert (await asker.request("railbus.req.data.list", b"{}", timeout=PATIENCE_S)).data == b"here"
        assert errors == []


async def test_a_dataloader_fetches_a_file_from_another(cluster: Cluster, tmp_path: Path) -> None:
    settings = cluster.settings("dataloader")
    async with serving_host(settings, tmp_path, "a") as host, bulk(settings) as bus:
        index = small_datasets.write(host.layout, 10)
        shard = index.file.shards[0]

        async def hosts(_: WantedFile) -> tuple[str, ...]:
            return ("a",)

        source = NatsSource(bus, hosts, host="b", limits=FetchLimits(stall_s=2))
        await source.fetch(WantedFile("d", index.sha256, shard.file, shard.sha256, shard.bytes), tmp_path / "got")
        assert (tmp_path / "got").stat().st_size == shard.bytes


@pytest.mark.parametrize(("user", "expected"), [(HUMAN, 0), ("dataloader", 2)])
async def test_files_and_credit_are_between_dataloaders(cluster: Cluster, user: str, expected: int) -> None:
    subjects = ["railbus.req.data.h1.shard", "_RINBOX.dataloader.x"]
    assert await _may_publish(cluster, user, subjects) == subjects[:expected]


@pytest.mark.parametrize("who", ["nobody", "a stranger", "another's signature"])
async def test_nobody_joins_without_a_key_of_a_user(cluster: Cluster, tmp_path: Path, who: str) -> None:
    stranger = ensure_keys(tmp_path / "other", ["user"])["user"]
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.server.port)
    info = json.loads((await reader.readline()).removeprefix(b"INFO "))
    options = {
        "nobody": {},
        "a stranger": {"nkey": stranger.public, "sig": signature(stranger, info["nonce"])},
        "another's signature": {"nkey": cluster.keys[HUMAN].public, "sig": signature(stranger, info["nonce"])},
    }[who]
    writer.write(b"CONNECT " + json.dumps(options).encode() + b"\r\nPING\r\n")
    said = await within(reader.read())
    writer.close()
    await writer.wait_closed()
    assert b"Authorization Violation" in said
    assert b"PONG" not in said
