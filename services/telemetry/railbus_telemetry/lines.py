"""From messages of the bus to lines of the log: every event one line, every refusal one line, nothing dropped.

A line is the event's map with `seq` (the message's sequence in the stream) and `incarnation` (of the store) added, and
`person` where one told it; its key is (person, producer, number). No model is built per event: quick checks accept what
is plainly in order, and the contract itself judges the rest, so both always agree. What is refused becomes a line of
type `bus.rejected` whose key is made of the incarnation and the sequence, so that a message that comes twice is refused
once. The events of a batch are judged one by one: a bad one does not take the good ones with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, cast

import orjson

from railbus_shared import clock, wire
from railbus_shared.batches import Columns, columns_of, is_columns
from railbus_shared.contracts.events import MAX_REPEATED_BYTES, Event, EventBatch, repeated_bytes
from railbus_shared.errors import BadMessage, InvalidField, WireError
from railbus_shared.names import ID_PATTERN, this_host
from railbus_shared.subjects import told_by
from railbus_telemetry.rendering import rendered
from railbus_telemetry.runs import Run, runs_of

DAY_NS: Final = 86_400 * clock.NS_PER_S
_SHOWN_BYTES: Final = 200
_MAX_COUNT: Final = 2**63 - 1
_MAX_NUMBER: Final = 2**64 - 1

_ID: Final = re.compile(ID_PATTERN)
_TYPE: Final = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+")
_TIME: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|\+00:00)"
)


Column = tuple[object, ...]
"""One field of many events."""


class Transcoded(NamedTuple):
    """What became of one message."""

    runs: list[Run]
    refusal: dict[str, object] | None
    """Why the message, or the first bad event of its batch, was refused; said, not the error itself.

    An error that is kept refers to the frames that it passed, and they to it and to the payload: a flood of bad
    messages would stay in memory until the collector of garbage comes.
    """


def portions(
    messages: Iterable[tuple[int, str, bytes]],
    *,
    incarnation: str,
    telemetry: str,
    limit_bytes: int,
    now_ns: int | None = None,
) -> Iterator[list[Run]]:
    """The lines of some messages in their order, `limit_bytes` at once and what the last message has beyond that."""
    runs: list[Run] = []
    size = 0
    for message in messages:
        found = batch([message], incarnation=incarnation, telemetry=telemetry, now_ns=now_ns)
        runs += found
        size += sum([len(run.data) for run in found])
        if size >= limit_bytes:
            yield runs
            runs, size = [], 0
    if runs:
        yield runs


def batch(
    messages: Iterable[tuple[int, str, bytes]], *, incarnation: str, telemetry: str, now_ns: int | None = None
) -> list[Run]:
    """The lines of some messages in their order; any bytes give at least one line.

    Args:
        messages: sequence in the stream, subject and payload of each.
        incarnation: of the store.
        telemetry: the telemetry process that writes; stands in the lines that tell of refusals.
        now_ns: their time; the present if it is not given.
    """
    runs: list[Run] = []
    for sequence, subject, payload in messages:
        person = told_by(subject)
        try:
            message = wire.decode(payload)
            _check_area(message, subject)
            found, refusal = transcode(message, sequence=sequence, incarnation=incarnation, person=person)
        except WireError as exc:
            found, refusal = [], exc.to_wire()
        runs += [run.of_person(person) for run in found] if person else found
        if refusal is not None:
            about = {"subject": subject, "error": refusal, "recorded_by": telemetry} | _shown(payload)
            time_ns = clock.now_ns() if now_ns is None else now_ns
            line = _rejected(sequence, about, incarnation=incarnation, time_ns=time_ns)
            runs.append(line._replace(code=str(refusal["code"])))
    return runs


def transcode(message: Mapping[str, object], *, sequence: int, incarnation: str, person: str = "") -> Transcoded:
    """The lines of one decoded message, an event or a batch; raises WireError where no part of it can be used."""
    tail: dict[str, object] = {"seq": sequence, "incarnation": incarnation}
    if person:
        tail["person"] = person
    if is_columns(message):
        return _columns(columns_of(message), tail=tail)
    if "events" not in message:
        return Transcoded([_line(dict(message), is_sound=_is_sound(message), tail=tail)], None)
    common, events = _parts(message)
    splice = _Splice.of(common, tail=tail)
    together = splice and splice.runs(events)
    if together:
        return Transcoded(together, None)

    def line(event: dict[str, object]) -> Run:
        return (splice and splice.line(event)) or _line(common | event, is_sound=False, tail=tail)

    return _judged(events, line)


def _judged(events: Iterable[dict[str, object]], line: Callable[[dict[str, object]], Run]) -> Transcoded:
    """The events of a batch one by one: a bad one does not take the good ones with it."""
    runs: list[Run] = []
    refusal: dict[str, object] | None = None
    for event in events:
        try:
            runs.append(line(event))
        except WireError as exc:
            refusal = refusal or exc.to_wire()
    return Transcoded(runs, refusal)


def _columns(columns: Columns, *, tail: dict[str, object]) -> Transcoded:
    """All events at once, or each by itself where only the contract can tell whether they are in order."""
    common = columns.common
    if not (common.keys() >= _COMMON_NEEDED and _OWN.isdisjoint(common) and _is_sound(common)):
        return _judged(columns.events(), lambda event: _line(event, is_sound=False, tail=tail))
    data = rendered(columns, ending=b"," + orjson.dumps(tail)[1:] + b"\n")
    producer, numbers, times = cast("str", common["producer"]), columns.numbers, columns.times
    day_ns = times.earliest_ns - times.earliest_ns % DAY_NS
    if isinstance(numbers, range) and times.latest_ns < day_ns + DAY_NS:
        return Transcoded([Run(day_ns, producer, numbers[0], data, "", len(numbers), times.first_ns)], None)
    times_ns = times.since(0)
    days = [at_ns - at_ns % DAY_NS for at_ns in times_ns]
    producers = [producer] * len(days)
    return Transcoded(
        runs_of(data, days_ns=days, producers=producers, numbers=numbers, at_ns=times_ns.__getitem__), None
    )


def _check_area(message: Mapping[str, object], subject: str) -> None:
    """Raises InvalidField for an event of another area than its subject: permissions are on subjects."""
    _, is_event, rest = subject.partition(".evt.")
    area = rest.partition(".")[0]
    events = message.get("events")
    holders = [message, message.get("common"), *(events if isinstance(events, list) else ())]
    for kind in [holder["type"] for holder in holders if type(holder) is dict and "type" in holder] if is_event else ():
        if isinstance(kind, str) and kind.partition(".")[0] != area:
            raise InvalidField(
                field="type", value=kind, problem=f"the subject {subject!r} is for events of area {area!r}"
            )


class _Splice(NamedTuple):
    """The quick way for a batch: what its events share is checked and encoded once."""

    common: dict[str, object]
    head: bytes
    tail: bytes
    missing: frozenset[str]
    """Required fields that each event must bring."""

    @classmethod
    def of(cls, common: dict[str, object], *, tail: dict[str, object]) -> _Splice | None:
        """None if only the contract can tell whether these fields are in order."""
        if not common or not _is_sound(common):
            return None
        ending = b"," + orjson.dumps(tail)[1:] + b"\n"
        return cls(common, orjson.dumps(common)[:-1] + b",", ending, _REQUIRED - common.keys())

    def runs(self, events: list[dict[str, object]]) -> list[Run] | None:
        """All at once, column by column, as one producer makes them; None if each has to be looked at."""
        names, count = tuple(events[0]), len(events)
        if not (self.missing.issubset(names) and self.common.keys().isdisjoint(names)):
            return None
        if not names or any(tuple(event) != names for event in events):
            return None
        columns = dict(zip(names, zip(*map(dict.values, events), strict=True), strict=True))
        if not all(_are_sound(name, column) for name, column in columns.items()):
            return None
        data = self._encoded(events, first=names[0])
        if data.count(b"\n") != count:
            return None
        times, producers, numbers = (
            columns.get(name) or (self.common[name],) * count for name in ("time", "producer", "number")
        )
        return runs_of(
            data,
            days_ns=[_midnight_ns(time[:10]) for time in cast("Sequence[str]", times)],
            producers=cast("Sequence[str]", producers),
            numbers=cast("Sequence[int]", numbers),
            at_ns=lambda place: clock.parse_rfc3339(cast("str", times[place])),
        )

    def _encoded(self, events: list[dict[str, object]], *, first: str) -> bytes:
        """The lines of events whose first field is `first`; more lines than events if a list in their data looks so.

        Written at once and cut where an event ends and the next one begins: in a text each quote would be escaped.
        """
        start = b"{" + orjson.dumps(first) + b":"
        body = orjson.dumps(events)[1 + len(start) : -2]
        head = self.head + start[1:]
        return head + body.replace(b"}," + start, self.tail + head) + self.tail

    def line(self, event: dict[str, object]) -> Run | None:
        """None if only the contract can tell whether the event is in order."""
        if not (event and event.keys() >= self.missing and self.common.keys().isdisjoint(event) and _is_sound(event)):
            return None
        time = event.get("time") or self.common["time"]
        producer = event.get("producer") or self.common["producer"]
        number = event.get("number") or self.common["number"]
        data = self.head + orjson.dumps(event)[1:-1] + self.tail
        at_ns = clock.parse_rfc3339(cast("str", time))
        return Run(at_ns - at_ns % DAY_NS, cast("str", producer), cast("int", number), data, at_ns=at_ns)


def _parts(message: Mapping[str, object]) -> tuple[dict[str, object], list[dict[str, object]]]:
    common, events = message.get("common"), message["events"]
    if not (
        message.keys() == {"v", "common", "events"}
        and _is_one(message["v"])
        and type(common) is dict
        and type(events) is list
        and 1 <= len(events) <= 4096
        and all(type(event) is dict for event in events)
        and repeated_bytes(common, events) <= MAX_REPEATED_BYTES
    ):
        parsed = EventBatch.parse(message)
        common, events = parsed.common, list(parsed.events)
    return cast("dict[str, object]", common), cast("list[dict[str, object]]", events)


def _line(event: dict[str, object], *, is_sound: bool, tail: dict[str, object]) -> Run:
    """`event` is the caller's to give away. Raises WireError if the contract refuses it."""
    if not (is_sound and event.keys() >= _REQUIRED):
        Event.parse(event)
    producer, number = cast("str", event["producer"]), cast("int", event["number"])
    if number > _MAX_NUMBER:
        raise BadMessage(f"field 'number' has value {number}: more than 64 bits", hint="count from 1")
    at_ns = clock.parse_rfc3339(cast("str", event["time"]))
    event.update(tail)
    try:
        data = orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
        return Run(at_ns - at_ns % DAY_NS, producer, number, data, at_ns=at_ns)
    except orjson.JSONEncodeError as exc:
        raise BadMessage(f"the event cannot be written as JSON: {exc}", hint="use numbers of 64 bits") from exc


