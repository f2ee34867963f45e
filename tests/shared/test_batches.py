"""Batches: whatever events go in come out the same, and quick checks agree with the contract."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from railbus_shared import clock, wire
from railbus_shared.batches import batch_of, columns_of, events_of
from railbus_shared.contracts.events import EventColumns
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import WireError

EXAMPLE = Path(__file__).parents[2] / "examples/ship_events.py"
NOON_NS = clock.parse_rfc3339("2026-11-23T12:00:00Z")


def made(number: int, at_ns: int, data: JsonMap, **fields: Any) -> JsonMap:
    return {
        "v": 1, "id": f"p-{number}", "type": "train.metrics", "time": clock.rfc3339(at_ns), "producer": "p",
        "number": number, "source": "trainer", "host": "h", "step": number, "data": data, **fields,
    }  # fmt: skip


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.text('a,"\\[]{}\n', max_size=4),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(0, 9), max_size=2),
)
EVENT = st.builds(
    made,
    number=st.integers(1, 9),
    at_ns=st.integers(0, 2**63),
    data=st.dictionaries(st.sampled_from(["loss", "lr", "a,b"]), VALUES, max_size=2),
)
CHANGES: dict[str, Any] = {"id": "x-1", "time": "2026-11-23T12:00:00Z", "step": -1, "number": 0, "attempt": 3}


@given(
    events=st.lists(EVENT, min_size=1, max_size=5),
    change=st.sampled_from([{}, *({k: v} for k, v in CHANGES.items())]),
    gone=st.sampled_from(["", "step", "data", "time"]),
)
def test_what_goes_into_a_batch_comes_out_of_it(events: list[JsonMap], change: JsonMap, gone: str) -> None:
    events[0] = {name: value for name, value in {**events[0], **change}.items() if name != gone}
    assert list(events_of(wire.decode(wire.encode(batch_of(events))))) == events
    alike: list[JsonMap] = [{name: value for name, value in event.items() if name != gone} for event in events]
    assert list(events_of(wire.decode(wire.encode(batch_of(alike), encoding=wire.Encoding.JSON)))) == alike


@pytest.mark.parametrize(
    ("numbers", "said"), [((5, 6, 7), 5), ((5, 7, 8), [5, 7, 8]), ((7, 6, 5), [7, 6, 5]), ((5, 5, 7), [5, 5, 7])]
)
def test_numbers_without_gaps_are_said_by_the_first(numbers: tuple[int, ...], said: object) -> None:
    batch = batch_of([made(number, NOON_NS, {"loss": 0.5}) for number in numbers])
    assert (batch["v"], batch["number"]) == (2, said)


@pytest.mark.parametrize("change", CHANGES.items())
def test_events_that_differ_in_what_has_no_column_go_map_by_map(change: tuple[str, Any]) -> None:
    name, value = change
    batch = batch_of([made(1, NOON_NS, {}), {**made(2, NOON_NS, {}), name: value}])
    assert batch["v"] == 1


def test_long_names_that_would_be_written_too_often_go_map_by_map() -> None:
    events = [made(number, NOON_NS, {"x" * 5000: 1}) for number in range(1, 1000)]
    assert (batch_of(events)["v"], batch_of(events[:500])["v"]) == (1, 2)


def test_the_example_that_imports_nothing_of_railbus_takes_batches_apart_as_we_do() -> None:
    taken_apart = runpy.run_path(str(EXAMPLE))["events_in"]
    like: list[JsonMap] = [made(n, NOON_NS - 5 + n * n, {"loss": n / 4, "a,b": [n]}) for n in (3, 4, 1, 2)]
    stepless: list[JsonMap] = [{k: v for k, v in event.items() if k != "step"} | {"data": {}} for event in like[:2]]
    for events in (like, stepless, [{**like[0], "attempt": 3}, like[1]], like[:1]):
        message = batch_of(events) if len(events) > 1 else events[0]
        for encoding in wire.Encoding:
            assert taken_apart(wire.encode(message, encoding=encoding)) == events
    short = {**COLUMNS, "time": {"first": "2026-11-23T12:00:00+00:00"}, "step": [1], "data": {"loss": [0.5]}}
    assert taken_apart(wire.encode(short)) == list(columns_of(short).events())


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b"\xff", b"\x80\x80", b"5", b'{"common": 1}', b'{"common": {}, "events": 5}', b'{"common": {}, "v": 2}',
     b'{"v": 2, "common": {}, "time": {"first": "x", "gaps_ns": [0]}, "number": 1}'],
)  # fmt: skip
def test_no_message_stops_the_example(data: bytes) -> None:
    assert runpy.run_path(str(EXAMPLE))["lines_of"](7, "railbus.evt.app.a.b", data) == []


COLUMNS: dict[str, object] = {
    "v": 2,
    "common": {"producer": "p", "type": "train.metrics"},
    "time": {"first": "2026-11-23T12:00:00.5Z", "gaps_ns": [5, -3]},
    "number": 7,
    "step": [1, 2, 3],
    "data": {"loss": [0.5, None, "x"]},
}
FAULTS = st.one_of(
    VALUES,
    st.sampled_from(
        [[1, 2, 3], [0, 1, 2], [1, 2], [1, 2, True], [1, 2, 2**64 - 1], 2**64 - 3, 2**64 - 2, {}, {"a": 1}]
    ),
    st.sampled_from([{"loss": []}, {"loss": [1, 2, 3], "lr": [1, 2]}, {"producer": 1}, {"producer": "../x"}, [], ()]),
    st.builds(
        lambda first, gaps: {"first": first, "gaps_ns": gaps},
        st.sampled_from(["1970-01-01T00:00:00Z", "2262-04-11T23:47:16.854775806Z", "1969-12-31T23:59:59Z", "x", 5]),
        st.sampled_from([[0, 1], [0, 2], [-1, 5], [], [1], [2**62, 2**62], [0, "1"], [0, False], 7]),
    ),
    st.sampled_from([{"first": "2026-11-23T12:00:00Z"}, {"gaps_ns": [1, 2]}]),
)


@given(
    changes=st.dictionaries(st.sampled_from([*COLUMNS, "other"]), FAULTS, max_size=2),
    gone=st.sampled_from(["", *COLUMNS]),
)
@example(changes={"number": 2**64 - 3}, gone="")
@example(changes={"number": 2**64 - 2}, gone="")
@example(changes={"data": {"x" * 400_000: [1, 2, 3]}}, gone="")
@example(changes={"data": {"x" * 1_500_000: [1, 2, 3]}}, gone="")
@example(changes={"time": {"first": "2026-11-23T12:00:00Z", "gaps_ns": [0] * 4096}, "data": {}}, gone="step")
def test_exactly_the_columns_that_the_contract_accepts_are_taken(changes: dict[str, object], gone: str) -> None:
    message = {name: value for name, value in {**COLUMNS, **changes}.items() if name != gone}
    try:
        parsed = EventColumns.parse(message)
    except WireError as exc:
        with pytest.raises(type(exc)):
            columns_of(message)
        return
    events = list(columns_of(message).events())
    assert len(events) == len(parsed.time.gaps_ns) + 1
    assert all(set(cast("JsonMap", event["data"])) == set(parsed.data) for event in events)


@pytest.mark.parametrize("common", [{"source": "x" * 10_000}, {}])
def test_what_is_written_for_each_event_is_bounded_names_of_columns_too(common: JsonMap) -> None:
    """Or half a megabyte would become gigabytes of lines."""
    name = "loss" if common else "x" * 10_000
    batch: dict[str, object] = {"v": 2, "common": {"producer": "p", **common}, "number": 1, "data": {name: [0] * 300}}
    batch["time"] = {"first": clock.rfc3339(NOON_NS), "gaps_ns": [0] * 299}
    assert len(list(events_of(batch))) == 300
    batch |= {"data": {name: [0] * 500}, "time": {"first": clock.rfc3339(NOON_NS), "gaps_ns": [0] * 499}}
    with pytest.raises(WireError, match="would be written 500 times"):
        columns_of(batch)
