"""What a person tells in the name of others: it costs nobody else a line, in the log and wherever the log is read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from log_processes import Telemetry
from railbus.embedded.permissions import HUMAN
from railbus.log_check import check
from railbus_shared import clock, wire
from railbus_shared.bus.sink import BusSink
from railbus_shared.layout import Layout
from railbus_shared.log_filter import Filter
from railbus_shared.log_reader import read_events
from railbus_shared.telemetry import LearningTelemetry
from railbus_shared.waiting import end
from railbus_telemetry.sidecar import SIDECAR_NAME
from until import PATIENCE_S, until
from users_for_tests import Cluster, running_cluster

pytestmark = pytest.mark.timeout(100)  # starts a service, and one again

RUNNER, SCRIPT = "runner-h-5c0f9d3e", "script-h-0b77e1c2"
"""Producers of a service and of another person; whoever reads events knows them, and which numbers come next."""
OF_RUNNER = ("job.checkpointed", "train.metrics", "log.line", "app.made")
OF_SCRIPT = ("app.made", "log.line")
COUNT = 3
"""Events of each type."""
FORGED = {"app.made": "railbus.evt.app.j-1.made", "log.line": "railbus.evt.log.j-1.line"}
"""Whatever a person may tell, on the subjects that the real ones have."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The last test starts its telemetry anew, and leaves it as it was."""
    people = dict.fromkeys((HUMAN, "ann", "ben"), "user")
    with running_cluster(tmp_path_factory.mktemp("cluster"), people) as cluster:  # type: ignore[arg-type]
        yield cluster


@pytest.fixture(scope="module")
def telemetry(cluster: Cluster) -> Iterator[Telemetry]:
    """What has taken everything that the two have told, after what others had told in their names."""
    key = str(cluster.keys["telemetry"].seed_path)
    with Telemetry(cluster.root.parent, cluster.server, env={"RAILBUS_NATS_KEY_FILE": key}) as service:
        asyncio.run(_attack(cluster, service))
        yield service


@pytest.fixture
def layout(cluster: Cluster, telemetry: Telemetry) -> Layout:
    assert telemetry.is_alive
    return cluster.settings(HUMAN).layout


async def _attack(cluster: Cluster, telemetry: Telemetry) -> None:
    await until(telemetry.is_ready)
    for who in ("ann", HUMAN):
        await _forge(cluster, who)
    await _tell(cluster, "runner", RUNNER, *OF_RUNNER)
    await _tell(cluster, "ben", SCRIPT, *OF_SCRIPT)
    await _flush(cluster)


async def _forge(cluster: Cluster, who: str) -> None:
    """Tell the next events of both: under the ids that theirs will have, and all together."""
    async with cluster.client(who) as (client, errors):
        for producer in (RUNNER, SCRIPT):
            fields = {
                "time": clock.now(),
                "producer": producer,
                "source": "forger",
                "host": "h",
                "job": "j-1",
                "data": {},
            }
            events = [{**fields, "id": f"{producer}-{number}", "number": number} for number in range(1, 20)]
            for kind, subject in FORGED.items():
                for event in events[:8]:
                    data, headers = wire.encode({**event, "type": kind}), {"Nats-Msg-Id": f"{event['id']}"}
                    await client.request(subject, data, headers=headers, timeout=PATIENCE_S)
                together = wire.encode({"v": 1, "common": {"type": kind}, "events": events})
                await client.request(subject, together, timeout=PATIENCE_S)
        assert errors == []


async def _tell(cluster: Cluster, who: str, producer: str, *kinds: str) -> None:
    async with cluster.bus(who) as bus:
        told = LearningTelemetry("script", host="h", producer=producer).with_sink(BusSink(bus))
        for number in range(COUNT):
            for kind in kinds:
                told.event(kind, job="j-1", real=number)
        sending = asyncio.ensure_future(told.run())
        assert await told.flush(timeout_s=PATIENCE_S)
        await end(sending)


async def _flush(cluster: Cluster) -> None:
    async with cluster.bus(HUMAN) as bus:
        await bus.request("railbus.req.telemetry.flush", {}, timeout_s=PATIENCE_S)


def _lines(layout: Layout) -> list[dict[str, Any]]:
    return list(read_events(layout, job="j-1"))


@pytest.mark.parametrize(("producer", "kinds"), [(RUNNER, OF_RUNNER), (SCRIPT, OF_SCRIPT)], ids=["service", "person"])
def test_no_event_of_a_service_or_of_another_person_is_kept_out_of_the_log(
    layout: Layout, producer: str, kinds: tuple[str, ...]
) -> None:
    real = [line for line in _lines(layout) if line["producer"] == producer and "real" in line["data"]]
    assert sorted((line["type"], line["data"]["real"]) for line in real) == sorted(
        (kind, number) for kind in kinds for number in range(COUNT)
    )


def test_each_line_says_which_person_told_it_and_none_that_a_service_did(layout: Layout) -> None:
    forged = {(who, producer) for who in ("ann", HUMAN) for producer in (RUNNER, SCRIPT)}
    lines = _lines(layout)
    assert {(line.get("person"), line["producer"]) for line in lines} == {*forged, (None, RUNNER), ("ben", SCRIPT)}
    assert all(("real" in line["data"]) == (line.get("person") in {None, "ben"}) for line in lines)


def test_a_log_in_which_others_have_told_in_somebodys_name_is_found_whole(layout: Layout) -> None:
    assert [found for found in check(layout, Filter()).findings() if found.is_fault] == []


@pytest.mark.parametrize("is_lost", [False, True], ids=["remembered", "read anew from the files"])
async def test_what_comes_again_after_a_kill_is_known_of_services_and_of_each_person(
    cluster: Cluster, telemetry: Telemetry, layout: Layout, is_lost: bool
) -> None:
    before = _lines(layout)
    telemetry.kill()
    if is_lost:
        (layout.logs / SIDECAR_NAME).unlink()
    async with cluster.bus("device_manager") as bus:
        await bus.api("CONSUMER.DELETE.RAILBUS_EVENTS.telemetry-writer")  # so that everything comes again
    telemetry.start()
    await until(telemetry.is_ready)
    await _flush(cluster)
    assert _lines(layout) == before