def _rejected(sequence: int, about: dict[str, object], *, incarnation: str, time_ns: int) -> Run:
    producer = f"telemetry-rejected-{incarnation}"[:64]
    event: dict[str, object] = {
        "v": 1,
        "id": f"{producer}-{sequence}",
        "type": "bus.rejected",
        "time": clock.rfc3339(time_ns),
        "producer": producer,
        "number": sequence,
        "severity": "warning",
        "source": "telemetry",
        "host": this_host(),
        "data": about,
    }
    return _line(event, is_sound=True, tail={"seq": sequence, "incarnation": incarnation})


def _shown(payload: bytes) -> dict[str, object]:
    """The beginning of a payload as text, where it is text, else as hex."""
    start = payload[:_SHOWN_BYTES]
    text = start.decode("utf-8", errors="ignore")
    is_text = text.isprintable() and len(start) - len(text.encode()) < 4 and start.startswith(text.encode())
    shown, encoding = (text, "utf8") if is_text else (start.hex(), "hex")
    return {"bytes": len(payload), "payload": shown, "payload_encoding": encoding}


# --- quick checks: each accepts nothing that the contract refuses ----------------------------------------------------


def _is_one(value: object) -> bool:
    return type(value) is int and value == 1


@lru_cache(maxsize=4096)
def _is_id(value: str) -> bool:
    return _ID.fullmatch(value) is not None


