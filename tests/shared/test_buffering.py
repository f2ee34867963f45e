"""What waits for the bus is bounded in bytes, and is given up in the order of its worth."""

from __future__ import annotations

import collections
import itertools
import random
import threading
import tracemalloc

import pytest
from pydantic import JsonValue

from railbus_shared.buffering import Bounds, EventBuffer, Loss, size_of
from railbus_shared.contracts.model import JsonMap

ONE = 1000  # roughly an event's size
_BIG = 10**9


def event(kind: str, step: int = 0, *, job: str = "j-1", severity: str = "info", **data: JsonValue) -> JsonMap:
    return {
        "v": 1, "id": "", "type": kind, "time": "2026-01-01T00:00:00.000000000Z", "producer": "p", "number": 0,
        "severity": severity, "source": "trainer", "host": "h", "job": job, "step": step, "data": data,
    }  # fmt: skip


def metric(step: int) -> JsonMap:
    return event("train.metrics", step, loss=0.5)


def with_data(given: JsonMap, **data: JsonValue) -> JsonMap:
    return {**given, "data": data}


def taken(buffer: EventBuffer) -> list[JsonMap]:
    found = []
    while len(buffer):
        found += buffer.take(100, _BIG)
    return found


def steps(events: list[JsonMap], *, name: str = "loss", job: str = "j-1") -> list[int]:
    return [int(str(one["step"])) for one in events if name in one["data"] and one["job"] == job]  # type: ignore[operator]


@pytest.mark.parametrize("points", [1, 10, 79, 80, 81, 1000, 1023, 20_001])
def test_a_curve_that_waits_too_long_thins_out_evenly_and_keeps_its_first_and_newest_point(points: int) -> None:
    bound = 80 * size_of(metric(0))
    buffer = EventBuffer(Bounds(metrics_bytes=bound))
    most = 0
    for step in range(points):
        buffer.add(metric(step))
        most = max(most, buffer.size_bytes)
    assert most <= bound + 2 * size_of(metric(0))
    lost = buffer.take_losses()
    found = steps(taken(buffer))
    assert len(found) + lost.total() == points
    assert (found[0], found[-1]) == (0, points - 1)
    gaps = collections.Counter(after - before for before, after in itertools.pairwise(found[:-1]))
    assert len(gaps) <= 1
    assert all(gap & (gap - 1) == 0 for gap in gaps)  # every second, every fourth, …
    assert len(found) >= min(points, 40)
    assert set(lost) <= {Loss("j-1", "train.metrics", "info")}


def test_each_series_thins_by_itself_and_a_slow_one_stays() -> None:
    buffer = EventBuffer(Bounds(metrics_bytes=80 * size_of(metric(0))))
    for step in range(5000):
        buffer.add(metric(step))
        if step % 1000 == 0:
            buffer.add(event("train.metrics", step, accuracy=0.5))
            buffer.add(metric(step) | {"job": "j-2"})
    found = taken(buffer)
    assert len(steps(found)) > 30
    assert {0, 4000} <= set(steps(found, name="accuracy")) & set(steps(found, job="j-2"))


def test_once_all_has_been_sent_a_curve_is_whole_again() -> None:
    buffer = EventBuffer(Bounds(metrics_bytes=80 * size_of(metric(0))))
    for step in range(1000):
        buffer.add(metric(step))
    taken(buffer)
    for step in range(50):
        buffer.add(metric(step))
    assert steps(taken(buffer)) == list(range(50))


def test_of_lines_the_oldest_of_the_least_worth_go_first_and_warnings_stay() -> None:
    line = event("log.line", message="x" * 100)
    buffer = EventBuffer(Bounds(lines_bytes=100 * size_of(line)))
    for number in range(60):
        buffer.add(event("log.line", number, severity="debug", message="x" * 100))
    for number in range(60):
        buffer.add(event("job.output", number, line="x" * 100))
        buffer.add(event("log.line", number, severity="error", message="x" * 100))
    lost = buffer.take_losses()
    assert set(lost) == {Loss("j-1", "log.line", "debug")}
    for number in range(60, 400):
        buffer.add(event("job.output", number, line="x" * 100))
    found = taken(buffer)
    assert [one["step"] for one in found if one["severity"] == "error"] == list(range(60))
    outputs = [int(str(one["step"])) for one in found if one["type"] == "job.output"]
    assert outputs == list(range(outputs[0], 400))
    assert not [one for one in found if one["severity"] == "debug"]


