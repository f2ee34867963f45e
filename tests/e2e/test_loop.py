"""The whole loop: a job event by any NATS client, and everything that must lie on disk afterwards."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgpack
import pytest

from railbus_shared import wire
from railbus_shared.files import sha256_file
from running_up import RunningUp, finished, until_event
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(150)  # starts services that import torch, and trains

SCHEMAS = Path(__file__).parents[2] / "docs" / "agi_json_schema"
JOB = {
    "model": "digits-raw",
    "dataset": "digits",
    "entrypoint": "classifier",
    "params": {"epochs": 1},
    "devices": {"kind": "cpu"},
}


def _validate(path: Path, schema: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_bytes())
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{schema}.schema.json").read_bytes())).validate(document)
    return document


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_a_job_published_by_a_foreign_client_trains_to_completion(up: RunningUp, encoding: str) -> None:
    body = {**JOB, "model": f"digits-{encoding}"}
    payload = wire.encode(body, encoding=wire.Encoding[encoding.upper()])
    async with up.raw_client() as raw, up.client() as client:
        heard = await raw.subscribe("railbus.evt.>")
        ack = await raw.jetstream().publish("railbus.jobs.submit", payload)
        store = json.loads((up.layout.state / "store.json").read_bytes())
        job = f"j-{store['incarnation'][:6]}-{ack.seq}"
        events = await finished(client, job)
        assert events[-1]["type"] == "job.succeeded"
        subjects = set()
        async with asyncio.timeout(PATIENCE_S):
            while f"railbus.evt.job.{job}.succeeded" not in subjects:
                message = await heard.next_msg(PATIENCE_S)
                subjects.add(message.subject)
                assert isinstance(msgpack.unpackb(message.data), dict)
        assert f"railbus.evt.job.{job}.placed" in subjects


async def test_a_request_is_answered_in_its_own_encoding_with_the_record(up: RunningUp) -> None:
    async with up.raw_client() as raw, up.client() as client:
        body = json.dumps({**JOB, "id": "by-request"}).encode()
        reply = await raw.request("railbus.req.jobs.submit", body, timeout=PATIENCE_S)
        record = json.loads(reply.data)
        assert (record["id"], record["spec"]["model"]) == ("by-request", "digits-raw")
        await finished(client, "by-request")
        again = await raw.request("railbus.req.jobs.get", wire.encode({"id": "by-request"}), timeout=PATIENCE_S)
        assert msgpack.unpackb(again.data)["state"] == "succeeded"


async def test_what_lies_on_disk_afterwards_is_the_canonical_layout(up: RunningUp) -> None:
    async with up.client() as client:
        job = (await client.submit({**JOB, "model": "digits-disk"})).id
        events = await finished(client, job)
        await client.flush()
        record = await client.job(job)
    assert events[-1]["type"] == "job.succeeded", events[-1]
    root = up.root
    assert _validate(root / "datasets/digits/schema.json", "dataset")["columns"].keys() == {"image", "label"}
    index = _validate(root / "datasets/digits/index.json", "index")
    for shard in index["shards"]:
        assert sha256_file(root / "datasets/digits/shards" / shard["file"]) == shard["sha256"]
    model = root / "models/digits-disk"
    assert _validate(model / "model_schema.json", "model")["created_by_job"] == job
    metas = sorted((model / "checkpoints").glob("*.meta.json"))
    assert metas
    for path in metas:
        assert re.fullmatch(r"checkpoint-\d{6}\.meta\.json", path.name)
        meta = _validate(path, "checkpoint")
        assert (meta["job"], meta["spec_sha256"]) == (job, record.spec_sha256)
        for file in meta["files"]:
            data = model / "checkpoints" / file["file"]
            assert (data.stat().st_size, sha256_file(data)) == (file["bytes"], file["sha256"])
    assert record.checkpoint is not None
    assert record.checkpoint.number == max(int(path.name[11:17]) for path in metas)
    (log,) = root.glob("logs/[0-9]*/[0-9]*/[0-9]*/trainer.log.jsonl.gz")
    assert log.parent.name.isdigit()
    mine = [line for line in up.log_lines() if line.get("job") == job]
    assert {"job.queued", "job.placed", "job.started", "job.first_step", "job.succeeded"} <= {m["type"] for m in mine}


async def test_the_log_holds_every_event_once(up: RunningUp) -> None:
    async with up.client() as client:
        await client.flush()
    keys = [(line["producer"], line["number"]) for line in up.log_lines()]
    assert len(keys) == len(set(keys))
    by_producer: dict[str, set[int]] = {}
    for producer, number in keys:
        by_producer.setdefault(producer, set()).add(number)
    for producer, numbers in by_producer.items():
        if not producer.startswith("telemetry-rejected"):
            assert numbers == set(range(1, max(numbers) + 1)), producer


async def test_a_users_entrypoint_from_an_allowed_folder_trains(up: RunningUp) -> None:
    job = {"model": "paced", "dataset": "digits", "entrypoint": "paced:train", "params": {"epochs": 1, "pause_s": 0}}
    async with up.client() as client:
        events = await finished(client, (await client.submit(job)).id)
    assert events[-1]["type"] == "job.succeeded", events[-1]


async def test_a_users_error_fails_the_job_at_once_with_its_last_line(up: RunningUp) -> None:
    job = {"model": "paced", "dataset": "digits", "entrypoint": "paced:fail"}
    async with up.client() as client:
        submitted = await client.submit(job)
        await finished(client, submitted.id)
        record = await client.job(submitted.id)
    assert (record.state, record.end_cause, record.attempt) == ("failed", "user_error", 1)
    assert record.error is not None
    assert "no luck today" in record.error.message


async def test_a_running_job_can_be_cancelled(up: RunningUp) -> None:
    job = {"model": "cancelled", "dataset": "digits", "entrypoint": "paced:train", "params": {"epochs": 100}}
    async with up.client() as client:
        submitted = await client.submit(job)
        await until_event(client, submitted.id, "job.first_step")
        await client.cancel(submitted.id)
        await finished(client, submitted.id)
        record = await client.job(submitted.id)
    assert (record.state, record.end_cause) == ("cancelled", "cancelled")


def _open_streams(up: RunningUp) -> float:
    """As the dataloader tells Prometheus."""
    _, text = up.get("dataloader", "/metrics")
    (line,) = [line for line in text.splitlines() if line.startswith("railbus_data_sessions ")]
    return float(line.split()[1])


async def test_a_trainers_stream_is_open_for_as_long_as_it_trains(up: RunningUp) -> None:
    job = {"model": "streamed", "dataset": "digits", "entrypoint": "paced:train", "params": {"epochs": 100}}
    await until(lambda: _open_streams(up) == 0)  # those of jobs before may close a moment after their end is told
    async with up.client() as client:
        record = await client.submit(job)
        await until_event(client, record.id, "job.first_step")
        assert _open_streams(up) == 1
        await client.cancel(record.id)
        await finished(client, record.id)
    await until(lambda: _open_streams(up) == 0)


async def test_the_trainer_has_no_credentials_of_the_bus(up: RunningUp) -> None:
    job = {"model": "env", "dataset": "digits", "entrypoint": "paced:train", "params": {"epochs": 20}}
    async with up.client() as client:
        record = await client.submit(job)
        await until_event(client, record.id, "job.first_step")
        ledger = json.loads(next((up.layout.state / "runner" / "attempts").glob(f"{record.id}.*.json")).read_bytes())
        environment = Path(f"/proc/{ledger['pid']}/environ").read_bytes()
        await client.cancel(record.id)
        await finished(client, record.id)
    assert b"RAILBUS_" not in environment
    assert b"NATS" not in environment
