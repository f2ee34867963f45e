"""What services say at `/metrics` is what Prometheus reads, under names and units as it wants them."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from cluster_for_tests import active, job
from railbus.metrics_page import OF_EVERY_PROCESS, Declared, declared
from railbus_dataloader.measures import Measures as DataMeasures
from railbus_device_manager.known import KnownJobs
from railbus_device_manager.manager import ClusterFacts
from railbus_device_manager.measures import Measures as ManagerMeasures
from railbus_device_manager.measures import Shown
from railbus_runner.measures import Measures as RunnerMeasures
from railbus_shared import clock
from railbus_shared.bus.connection import Bus, Outgoing
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.metrics import Metrics
from railbus_shared.records import HeldRecord
from until import PATIENCE_S, until

_NAME = re.compile(r"railbus(_[a-z0-9]+)+\Z")
_SHORT = re.compile(r"_(ms|us|ns|sec|secs|minutes|hours|kb|mb|mib|gb|percent|pct|frac|num|count|sum|bucket)\b")
_OF_JOBS = {"job"}
"""Labels with as many values as jobs run on a host."""
_BOUNDED = {
    *_OF_JOBS,
    *("cause", "code", "consumer", "device", "endpoint", "kind", "mode", "name", "outcome", "priority"),
    *("reason", "service", "severity", "source", "state", "stream", "type", "version", "why"),
}


def page(metrics: Metrics) -> dict[str, Metric]:
    """The families of a page, as a parser reads them; by the name of their type line."""
    return {family.name: family for family in parse(generate_latest(metrics.registry).decode())}


def values(metrics: Metrics, family: str) -> dict[tuple[str, ...], float]:
    """The readings of a gauge or counter by the values of their labels."""
    samples = page(metrics)[family.removesuffix("_total")].samples
    return {tuple(sample.labels.values()): sample.value for sample in samples}


@pytest.mark.parametrize("one", declared(), ids=lambda one: f"{one.service}-{one.name}")
def test_a_metric_has_a_name_and_unit_as_prometheus_wants_them(one: Declared) -> None:
    assert _NAME.match(one.name)
    assert not _SHORT.search(one.name)
    assert one.name.endswith("_total") == (one.kind == "counter")
    assert one.meaning.endswith(".")
    assert not one.meaning.startswith("The ")
    assert set(one.labels) <= _BOUNDED, "say in this list why its values are few"
    if one.kind == "histogram":
        assert one.unit in {"seconds", "bytes"}
    if one.unit in {"seconds", "bytes", "ratio", "celsius"}:
        assert one.name.removesuffix("_total").endswith(f"_{one.unit}"), "the unit comes last"


def test_a_metric_that_two_services_have_is_the_same_in_both() -> None:
    seen: dict[str, Declared] = {}
    for one in declared():
        other = seen.setdefault(one.name, one)
        assert (one.kind, one.labels) == (other.kind, other.labels)


@pytest.fixture(params=["device_manager", "dataloader", "runner"])
def service(request: pytest.FixtureRequest) -> Metrics:
    """Metrics of a service that has just begun; telemetry's are asked by the end-to-end tests."""
    metrics = Metrics(request.param)
    match request.param:
        case "device_manager":
            ManagerMeasures.of(metrics)
            Shown(*cast("Any", (None, None, _Idle(), _Idle()))).join(metrics)
        case "dataloader":
            DataMeasures.of(metrics)
        case _:
            RunnerMeasures.of(metrics)
    return metrics


class _Idle:
    """A device_manager that does not place and has not looked at its devices yet."""

    is_placer = False
    is_watched = False
    shown = ()

    def states(self) -> list[object]:
        return []


def test_every_metric_is_on_the_page_with_its_help_and_type_and_nothing_else(service: Metrics) -> None:
    families = page(service)
    expected = {one.name.removesuffix("_total"): one for one in declared() if one.service in {"", service.service}}
    assert families.keys() == expected.keys() | {name.removesuffix("_total") for name in OF_EVERY_PROCESS}
    for name, one in expected.items():
        assert (families[name].type, families[name].documentation) == (one.kind, one.meaning)


def test_a_page_is_small(service: Metrics) -> None:
    assert len(generate_latest(service.registry)) < 20_000
    assert not any(family.endswith("_created") for family in page(service))


def test_types_of_events_that_users_make_up_are_one_series() -> None:
    metrics = Metrics("runner")
    metrics.published(["job.started", "job.started", "app.one", "app.two"])
    metrics.published(f"mine.{number}" for number in range(1000))
    told = values(metrics, "railbus_events_published_total")
    assert told[("job.started",)] == 2
    assert len(told) <= 101
    assert sum(told.values()) == 1004