@lru_cache(maxsize=1024)
def _is_type(value: str) -> bool:
    return len(value) <= 64 and _TYPE.fullmatch(value) is not None


@lru_cache(maxsize=64)
def _midnight_ns(day: str) -> int:
    """Raises ValueError if there is no such day."""
    return clock.parse_rfc3339(f"{day}T00:00:00Z")


def _is_time(value: object) -> bool:
    if type(value) is not str:
        return False
    match = _TIME.fullmatch(value)
    try:
        return match is not None and _midnight_ns(match[1]) is not None
    except ValueError:
        return False


def _text(limit: int) -> Callable[[object], bool]:
    return lambda value: type(value) is str and len(value) <= limit


def _whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


_CHECKS: Final[dict[str, Callable[[object], bool]]] = {
    "v": _is_one,
    "id": _text(128),
    "type": lambda value: type(value) is str and _is_type(value),
    "time": _is_time,
    "producer": lambda value: type(value) is str and _is_id(value),
    "number": _whole(1, _MAX_NUMBER),
    "severity": lambda value: type(value) is str and value in ("debug", "info", "warning", "error"),
    "source": _text(64),
    "host": lambda value: type(value) is str and _is_id(value),
    "job": lambda value: value is None or (type(value) is str and _is_id(value)),
    "attempt": _whole(-_MAX_COUNT, _MAX_COUNT),
    "lease_epoch": _whole(-_MAX_COUNT, _MAX_COUNT),
    "step": _whole(0, _MAX_COUNT),
    "trace": _text(128),
    "data": lambda value: type(value) is dict,
}