def test_facts_are_kept_to_the_bound_of_everything_and_take_the_room_of_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    buffer = EventBuffer(Bounds(metrics_bytes=20 * ONE, lines_bytes=20 * ONE, total_bytes=100 * ONE))
    for step in range(10):
        buffer.add(metric(step))
        buffer.add(event("job.output", step, line="x"))
    facts = 0
    while Loss("j-1", "job.placed", "info") not in buffer.losses:
        buffer.add(event("job.placed", facts))
        facts += 1
    buffer.add(metric(11))
    assert buffer.size_bytes <= 100 * ONE
    assert buffer.take_losses() == {
        Loss("j-1", "train.metrics", "info"): 11, Loss("j-1", "job.output", "info"): 10,
        Loss("j-1", "job.placed", "info"): 1,
    }  # fmt: skip
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    assert [one["step"] for one in taken(buffer)] == list(range(facts - 1))
    buffer.add(metric(12))
    assert len(buffer) == 1


def test_large_events_count_for_what_they_are() -> None:
    buffer = EventBuffer(Bounds(total_bytes=5_000_000))
    for number in range(100):
        buffer.add(event("app.told", number, text="x" * 500_000))
    assert len(buffer) == 9
    assert len(buffer.take(100, 1_200_000)) == 2
    assert len(buffer.take(100, 1)) == 1


@pytest.mark.parametrize("words", [{}, {"stream": "stdout", "line": "x" * 80}, {f"m{n}": "y" for n in range(30)}])
def test_the_estimate_of_memory_is_near_the_truth(words: dict[str, str]) -> None:
    tracemalloc.start()
    kept = [with_data(event("a.b", n), **{name: f"{word}{n}" for name, word in words.items()}) for n in range(500)]
    real = tracemalloc.get_traced_memory()[0] / 500
    tracemalloc.stop()
    assert 0.5 * real < size_of(kept[0]) < 3 * real


def test_many_series_stay_within_the_bound_too() -> None:
    bound = 200 * size_of(metric(0))
    buffer = EventBuffer(Bounds(metrics_bytes=bound))
    for step in range(6000):
        buffer.add(with_data(metric(step), **{f"m{step}": 0.5}))
        assert buffer.size_bytes <= bound + 2 * ONE
    assert steps(taken(buffer), name="m5999") == [5999]


@pytest.mark.parametrize("seed", range(20))
def test_events_that_come_together_wait_and_give_way_as_if_they_came_one_by_one(seed: int) -> None:
    chance = random.Random(seed)
    bounds = Bounds(metrics_bytes=chance.choice([30, 3000]) * ONE, lines_bytes=30 * ONE, total_bytes=6000 * ONE)
    one_by_one, together = EventBuffer(bounds), EventBuffer(bounds)
    for turn in range(60):
        made = _some(chance, turn)
        for event_ in made:
            one_by_one.add(event_)
        together.add_all(list(made))
        assert (len(together), together.size_bytes) == (len(one_by_one), one_by_one.size_bytes)
        assert together.has_facts == one_by_one.has_facts
        if chance.random() < 0.2:
            limits = chance.randrange(1, 50), chance.choice([1, 20 * ONE, _BIG])
            assert together.take(*limits) == one_by_one.take(*limits)
    assert together.take_losses() == one_by_one.take_losses()
    assert taken(together) == taken(one_by_one)
    assert together.size_bytes == one_by_one.size_bytes == 0


def _some(chance: random.Random, turn: int) -> list[JsonMap]:
    """Events of one type, alike or not."""
    kind = chance.choice(["train.metrics"] * 6 + ["log.line", "job.output", "job.placed"])
    severity = "info" if kind == "train.metrics" else chance.choice(["debug", "info", "warning"])
    data: list[dict[str, JsonValue]] = [
        {"loss": 0.5},
        {"loss": None},
        {"lr": 1},
        {"loss": "NaN"},
        {"l": {"a": [1]}},
        {},
    ]
    data = chance.choice([data, data[:1], data[:2]])
    return [
        with_data(event(kind, turn * 100 + number, severity=severity), **chance.choice(data))
        for number in range(chance.randrange(1, 40))
    ]


def test_an_event_without_data_waits_too() -> None:
    bare: JsonMap = {"type": "train.metrics", "severity": "info"}
    none: JsonMap = {**bare, "data": None}
    buffer = EventBuffer()
    buffer.add_all([dict(bare) for _ in range(5)])
    buffer.add_all([none, *(metric(step) for step in range(5))])
    assert len(taken(buffer)) == 11
    assert buffer.size_bytes == 0


def test_several_threads_lose_nothing_uncounted() -> None:
    buffer = EventBuffer(Bounds(metrics_bytes=50 * ONE, lines_bytes=50 * ONE))
    found: list[JsonMap] = []

    def record() -> None:
        for step in range(2000):
            buffer.add(metric(step))
            buffer.add(event("job.output", step, line="x"))
            buffer.add_all([metric(step) for _ in range(5)])

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found += buffer.take(50, _BIG)
    found += taken(buffer)
    assert len(found) + buffer.take_losses().total() == 42_000
    assert buffer.size_bytes == 0
