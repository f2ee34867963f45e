"""Batches of events, put together and taken apart: the only place that knows how several events are one message.

Version 1 (`EventBatch`) says once what all its events share, and holds a map for each event. Version 2 (`EventColumns`)
holds a list for each field: a third of the bytes, and a tenth of the time for who reads it. Events that have the same
fields go as version 2, all others as version 1; both give back the same events, to the nanosecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, repeat
from operator import itemgetter, sub
from typing import Any, Final, Literal, NamedTuple, Self, cast

import orjson

from railbus_shared import clock
from railbus_shared.contracts.events import END_NS, MAX_REPEATED_BYTES, MAX_TOGETHER, EventColumns, repeated_bytes
from railbus_shared.contracts.model import JsonMap

_OWN: Final = frozenset({"id", "time", "number", "step", "data"})
"""Fields that are an event's own; what else is equal in all events of a batch is said once."""
_NEEDED: Final = frozenset({"id", "time", "number", "data", "producer"})
_FIELDS: Final = frozenset({"v", "common", "time", "number", "step", "data"})
_TIME_CHARS: Final = 30
_FRACTION: Final = slice(20, 29)
_SECOND: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.")
_DIGITS: Final = b"0123456789,"
_INT: Final = {int}
_STR: Final = {str}
_DICT: Final = {dict}
_LIST: Final = {list}


class Times(NamedTuple):
    """When events were, in nanoseconds since 1970."""

    first_ns: int
    gaps_ns: Sequence[int]
    """How long after the one before each of the others was."""
    earliest_ns: int
    latest_ns: int

    @classmethod
    def of(cls, first_ns: int, gaps_ns: Sequence[int]) -> Self:
        """Of events of which the first was then."""
        if _are_natural(gaps_ns):
            return cls(first_ns, gaps_ns, first_ns, first_ns + sum(gaps_ns))
        times_ns = list(accumulate(gaps_ns, initial=first_ns))
        return cls(first_ns, gaps_ns, min(times_ns), max(times_ns))

    def since(self, base_ns: int) -> list[int]:
        """Nanoseconds from a moment to each event."""
        return list(accumulate(self.gaps_ns, initial=self.first_ns - base_ns))


class Columns(NamedTuple):
    """Events of a batch of version 2, each field a sequence of the same length."""

    common: dict[str, object]
    times: Times
    numbers: Sequence[int]
    steps: Sequence[int] | None
    data: Mapping[str, Sequence[object]]

    def events(self) -> Iterator[dict[str, object]]:
        """Each event whole."""
        names, producer = tuple(self.data), self.common["producer"]
        rows = zip(*self.data.values(), strict=True) if names else repeat(())
        steps = ({"step": step} for step in self.steps) if self.steps is not None else repeat({})
        for at_ns, number, step, row in zip(self.times.since(0), self.numbers, steps, rows, strict=False):
            yield {
                **self.common,
                "id": f"{producer}-{number}",
                "time": clock.rfc3339(at_ns),
                "number": number,
                **step,
                "data": dict(zip(names, row, strict=True)),
            }


# --- taking apart ----------------------------------------------------------------------------------------------------