def _texts(limit: int) -> Callable[[Column], bool]:
    return lambda values: set(map(type, values)) == {str} and max(map(len, cast("Iterable[str]", values))) <= limit


def _wholes(low: int, high: int) -> Callable[[Column], bool]:
    def are_within(values: Column) -> bool:
        numbers = cast("tuple[int, ...]", values)
        return set(map(type, values)) == {int} and low <= min(numbers) and max(numbers) <= high

    return are_within


def _are_times(values: Column) -> bool:
    if set(map(type, values)) != {str} or not all(map(_TIME.fullmatch, cast("Iterable[str]", values))):
        return False
    return all(map(_is_time, {time[:10]: time for time in cast("Iterable[str]", values)}.values()))


_COLUMN_CHECKS: Final[dict[str, Callable[[Column], bool]]] = {
    "id": _texts(128),
    "time": _are_times,
    "number": _wholes(1, _MAX_NUMBER),
    "step": _wholes(0, _MAX_COUNT),
    "data": lambda values: set(map(type, values)) == {dict},
}
"""As `_CHECKS`, for what differs from event to event."""
_REQUIRED: Final = frozenset({"id", "type", "time", "producer", "number", "source", "host"})
_OWN: Final = frozenset({"id", "time", "number", "step", "data"})
"""Fields that have a column."""
_COMMON_NEEDED: Final = _REQUIRED - _OWN


def _is_sound(fields: Mapping[str, object]) -> bool:
    """Whether all fields are known and plainly in order; False says only that the contract has to look."""
    for name, value in fields.items():
        check = _CHECKS.get(name)
        if check is None or not check(value):
            return False
    return True


def _are_sound(name: str, column: Column) -> bool:
    """As `_is_sound`, for one field of many events."""
    together, check = _COLUMN_CHECKS.get(name), _CHECKS.get(name)
    return together(column) if together else check is not None and all(map(check, column))
