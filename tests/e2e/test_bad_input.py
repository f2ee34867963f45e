"""Bad input on a whole system: an error with a code to the caller, an event of the refusal, and everyone goes on."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest
from nats.aio.client import Client as NatsClient

from railbus.client import Client
from railbus_shared import wire
from railbus_shared.contracts.logs import QueryEvents
from railbus_shared.files import to_json
from running_up import SERVICES, RunningUp, finished
from until import PATIENCE_S

pytestmark = pytest.mark.timeout(150)  # starts services that import torch

GOOD: dict[str, Any] = {"model": "m", "dataset": "digits", "entrypoint": "classifier"}
LONG = "a" * 200

CASES = [
    pytest.param({**GOOD, "modle": 1}, "INVALID_FIELD", "modle", id="unknown field"),
    pytest.param({**GOOD, "max_attempts": "3"}, "INVALID_FIELD", "max_attempts", id="wrong type"),
    pytest.param({**GOOD, "priority": 101}, "INVALID_FIELD", "priority", id="out of range"),
    pytest.param({"model": "m", "dataset": "digits"}, "INVALID_FIELD", "entrypoint", id="missing field"),
    pytest.param({**GOOD, "devices": {"kind": "tpu"}}, "INVALID_FIELD", "devices.kind", id="unknown kind"),
    pytest.param({**GOOD, "model": "../x"}, "INVALID_NAME", "model", id="path out of the root"),
    pytest.param({**GOOD, "model": ""}, "INVALID_NAME", "model", id="empty name"),
    pytest.param({**GOOD, "dataset": LONG}, "INVALID_NAME", "dataset", id="long name"),
    pytest.param({**GOOD, "model": "a\0b"}, "INVALID_NAME", "model", id="NUL"),
    pytest.param({**GOOD, "model": "dıgits"}, "INVALID_NAME", "model", id="look-alike"),
    pytest.param({**GOOD, "id": "Not.An.Id"}, "INVALID_NAME", "id", id="bad id"),
    pytest.param({**GOOD, "id": "j-0123ab-7"}, "INVALID_FIELD", "id", id="reserved id"),
    pytest.param({**GOOD, "entrypoint": "clasifier"}, "UNKNOWN_ENTRYPOINT", "entrypoint", id="unknown entrypoint"),
    pytest.param({**GOOD, "entrypoint": "os:system"}, "UNKNOWN_ENTRYPOINT", "entrypoint", id="not allowed"),
    pytest.param({**GOOD, "dataset": "nothing"}, "DATASET_NOT_FOUND", "dataset", id="missing dataset"),
]


async def _rejections(client: Client) -> list[dict[str, Any]]:
    await client.flush()
    found = await client.events(QueryEvents(types=("job.rejected", "bus.rejected"), limit=1000))
    return [dict(event) for event in found.events]


@pytest.mark.parametrize(("spec", "code", "field"), CASES)
async def test_a_bad_request_is_refused_with_field_value_and_remedy(
    up: RunningUp, spec: dict[str, Any], code: str, field: str
) -> None:
    async with up.raw_client() as raw:
        reply = await raw.request("railbus.req.jobs.submit", json.dumps(spec).encode(), timeout=PATIENCE_S)
    body = json.loads(reply.data)
    assert reply.headers is not None
    assert int(reply.headers["Nats-Service-Error-Code"]) >= 400
    assert body["code"] == code
    assert field in body["message"]
    assert body["hint"]


@pytest.mark.parametrize(("spec", "code", "field"), CASES)
async def test_a_bad_job_event_becomes_a_rejected_event_with_its_id(
    up: RunningUp, spec: dict[str, Any], code: str, field: str
) -> None:
    async with up.raw_client() as raw, up.client() as client:
        ack = await raw.jetstream().publish("railbus.jobs.submit", wire.encode(spec))
        incarnation = json.loads((up.layout.state / "store.json").read_bytes())["incarnation"]
        job = f"j-{incarnation[:6]}-{ack.seq}"
        async with asyncio.timeout(PATIENCE_S):
            mine: list[dict[str, Any]] = []
            while not mine:  # each round waits until telemetry has everything on disk
                mine = [event for event in await _rejections(client) if event.get("job") == job]
    (event,) = mine
    assert event["data"]["error"]["code"] == code
    assert field in event["data"]["error"]["message"]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(b'{"model": "m", "dat', "BAD_MESSAGE", id="truncated JSON"),
        pytest.param(b"\x81\xa5model\xc1", "BAD_MESSAGE", id="msgpack garbage"),
        pytest.param(b"\x00\x01\x02", "BAD_MESSAGE", id="noise"),
        pytest.param(b"[1, 2]", "BAD_MESSAGE", id="no map"),
        pytest.param(b"{" * 100_000, "BAD_MESSAGE", id="deep JSON"),
        pytest.param(b" " * (600 << 10), "MESSAGE_TOO_LARGE", id="over the limit"),
    ],
)
async def test_garbage_is_answered_and_recorded(up: RunningUp, payload: bytes, code: str) -> None:
    async with up.raw_client() as raw, up.client() as client:
        reply = await raw.request("railbus.req.jobs.submit", payload, timeout=PATIENCE_S)
        assert wire.decode(reply.data)["code"] == code
        async with asyncio.timeout(PATIENCE_S):
            mine: list[dict[str, Any]] = []
            while not mine:  # the answer may come before its event is published
                mine = [event for event in await _rejections(client) if event["data"].get("bytes") == len(payload)]
    assert {event["data"]["error"]["code"] for event in mine} == {code}


async def test_the_same_submission_is_the_same_job_and_another_spec_is_a_conflict(up: RunningUp) -> None:
    spec = {**GOOD, "model": "twice", "id": "twice", "params": {"epochs": 1}}
    async with up.raw_client() as raw, up.client() as client:
        first, second = await client.submit(spec), await client.submit(spec)
        assert first.record.sequence == second.record.sequence
        reply = await raw.request(
            "railbus.req.jobs.submit", json.dumps({**spec, "seed": 1}).encode(), timeout=PATIENCE_S
        )
        assert json.loads(reply.data)["code"] == "CONFLICT"
        events = await finished(client, "twice")
    assert [event["type"] for event in events].count("job.started") == 1


async def test_an_index_that_disagrees_with_its_shards_is_refused_at_once(up: RunningUp) -> None:
    folder = up.layout.dataset("broken")
    folder.mkdir()
    source = up.layout.dataset("digits")
    (folder / "shards").mkdir()
    for name in ("schema.json", "index.json"):
        text = (source / name).read_text().replace('"digits"', '"broken"')
        (folder / name).write_text(text)
    async with up.raw_client() as raw:
        reply = await raw.request(
            "railbus.req.jobs.submit", json.dumps({**GOOD, "dataset": "broken"}).encode(), timeout=PATIENCE_S
        )
    body = json.loads(reply.data)
    assert body["code"] == "INDEX_INVALID"
    assert "schema_sha256" in body["message"]


async def test_a_damaged_shard_fails_the_job_before_a_byte_of_it_is_trained_on(up: RunningUp) -> None:
    source, folder = up.layout.dataset("digits"), up.layout.dataset("flipped")
    (folder / "shards").mkdir(parents=True)
    schema = (source / "schema.json").read_text().replace('"digits"', '"flipped"').encode()
    (folder / "schema.json").write_bytes(schema)
    index = json.loads((source / "index.json").read_bytes())
    import hashlib

    index |= {"dataset": "flipped", "schema_sha256": hashlib.sha256(schema).hexdigest()}
    (folder / "index.json").write_bytes(to_json(index))
    shard = index["shards"][0]["file"]
    data = bytearray((source / "shards" / shard).read_bytes())
    data[-1] ^= 1
    (folder / "shards" / shard).write_bytes(data)
    async with up.client() as client:
        job = (await client.submit({**GOOD, "model": "flipped", "dataset": "flipped"})).id
        events = await finished(client, job)
        record = await client.job(job)
    assert record.state == "failed"
    assert record.error is not None
    assert record.error.code == "SHARD_CORRUPT"
    assert record.attempt == 1
    assert "job.first_step" not in {event["type"] for event in events}


async def _subjects(raw: NatsClient) -> list[str]:
    verbs = ["jobs.submit", "jobs.get", "jobs.list", "jobs.cancel", "devices.list", "devices.lease", "devices.renew"]
    verbs += ["devices.release", "devices.drain", "data.list", "data.describe", "data.open", "data.verify"]
    verbs += ["telemetry.query", "telemetry.flush"]
    return [f"railbus.req.{verb}" for verb in verbs] + ["railbus.jobs.submit", "railbus.evt.app.noise.made"]


async def test_noise_on_every_subject_leaves_every_service_serving(up: RunningUp) -> None:
    async with up.raw_client() as raw, up.client() as client:
        for subject in await _subjects(raw):
            await raw.publish(subject, os.urandom(1 << 19))
            await raw.publish(subject, b"\xdc\xff\xff" + bytes(1000))
            await raw.publish(subject, b"")
        await raw.flush()
        job = (await client.submit({**GOOD, "model": "after-noise", "params": {"epochs": 1}})).id
        events = await finished(client, job)
        assert events[-1]["type"] == "job.succeeded"
        assert len(await _rejections(client)) > 20
    for service in SERVICES:
        assert up.get(service, "/readyz")[0] == 200


async def test_a_script_of_ten_lines_has_its_lines_in_the_days_log(up: RunningUp) -> None:
    script = f"""
import logging
from railbus import LearningTelemetry
from railbus_shared.layout import Layout
from railbus_shared.settings import running_bus
from pathlib import Path
settings = running_bus(Layout(Path({str(up.root)!r})))
with LearningTelemetry("preprocess").with_bus(settings).with_logging() as telemetry:
    telemetry.event("rows_written", rows=1000)
    logging.getLogger("mine").warning("three rows were empty")
"""
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    assert await process.wait() == 0
    async with up.client() as client:
        await client.flush()
    mine = [line for line in up.log_lines() if line["source"] == "preprocess"]
    assert [line["data"]["rows"] for line in mine if line["type"] == "app.rows_written"] == [1000]
    assert [line["data"]["message"] for line in mine if line["type"] == "log.line"] == ["three rows were empty"]
