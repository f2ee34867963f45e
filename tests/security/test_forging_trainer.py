"""Training code that writes to the channel of its trainer by itself tells nothing that is not its own to tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from host_processes import TRAINING, running_host
from railbus.client import Client
from railbus.importing import import_dataset
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.follow import events_in
from railbus_shared.catalogue import EVENTS, may_be_told_by_trainers
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings
from running_up import finished

pytestmark = pytest.mark.timeout(120)  # starts services that import torch

FORGER = """
from railbus_runner.frames import Events
from railbus_shared import clock


def train(ctx):
    recorder = ctx._recorder
    sound = {
        "v": 1, "id": "", "type": "app.sound", "time": clock.now(), "producer": recorder._producer, "number": 0,
        "severity": "info", **recorder._common, "data": {},
    }
    lies = [
        {"type": "job.succeeded"}, {"type": "job.checkpointed"}, {"type": "service.stopped"}, {"type": 7},
        {"job": "another"}, {"host": "b"}, {"attempt": 2}, {"lease_epoch": 7}, {"source": "runner"},
        {"producer": ctx.params["producer"]}, {"producer": None},
    ]
    for lie in lies:
        forged = {**sound, **lie, "data": {"forged": str(lie)}}
        recorder._send(Events.model_construct(events=(sound, forged)))
        recorder._send(Events.model_construct(events=({"data": {"forged": "all else is missing"}},)))
    try:
        ctx.event("job.succeeded")
    except ValueError as exc:
        ctx.event("refused", why=str(exc), lies=len(lies))
    ctx.event("eval.finished")
"""
JOB = {"model": "m", "dataset": "digits", "entrypoint": "forger:train", "devices": {"kind": "cpu"}}


async def test_what_training_code_forges_is_told_by_nobody(common: CommonSettings, bus: Bus, tmp_path: Path) -> None:
    import_dataset(Layout(tmp_path / "a"), "digits")
    (tmp_path / "forger.py").write_text(FORGER)
    settings = {"runner_entrypoint_dirs": json.dumps([str(tmp_path)])}
    told: list[dict[str, object]] = []

    async def hear(message: Msg) -> None:
        told.extend(events_in(message.data, subject=message.subject))

    await bus.client.subscribe(bus.subjects.all_events, cb=hear)
    async with (
        running_host(common, tmp_path / "a", "a", TRAINING, settings=settings) as host,
        Client.connect(common) as client,
    ):
        await bus.client.flush()
        whose = next(event["producer"] for event in told if event["source"] == "device_manager")
        job = (await client.submit({**JOB, "params": {"producer": whose}})).id
        events = await finished(client, job)
    assert events[-1]["type"] == "job.succeeded"
    (refused,) = [event["data"] for event in events if event["type"] == "app.refused"]
    assert isinstance(refused, dict)
    assert "events of 'job' are told by services" in refused["why"]
    kinds = [event["type"] for event in events]
    assert (kinds.count("app.sound"), kinds.count("eval.finished")) == (refused["lies"], 1)
    assert [event for event in told if "forged" in str(event["data"])] == []
    assert host.log("runner").read_text().count("a trainer tells what it may not") == 1


def test_a_trainer_may_tell_its_own_and_nothing_that_a_service_answers_for() -> None:
    for one in EVENTS:
        assert may_be_told_by_trainers(one.type) == (
            one.told_by in {"trainer", "every process", "whoever lost them"}
        ), one.type
    assert may_be_told_by_trainers("app.anything")
    assert may_be_told_by_trainers("eval.finished")
    assert not may_be_told_by_trainers("job.finished")
