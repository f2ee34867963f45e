"""Messages become lines: nothing is lost, nothing raises, and quick checks agree with the contract."""

from __future__ import annotations

import gc
import tracemalloc
from typing import cast

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from railbus_shared import clock, wire
from railbus_shared.batches import batch_of
from railbus_shared.contracts.events import Event
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import WireError
from railbus_telemetry.lines import DAY_NS, batch, portions, transcode
from railbus_telemetry.mending import key_of
from railbus_telemetry.runs import Run

NOW_NS = 1_795_471_535 * clock.NS_PER_S
EVENT: dict[str, object] = {
    "v": 1,
    "id": "runner-h-1-7",
    "type": "train.metrics",
    "time": "2026-11-23T21:45:35.000000001Z",
    "producer": "runner-h-1",
    "number": 7,
    "severity": "info",
    "source": "runner",
    "host": "h",
    "job": "j-4f09ac-17",
    "step": 3,
    "data": {"loss": 0.5},
}


def lines_of(*payloads: bytes, first: int = 41) -> list[Run]:
    messages = [(first + at, "railbus.evt.train.j.metrics", payload) for at, payload in enumerate(payloads)]
    runs = batch(messages, incarnation="4f09ac", telemetry="telemetry-h-9", now_ns=NOW_NS)
    assert all(run.data.count(b"\n") == run.num_lines for run in runs)
    return [line for run in runs for line in run.singles()]


def parsed(line: Run) -> dict[str, object]:
    return cast("dict[str, object]", orjson.loads(line.data))


@pytest.mark.parametrize("encoding", list(wire.Encoding))
def test_an_event_becomes_one_line_with_its_place_in_the_stream(encoding: wire.Encoding) -> None:
    [line] = lines_of(wire.encode(EVENT, encoding=encoding))
    assert line[:3] == (1_795_392_000 * clock.NS_PER_S, "runner-h-1", 7)
    assert line.code == ""
    assert line.data.endswith(b"}\n")
    assert line.data.count(b"\n") == 1
    assert parsed(line) == {**EVENT, "seq": 41, "incarnation": "4f09ac"}


def test_what_a_batch_says_once_stands_in_each_of_its_lines() -> None:
    single = {"id", "number", "step", "data"}
    common = {name: value for name, value in EVENT.items() if name not in single}
    events = [{"id": f"runner-h-1-{n}", "number": n, "step": n, "data": {"loss": n / 2}} for n in (1, 2, 3)]
    found = lines_of(wire.encode({"v": 1, "common": common, "events": events}))
    assert [line.number for line in found] == [1, 2, 3]
    assert [parsed(line) for line in found] == [
        {**common, **event, "seq": 41, "incarnation": "4f09ac"} for event in events
    ]


def test_a_bad_event_does_not_take_the_good_ones_of_its_batch_with_it() -> None:
    events = [{"number": 1}, {"number": 0}, {"number": "3"}, {"number": 4}]
    common = {name: value for name, value in EVENT.items() if name != "number"}
    *good, refused = lines_of(wire.encode({"v": 1, "common": common, "events": events}))
    assert [line.number for line in good] == [1, 4]
    assert refused.code == "INVALID_FIELD"
    assert "number" in str(parsed(refused)["data"])


def split(event: dict[str, object], shared: set[str]) -> dict[str, object]:
    """A batch of one event that says some of the fields in common."""
    common = {name: value for name, value in event.items() if name in shared}
    return {"v": 1, "common": common, "events": [{k: v for k, v in event.items() if k not in shared}]}


@given(shared=st.sets(st.sampled_from(list(EVENT))))
def test_a_batch_of_one_says_the_same_as_the_event_alone(shared: set[str]) -> None:
    [line] = lines_of(wire.encode(split(EVENT, shared)))
    assert parsed(line) == {**EVENT, "seq": 41, "incarnation": "4f09ac"}
    assert line[:3] == lines_of(wire.encode(EVENT))[0][:3]