def test_an_attempt_is_seen_from_its_order_to_its_end() -> None:
    metrics = Metrics("runner")
    measures = RunnerMeasures.of(metrics)
    ref, other = AttemptRef(job="j-1", lease_epoch=3), AttemptRef(job="j-2", lease_epoch=1)
    measures.began(ref, deadline_s=lambda: clock.boottime_s() + 10)
    measures.began(other, deadline_s=lambda: 0.0)
    measures.heard(fact("job.first_step", seconds=0.1))
    for step in (5, 9, 7, 12):  # a writer tells of an older step in between
        measures.stepped(ref, [{"type": "train.metrics", "step": step - 1}, {"type": "train.metrics", "step": step}])
    measures.stepped(ref, [{"type": "log.line"}])
    measures.stepped(ref, [])
    assert values(metrics, "railbus_attempts_running") == {(): 2}
    assert values(metrics, "railbus_job_step") == {("j-1",): 12}
    assert values(metrics, "railbus_train_steps_total") == {(): 7}
    assert 9 < values(metrics, "railbus_lease_expiry_seconds")[()] <= 10
    assert metrics.registry.get_sample_value("railbus_attempt_first_step_seconds_count") == 1
    measures.heard(fact("job.requeued", cause="device_fault"))
    measures.heard({**fact("job.failed", cause="hang"), "source": "trainer"})  # a user's own event of that name
    measures.is_over(ref)
    ended = values(metrics, "railbus_attempts_ended_total")
    assert (ended[("device_fault",)], sum(ended.values())) == (1, 1)
    assert values(metrics, "railbus_job_step") == {}
    measures.is_over(other)
    assert values(metrics, "railbus_lease_expiry_seconds") == {}


def fact(kind: str, **data: object) -> Any:
    return {"type": kind, "source": "runner", "job": "j-1", "lease_epoch": 3, "data": data}


def test_checkpoints_are_counted_as_they_are_told() -> None:
    metrics = Metrics("runner")
    measures = RunnerMeasures.of(metrics)
    measures.heard(fact("checkpoint.written", mode="async", seconds=2.0, stall_s=0.25, bytes=1000))
    measures.heard(fact("checkpoint.written", mode="sync", seconds=None, bytes="many"))  # whatever a trainer says
    measures.heard(fact("checkpoint.failed"))
    measures.heard(fact("checkpoint.skipped", why="busy"))
    measures.heard(fact("checkpoint.skipped", why="something of a user's"))
    get = metrics.registry.get_sample_value
    assert get("railbus_checkpoint_save_seconds_sum", {"mode": "async"}) == 2
    assert get("railbus_checkpoint_saved_bytes_total") == 1000
    assert get("railbus_checkpoint_stall_seconds_total") == 0.25
    assert get("railbus_checkpoint_failures_total") == 1
    assert values(metrics, "railbus_checkpoint_skips_total") == {("busy",): 1, ("other",): 1}


async def test_a_process_sees_how_late_its_loop_is_and_how_much_room_its_disk_has(tmp_path: Any) -> None:
    metrics = Metrics("runner")
    watching = asyncio.create_task(metrics.watch_process(tmp_path))
    get = metrics.registry.get_sample_value
    async with asyncio.timeout(PATIENCE_S):
        while not (get("railbus_event_loop_lag_seconds_count") and get("railbus_disk_size_bytes")):  # noqa: ASYNC110 - a metric tells nobody of its change
            await asyncio.sleep(0.05)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert 0 < (get("railbus_disk_free_bytes") or 0) <= (get("railbus_disk_size_bytes") or 0)


def test_the_placer_alone_shows_the_queue_and_its_oldest_job_that_could_start() -> None:
    metrics, facts, known = Metrics("device_manager"), ClusterFacts(), KnownJobs()
    measures, now = ManagerMeasures.of(metrics), clock.boottime_s()
    placer = SimpleNamespace(is_placer=True, known=known)
    Shown(*cast("Any", (None, facts, placer, _Idle()))).join(metrics)
    queued = [job("j-1", after=("j-0",)), job("j-2").changed(held_by="ada"), job("j-3"), job("j-4")]
    for age, record in enumerate(queued):
        known.accept(HeldRecord(record, age + 1))
        facts.apply_record(record.id, record, now=now - 100 + age)
    known.accept(HeldRecord(active("j-4", "alpha-gpu0"), 9))
    assert values(metrics, "railbus_jobs")[("queued",)] == 3
    assert values(metrics, "railbus_jobs")[("running",)] == 1
    assert 98 <= values(metrics, "railbus_queue_oldest_seconds")[()] < 99
    measures.placed(job("j-3", priority=5), now - 50)
    measures.placed(active("j-4", "alpha-gpu0"), clock.boottime_s() - 50)  # its second wait
    get = metrics.registry.get_sample_value
    assert (get("railbus_job_queue_wait_seconds_sum", {"priority": "high"}) or 0) > 1000, "from its submission on"
    assert 50 <= (get("railbus_job_queue_wait_seconds_sum", {"priority": "normal"}) or 0) < 60
    placer.is_placer = False
    for name in ("railbus_jobs", "railbus_queue_oldest_seconds", "railbus_stream_bytes"):
        assert values(metrics, name) == {}, name
    assert values(metrics, "railbus_placer") == {(): 0}


async def test_what_waits_in_the_streams_is_known_to_the_placer(bus: Bus) -> None:
    metrics, placer = Metrics("device_manager"), SimpleNamespace(is_placer=True, known=KnownJobs())
    shown = Shown(*cast("Any", (bus, ClusterFacts(), placer, _Idle())))
    shown.join(metrics)
    for number in range(3):
        await bus.publish(Outgoing(bus.subjects.event("job", "j-1", "started"), b"{}", msg_id=str(number)))
    looking = asyncio.create_task(shown.run())
    await until(lambda: bool(values(metrics, "railbus_stream_pending_messages")))
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    waiting = values(metrics, "railbus_stream_pending_messages")
    assert waiting == {("telemetry-writer", "RAILBUS_EVENTS"): 3, ("device-manager", "RAILBUS_JOBS"): 0}
    assert values(metrics, "railbus_stream_bytes")[("RAILBUS_EVENTS",)] > 0
    assert values(metrics, "railbus_stream_limit_bytes")[("RAILBUS_EVENTS",)] == 1 << 30