def events_of(message: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """The events of one decoded message, each whole; a message that is no batch is an event.

    What a batch of version 1 holds instead of an event stands as `event`. Raises WireError for a bad one of version 2.
    """
    common, events = message.get("common"), message.get("events")
    if is_columns(message):
        yield from columns_of(message).events()
    elif isinstance(common, dict) and isinstance(events, list):
        yield from ({**common, **(event if isinstance(event, dict) else {"event": event})} for event in events)
    else:
        yield dict(message)


def is_columns(message: Mapping[str, object]) -> bool:
    """Whether a decoded message means to be a batch of version 2."""
    return message.get("v") == 2 and "common" in message and "events" not in message


def columns_of(message: Mapping[str, object]) -> Columns:
    """The columns of a batch of version 2; raises WireError for one that the contract refuses."""
    times = _times_of(message.get("time"))
    if times is None or not _is_sound(message, len(times.gaps_ns) + 1):
        parsed = EventColumns.parse(message)
        message, times = dict(parsed), Times.of(clock.parse_rfc3339(parsed.time.first), parsed.time.gaps_ns)
    number = message["number"]
    return Columns(
        cast("dict[str, object]", message["common"]),
        times,
        range(number, number + len(times.gaps_ns) + 1) if isinstance(number, int) else cast("Sequence[int]", number),
        cast("Sequence[int] | None", message.get("step")),
        cast("Mapping[str, Sequence[object]]", message["data"]),
    )


def _times_of(time: object) -> Times | None:
    """Times that are plainly in order; None says only that the contract has to look."""
    if type(time) is not dict or time.keys() != {"first", "gaps_ns"}:
        return None
    first, gaps = time["first"], time["gaps_ns"]
    if not (type(first) is str and type(gaps) is list and (_are_natural(gaps) or set(map(type, gaps)) == _INT)):
        return None
    try:
        times = Times.of(clock.parse_rfc3339(first), gaps)
    except ValueError:
        return None
    return times if times.earliest_ns >= 0 and times.latest_ns < END_NS else None


def _is_sound(message: Mapping[str, object], count: int) -> bool:
    """Whether a batch of so many events is plainly in order, its times apart; False says what it does there."""
    common, data = message.get("common"), message.get("data")
    if not (message.keys() <= _FIELDS and type(message.get("v")) is int and message["v"] == 2):
        return False
    if not (type(common) is dict and type(common.get("producer")) is str and type(data) is dict):
        return False
    return (
        count <= MAX_TOGETHER
        and repeated_bytes(common, range(count), names=data) <= MAX_REPEATED_BYTES
        and _are_numbers(message.get("number"), count)
        and ("step" not in message or _are_whole(message["step"], 0, 2**63, count))
        and (not data or (set(map(type, data.values())) == _LIST and set(map(len, data.values())) == {count}))
    )


def _are_numbers(number: object, count: int) -> bool:
    if type(number) is int:
        return number >= 1 and number + count <= 2**64
    return _are_whole(number, 1, 2**64, count)


def _are_whole(values: object, low: Literal[0, 1], end: int, count: int) -> bool:
    """Whether this is a list of so many whole numbers from `low` on and below `end`."""
    if type(values) is not list or len(values) != count or not _are_natural(values):
        return False
    return (low == 0 or min(values) >= low) and (sum(values) < end or max(values) < end)


def _are_natural(values: Sequence[object]) -> bool:
    """Whether all are whole numbers from 0 on: their JSON has nothing but digits, and tells in a third of the time."""
    try:
        return orjson.dumps(values, option=orjson.OPT_PASSTHROUGH_SUBCLASS).translate(None, _DIGITS) == b"[]"
    except TypeError:
        return False


# --- putting together ------------------------------------------------------------------------------------------------


def batch_of(events: Sequence[JsonMap]) -> dict[str, object]:
    """The message that holds two or more events of one producer and kind."""
    return _columns(events) or _maps(events)


def _maps(events: Sequence[JsonMap]) -> dict[str, object]:
    first = events[0]
    common = {k: v for k, v in first.items() if k not in _OWN and all(e.get(k) == v for e in events)}
    return {"v": 1, "common": common, "events": [{k: v for k, v in e.items() if k not in common} for e in events]}


def _columns(events: Sequence[JsonMap]) -> dict[str, object] | None:
    """None where the events differ in more than what has a column, or would not come out as they are.

    So too where names alone would become more than a reader takes; as maps they are too large for one message.
    """
    names = tuple(events[0])
    if not (events[0].keys() >= _NEEDED and _have(events, names)):
        return None
    fields = _fields(events, names=names)
    if fields is None or any(fields[name].count(fields[name][0]) != len(events) for name in names if name not in _OWN):
        return None
    common = {name: fields[name][0] for name in names if name not in _OWN}
    numbers, times_ns, data = fields["number"], _times_ns(fields["time"]), _transposed(fields["data"])
    if data is None or times_ns is None or not _are_keyed(fields["id"], common["producer"], numbers):
        return None
    if "step" in fields and not _are_whole(fields["step"], 0, 2**63, len(events)):
        return None
    if repeated_bytes(common, events, names=data) > MAX_REPEATED_BYTES:
        return None
    follows = numbers[-1] - numbers[0] + 1 == len(events) and numbers == list(range(numbers[0], numbers[-1] + 1))
    return {
        "v": 2,
        "common": common,
        "time": {"first": fields["time"][0], "gaps_ns": list(map(sub, times_ns[1:], times_ns))},
        "number": numbers[0] if follows else numbers,
        **({"step": fields["step"]} if "step" in fields else {}),
        "data": data,
    }


def _have(maps: Sequence[JsonMap], names: tuple[str, ...]) -> bool:
    """Whether all have as many fields, so that those which have these have no others."""
    return set(map(len, maps)) == {len(names)}


def _fields(maps: Sequence[JsonMap], *, names: Sequence[str]) -> dict[str, list[Any]] | None:
    """What the maps hold under these names, name by name; None if one has not all of them."""
    try:
        return {name: list(map(itemgetter(name), maps)) for name in names}
    except KeyError:
        return None


def _transposed(maps: Sequence[object]) -> dict[str, list[object]] | None:
    """Name by name what maps with the same names hold; None for others. Of empty maps it is empty."""
    if set(map(type, maps)) != _DICT:
        return None
    found = cast("Sequence[JsonMap]", maps)
    names = tuple(found[0])
    return _fields(found, names=names) if _have(found, names) else None


def _are_keyed(ids: list[Any], producer: object, numbers: list[Any]) -> bool:
    """Whether each id is made of its producer and number."""
    if type(producer) is not str or set(map(type, ids)) != _STR or not _are_whole(numbers, 1, 2**64, len(ids)):
        return False
    return "\n".join(ids) == f"{producer}-" + f"\n{producer}-".join(map(str, numbers))


def _times_ns(times: list[Any]) -> list[int] | None:
    """Nanoseconds since 1970 of times as we spell them; None for any other spelling."""
    if set(map(type, times)) != _STR or set(map(len, times)) != {_TIME_CHARS}:
        return None
    digits = "".join(fractions := [time[_FRACTION] for time in times])
    if "".join(times)[_TIME_CHARS - 1 :: _TIME_CHARS] != "Z" * len(times) or not (
        digits.isascii() and digits.isdigit()
    ):
        return None
    try:
        if (second := min(times)[:20]) == max(times)[:20]:  # then all others begin so, too
            return list(map(_base_ns(second).__add__, map(int, fractions)))
        return [_base_ns(time[:20]) + int(fraction) for time, fraction in zip(times, fractions, strict=True)]
    except ValueError:
        return None


@lru_cache(maxsize=64)
def _base_ns(second: str) -> int:
    """Of the beginning of a time, up to its point; raises ValueError for one that is spelled or lies otherwise."""
    base_ns = clock.parse_rfc3339(f"{second[:-1]}Z") if _SECOND.fullmatch(second) else -1
    if not 0 <= base_ns < END_NS - clock.NS_PER_S:
        raise ValueError(second)
    return base_ns