def test_large_values_at_both_ends_of_a_column_do_not_fill_the_memory() -> None:
    """Only a column that is all alike may be compared with its first value as often as there are events."""
    values = ["y" * 200_000, *range(998), "y" * 200_000]
    common = {name: value for name, value in EVENT.items() if name not in ("id", "time", "number", "data")}
    time = {"first": EVENT["time"], "gaps_ns": [1] * 999}
    payload = wire.encode({"v": 2, "common": common, "time": time, "number": 1, "data": {"text": values}})
    tracemalloc.start()
    try:
        found = lines_of(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 1000
    assert peak < 32 << 20


@pytest.mark.parametrize("fault", [{"type": "Bad"}, {"host": "../x"}, {"colour": 1}, {"time": "now"}, {"producer": 5}])
@pytest.mark.parametrize("shared", [set(EVENT) - {"number"}, {"v"}, {"type", "host", "colour", "time", "producer"}])
def test_a_fault_is_found_in_what_a_batch_shares_and_in_its_events(fault: dict[str, object], shared: set[str]) -> None:
    [line] = lines_of(wire.encode(split({**EVENT, **fault}, shared | set(fault))))
    assert line.code.startswith("INVALID_")
    [line] = lines_of(wire.encode(split({**EVENT, **fault}, shared - set(fault))))
    assert line.code.startswith("INVALID_")


@pytest.mark.parametrize(
    "data",
    [
        {"text": '},{"id":"x"}\n'},
        {"maps": [{"id": 1}, {"id": 2}]},
        {"deep": {"maps": [{}, {"id": "a"}]}},
        {"id": "},{"},
        {},
    ],
)
@pytest.mark.parametrize("own", [("id", "number", "data"), ("number", "data"), ("data", "number"), ("id", "number")])
def test_events_that_look_like_the_seam_between_two_are_written_as_they_are(
    data: dict[str, object], own: tuple[str, ...]
) -> None:
    made = [{**EVENT, "id": f"runner-h-1-{number}", "number": number, "data": data} for number in (1, 2, 3)]
    common = {name: value for name, value in made[0].items() if name not in own}
    batched = {"v": 1, "common": common, "events": [{name: event[name] for name in own} for event in made]}
    expected = [{**common, **{name: event[name] for name in own}} for event in made]
    assert [parsed(line) for line in lines_of(wire.encode(batched))] == [
        {**event, "seq": 41, "incarnation": "4f09ac"} for event in expected
    ]


ODD = ["a", 'b,"c', "\\", '},{"', "\n", "\u2028"]


@pytest.mark.parametrize("gap_ns", [7, 400_000_000, DAY_NS // 3, -400_000_000, -DAY_NS // 3])
@pytest.mark.parametrize("numbers", [(1, 2, 3, 4, 5, 6), (1, 3, 4, 2, 9, 9)])
@pytest.mark.parametrize(
    "data",
    [
        [{"loss": n / 3, "lr": n, "ok": n > 2, "none": None} for n in range(6)],
        [{"a,b": text, "list": [text, {"x": 1}]} for text in ODD],
        [{"mixed": value} for value in (1, 2.5, "x", None, [1, 2], -0.0)],
        [{"lr": 0.001, "text": "a,b", "list": [1, 1], "one": value} for value in (1, 1.0, True, 1, 1.0, 1)],
        [{"lr": -0.0, "none": None, "text": "\u2028ä"}] * 6,
        [{}] * 6,
    ],
)
def test_a_batch_of_columns_gives_the_lines_of_its_events(
    data: list[dict[str, object]], numbers: tuple[int, ...], gap_ns: int
) -> None:
    start_ns = clock.parse_rfc3339(cast("str", EVENT["time"]))
    events = [
        {**EVENT, "id": f"runner-h-1-{n}", "number": n, "time": clock.rfc3339(start_ns + at * gap_ns), "data": data[at]}
        for at, n in enumerate(numbers)
    ]
    message = batch_of(cast("list[JsonMap]", events))
    assert message["v"] == 2
    found = lines_of(wire.encode(message))
    assert [parsed(line) for line in found] == [{**event, "seq": 41, "incarnation": "4f09ac"} for event in events]
    assert [orjson.dumps(parsed(line)["data"]) for line in found] == list(map(orjson.dumps, data))
    alone = [lines_of(wire.encode(event))[0] for event in events]
    assert [line[:3] for line in found] == [line[:3] for line in alone]


@pytest.mark.parametrize("fault", [{"type": "Bad"}, {"host": "../x"}, {"colour": 1}, {"producer": "A b"}, {"v": 2}])
def test_a_fault_in_what_columns_share_is_found(fault: dict[str, object]) -> None:
    message = batch_of(cast("list[JsonMap]", [{**EVENT, "id": f"runner-h-1-{n}", "number": n} for n in (1, 2)]))
    message["common"] = {**cast("JsonMap", message["common"]), **fault}
    [line] = lines_of(wire.encode(message))
    assert line.code.startswith("INVALID_")


def test_what_columns_share_beside_their_own_is_overridden() -> None:
    message = batch_of(cast("list[JsonMap]", [{**EVENT, "id": f"runner-h-1-{n}", "number": n} for n in (1, 2)]))
    message["common"] = {**cast("JsonMap", message["common"]), "number": 9, "id": "x", "trace": "t"}
    found = lines_of(wire.encode(message))
    assert [parsed(line)["id"] for line in found] == ["runner-h-1-1", "runner-h-1-2"]
    assert [line.data.count(b'"number"') for line in found] == [1, 1]


def test_an_event_overrides_what_its_batch_shares() -> None:
    batched = {"v": 1, "common": EVENT, "events": [{"number": 8, "step": 4}, {}]}
    found = lines_of(wire.encode(batched))
    assert [parsed(line)["number"] for line in found] == [8, 7]
    assert [line.data.count(b'"number"') for line in found] == [1, 1]


def repeating(num_bytes: int, times: int, *, first: int = 1) -> bytes:
    """A batch whose common part takes so many bytes and some more, so many times."""
    common = {name: value for name, value in EVENT.items() if name not in ("id", "number", "data")}
    events = [{"id": f"runner-h-1-{n}", "number": n} for n in range(first, first + times)]
    return wire.encode({"v": 1, "common": common | {"data": {"text": "x" * num_bytes}}, "events": events})


def test_a_batch_that_would_fill_the_disk_with_what_it_says_once_is_refused() -> None:
    assert len(lines_of(repeating(8000, 400))) == 400
    [line] = lines_of(repeating(400_000, 4096))
    assert line.code == "INVALID_FIELD"
    assert "would be written 4096 times" in str(parsed(line)["data"])


def test_columns_whose_names_would_fill_the_disk_are_refused() -> None:
    common = {name: value for name, value in EVENT.items() if name not in ("id", "time", "number", "step", "data")}
    times = {"first": EVENT["time"], "gaps_ns": [0] * 4095}
    message = {"v": 2, "common": common, "time": times, "number": 1, "data": {"x" * 300_000: [1] * 4096}}
    [line] = lines_of(wire.encode(message))
    assert line.code == "INVALID_FIELD"
    assert "would be written 4096 times" in str(parsed(line)["data"])


def test_many_lines_are_made_a_portion_at_a_time() -> None:
    messages = ((41 + at, "railbus.evt.train.j.metrics", repeating(8000, 10, first=1 + 10 * at)) for at in range(20))
    found = list(portions(messages, incarnation="4f09ac", telemetry="t", limit_bytes=200_000))
    assert [line.number for some in found for run in some for line in run.singles()] == list(range(1, 201))
    assert [sum(run.num_lines for run in some) for some in found] == [30, 30, 30, 30, 30, 30, 20]


BAD_MESSAGES = {
    "no bytes": (b"", "BAD_MESSAGE"),
    "no map": (b"\x93\x01\x02\x03", "BAD_MESSAGE"),
    "torn JSON": (b'{"v": 1, "id": ', "BAD_MESSAGE"),
    "torn msgpack": (wire.encode(EVENT)[:-3], "BAD_MESSAGE"),
    "too large": (b"{" + b" " * wire.MAX_BYTES + b"}", "MESSAGE_TOO_LARGE"),
    "an empty map": (b"{}", "INVALID_FIELD"),
    "an unknown field": (wire.encode({**EVENT, "colour": "red"}), "INVALID_FIELD"),
    "no producer": (wire.encode({k: v for k, v in EVENT.items() if k != "producer"}), "INVALID_FIELD"),
    "a bad producer": (wire.encode({**EVENT, "producer": "../x"}), "INVALID_NAME"),
    "a producer with a newline": (wire.encode({**EVENT, "producer": "runner\n"}), "INVALID_NAME"),
    "a number that is true": (wire.encode({**EVENT, "number": True}), "INVALID_FIELD"),
    "a day that is none": (wire.encode({**EVENT, "time": "2026-02-30T00:00:00Z"}), "INVALID_FIELD"),
    "a local time": (wire.encode({**EVENT, "time": "2026-02-03T00:00:00+01:00"}), "INVALID_FIELD"),
    "data that is a list": (wire.encode({**EVENT, "data": [1]}), "INVALID_FIELD"),
    "a batch without events": (wire.encode({"v": 1, "common": {}, "events": []}), "INVALID_FIELD"),
    "a batch of numbers": (wire.encode({"v": 1, "common": {}, "events": [1]}), "INVALID_FIELD"),
    "a batch of another version": (wire.encode({"v": 2, "common": {}, "events": [EVENT]}), "INVALID_FIELD"),
    "a batch that fills the memory": (
        wire.encode({"v": 1, "common": {**EVENT, "data": {"x": "y" * 50_000}}, "events": [{"number": 1}] * 200}),
        "INVALID_FIELD",
    ),
    "columns that fill the memory": (
        wire.encode(
            {
                "v": 2,
                "common": {"producer": "p", "trace": "y" * 50_000},
                "time": {"first": EVENT["time"], "gaps_ns": [1] * 99},
                "number": 1,
                "data": {},
            }
        ),
        "INVALID_FIELD",
    ),
    "columns without common": (wire.encode({"v": 2, "time": {"first": "2026-11-23T21:45:35Z"}}), "INVALID_FIELD"),
    "columns without a producer": (
        wire.encode({"v": 2, "common": {}, "time": {"first": "2026-11-23T21:45:35Z"}, "number": 1}),
        "INVALID_FIELD",
    ),
    "a batch without common": (wire.encode({"v": 1, "events": [EVENT]}), "INVALID_FIELD"),
}


@pytest.mark.parametrize(("payload", "code"), BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_a_bad_message_becomes_a_line_that_says_why(payload: bytes, code: str) -> None:
    [line] = lines_of(payload)
    event = parsed(line)
    assert (line.code, line.number, line.day_ns) == (code, 41, NOW_NS - NOW_NS % DAY_NS)
    assert event.pop("seq") == 41
    assert event.pop("incarnation") == "4f09ac"
    data = Event.parse(event).data
    assert event["type"] == "bus.rejected"
    assert cast("dict[str, object]", data["error"])["code"] == code
    assert data["bytes"] == len(payload)
    assert data["recorded_by"] == "telemetry-h-9"


@pytest.mark.parametrize(
    ("payload", "shown", "encoding"),
    [
        (b"", "", "utf8"),
        (b'{"torn', '{"torn', "utf8"),
        (b"\x81\xff\x00", "81ff00", "hex"),
        (b"x" * 199 + "é".encode(), "x" * 199, "utf8"),
        (b"y" * 300, "y" * 200, "utf8"),
        (b"\xff" * 300, "ff" * 200, "hex"),
    ],
)
def test_a_refusal_shows_how_the_payload_begins(payload: bytes, shown: str, encoding: str) -> None:
    data = cast("dict[str, object]", parsed(lines_of(payload)[0])["data"])
    assert (data["payload"], data["payload_encoding"]) == (shown, encoding)


@pytest.mark.parametrize("payload", [payload for payload, _ in BAD_MESSAGES.values()], ids=BAD_MESSAGES.keys())
def test_a_refused_message_is_not_held_until_garbage_is_collected(payload: bytes) -> None:
    """Its size is not counted, only that it is an object: a flood of a thousand bad messages held a gigabyte."""
    common = {name: value for name, value in EVENT.items() if name != "number"}
    batched = wire.encode({"v": 1, "common": common, "events": [{"number": 1}, {"number": 0}]})
    lines_of(payload, batched)
    gc.collect()
    gc.disable()
    try:
        lines_of(payload, batched)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_refused_message_that_comes_again_has_the_same_key() -> None:
    (first, other), (again,) = lines_of(b"", b"["), lines_of(b"")
    assert (first.producer, first.number) == (again.producer, again.number)
    assert (first.producer, first.number) != (other.producer, other.number)


@pytest.mark.parametrize(
    ("time", "day"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T23:59:59.999999999Z", 0),
        ("1970-01-02T00:00:00+00:00", 1),
        ("2024-02-29T12:00:00.5Z", 19_782),
        ("1969-12-31T23:59:59Z", -1),
    ],
)
def test_the_day_of_a_line_is_that_of_its_event_in_utc(time: str, day: int) -> None:
    [line] = lines_of(wire.encode({**EVENT, "time": time}))
    assert line.day_ns == day * DAY_NS


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("aZ0._-é\n\U0001f600", max_size=80),
    st.sampled_from(["info", "a.b", "a.b.", "j-1", "J", "j\n", "x" * 64, "x" * 65, "2026-02-29T00:00:00Z"]),
    st.sampled_from(["2026-11-23T21:45:60Z", "٢026-11-23T21:45:00Z", "2026-11-23T24:00:00Z", "2026-11-23t00:00:00z"]),
    st.lists(st.integers(0, 9), max_size=2),
    st.dictionaries(st.text("ab", max_size=3), st.integers(0, 9), max_size=2),
)


@given(
    changes=st.dictionaries(st.sampled_from([*EVENT, "trace", "attempt", "lease_epoch", "other"]), VALUES, max_size=3),
    gone=st.sets(st.sampled_from(list(EVENT)), max_size=1),
)
@example(changes={"number": 2**64 - 1}, gone=set())
@example(changes={"attempt": -1}, gone={"data"})
def test_exactly_what_the_contract_accepts_becomes_a_line(changes: dict[str, object], gone: set[str]) -> None:
    event = {name: value for name, value in {**EVENT, **changes}.items() if name not in gone}
    try:
        Event.parse(event)
    except WireError as exc:
        with pytest.raises(type(exc)):
            transcode(event, sequence=1, incarnation="4f")
        return
    [line] = transcode(event, sequence=1, incarnation="4f").runs
    assert parsed(line) == {**event, "seq": 1, "incarnation": "4f"}


@given(payload=st.one_of(st.binary(max_size=300), st.binary(max_size=60).map(lambda tail: b"\x82" + tail)))
def test_any_bytes_give_lines_that_are_json_with_a_key(payload: bytes) -> None:
    found = lines_of(payload)
    assert found
    for line in found:
        event = parsed(line)
        assert (event["producer"], event["number"], event["seq"]) == (line.producer, line.number, 41)


@pytest.mark.parametrize(
    "message",
    [
        {**EVENT, "type": "job.succeeded"},
        {"v": 1, "common": {**EVENT, "type": "job.succeeded"}, "events": [{"number": 2}]},
        {"v": 1, "common": {}, "events": [{**EVENT, "type": "job.succeeded"}]},
    ],
)
def test_an_event_of_another_area_than_its_subject_is_refused(message: dict[str, object]) -> None:
    """Who may publish only under `evt.app.` must not be able to say that a job has succeeded."""
    (line,) = batch([(1, "railbus.evt.app.mine.made", wire.encode(message))], incarnation="i", telemetry="t")
    assert line.code == "INVALID_FIELD"


def forms() -> dict[str, dict[str, object]]:
    """Three events in each form of a message, but for the first, which is one."""
    events = [{**EVENT, "type": "app.made", "id": f"runner-h-1-{n}", "number": n} for n in (1, 2, 3)]
    own = {"id", "number"}
    common = {name: value for name, value in events[0].items() if name not in own}
    differing = [{name: event[name] for name in own} for event in events]
    return {
        "alone": events[0],
        "a batch": {"v": 1, "common": common, "events": differing},
        "a batch that is looked at one by one": {
            "v": 1,
            "common": {},
            "events": [*events[:2], {**events[2], "job": None}],
        },
        "columns": batch_of(cast("list[JsonMap]", events)),
    }


@pytest.mark.parametrize("form", forms())
def test_what_a_person_tells_counts_as_theirs_and_says_so(form: str) -> None:
    data, count = wire.encode(forms()[form]), 1 if form == "alone" else 3
    (own,) = batch([(1, "railbus.evt.app.j.made.ann", data)], incarnation="i", telemetry="t")[:1]
    told = batch([(n, f"railbus.evt.app.j.made{end}", data) for n, end in ((1, ".ann"), (2, ""))],
                 incarnation="i", telemetry="t")  # fmt: skip
    lines = [line for run in told for line in run.singles()]
    keys = [(line.producer, line.number) for line in lines]
    assert keys == [(name, n) for name in ("ann/runner-h-1", "runner-h-1") for n in range(1, count + 1)]
    assert [parsed(line).get("person") for line in lines] == ["ann"] * count + [None] * count
    assert {parsed(line)["producer"] for line in lines} == {"runner-h-1"}
    assert [key_of(line.data) for line in lines] == keys
    assert own.producer == "ann/runner-h-1"


@pytest.mark.parametrize("form", forms())
def test_nobody_says_themselves_who_they_are(form: str) -> None:
    message = forms()[form]
    holder = message.get("common") or message
    assert isinstance(holder, dict)
    holder["person"] = "ben"
    for subject in ("railbus.evt.app.j.made.ann", "railbus.evt.app.j.made"):
        found = batch([(1, subject, wire.encode(message))], incarnation="i", telemetry="t")
        assert [run.code for run in found] == ["INVALID_FIELD"]
        assert "person" not in parsed(found[0])
