"""Bytes to maps and back: what one side says the other reads, and whatever else arrives is refused by its code."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from enum import IntEnum
from typing import cast

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from railbus_shared import wire
from railbus_shared.errors import BadMessage, WireError

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
MAPS = st.dictionaries(st.text(max_size=8), _VALUES, max_size=5)


@given(MAPS, st.sampled_from(wire.Encoding))
def test_what_is_encoded_is_decoded_in_either_encoding(message: dict[str, object], encoding: wire.Encoding) -> None:
    data = wire.encode(message, encoding=encoding)
    assert wire.encoding_of(data) is encoding
    assert wire.decode(data) == message


@pytest.mark.parametrize("numbers", [[1e308, 1e308, -1e308], [2**64 - 1] * 20, [True, 0.5, 1], [0.5, None], []])
def test_numbers_are_taken_whatever_their_sum(numbers: list[object]) -> None:
    assert wire.decode(wire.encode({"v": 2, "numbers": numbers}))["numbers"] == numbers


def _is_map_or_wire_error(data: bytes) -> None:
    try:
        found = wire.decode(data)
    except BadMessage:
        return
    assert wire.decode(wire.encode(found)) == found
    json.dumps(found, allow_nan=False)


@given(st.binary(max_size=200))
@settings(max_examples=150)
def test_any_bytes_give_a_map_or_a_wire_error(data: bytes) -> None:
    _is_map_or_wire_error(data)


@given(st.sampled_from([b"\x81", b"\x82", b"\xde", b"\xdf", b"{", b" {", b'{"a":']), st.binary(max_size=60))
@settings(max_examples=150)
def test_bytes_that_begin_like_a_message_give_a_map_or_a_wire_error(start: bytes, rest: bytes) -> None:
    _is_map_or_wire_error(start + rest)


@given(MAPS, st.sampled_from(wire.Encoding), st.data())
@settings(max_examples=150)
def test_a_damaged_message_gives_a_map_or_a_wire_error(
    message: dict[str, object], encoding: wire.Encoding, data: st.DataObject
) -> None:
    damaged = bytearray(wire.encode(message, encoding=encoding))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    _is_map_or_wire_error(bytes(damaged))
    _is_map_or_wire_error(bytes(damaged[:cut]))


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"\x80", wire.Encoding.MSGPACK),
        (b"\x8f", wire.Encoding.MSGPACK),
        (b"\xde\0\0", wire.Encoding.MSGPACK),
        (b"\xdf\0\0\0\0", wire.Encoding.MSGPACK),
        (b"{}", wire.Encoding.JSON),
        (b" {}", wire.Encoding.JSON),
        (b"\r\n\t{}", wire.Encoding.JSON),
    ],
)
def test_the_first_byte_tells_the_encoding(data: bytes, encoding: wire.Encoding) -> None:
    assert wire.encoding_of(data) is encoding


def _packed(value: object) -> bytes:
    return cast("bytes", msgpack.packb({"a": value}, use_bin_type=True))


_DEEP = 5000
BOMBS = {
    "nothing": b"",
    "a list": b"\x91\x01",
    "a JSON list": b"[1]",
    "a number": b"\x01",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
    "two messages": b"\x80\x80",
    "two JSON documents": b"{}{}",
    "nested arrays": b"\x81\xa1a" + b"\x91" * _DEEP + b"\xc0",
    "nested maps": b"\x81\xa1a" * _DEEP + b"\xc0",
    "nested JSON arrays": b'{"a":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    "nested JSON maps": b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    "one level too deep": _packed(json.loads("[" * wire.MAX_DEPTH + "]" * wire.MAX_DEPTH)),
    "500000 empty arrays": b"\x81\xa1a\xdd" + (500_000).to_bytes(4, "big") + b"\x90" * 500_000,
    "500000 empty maps in pieces": b"\x8a" + b"".join(
        bytes([0xA1, 97 + n, 0xDC]) + (50_000).to_bytes(2, "big") + b"\x80" * 50_000 for n in range(10)
    ),
    "170000 empty JSON arrays": b'{"a":[' + b"[]," * 170_000 + b"[]]}",
    "a huge claimed array": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a huge claimed map": b"\xdf\xff\xff\xff\xff",
    "a huge claimed string": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "a huge claimed binary": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "a huge claimed extension": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "an extension": _packed(msgpack.ExtType(5, b"xx")),
    "an empty extension": b"\x81\xa1a\xc7\x00\x05",
    "a timestamp": b"\x81\xa1a\xd6\xff\0\0\0\1",
    "a long timestamp": b"\x81\xa1a\xc7\x0c\xff" + bytes(12),
    "binary": _packed(b"xx"),
    "empty binary": _packed(b""),
    "NaN": _packed(math.nan),
    "infinity": _packed(math.inf),
    "NaN among numbers": _packed([1, 0.5, math.nan, 2]),
    "infinities among numbers": _packed([0.5, math.inf, -math.inf]),
    "empty binary among numbers": _packed([1, b""]),
    "JSON NaN": b'{"a": NaN}',
    "a JSON number beyond floats": b'{"a": 1e999}',
    "a key twice": b"\x82\xa1a\x01\xa1a\x02",
    "a JSON key twice": b'{"a": {"b": 1, "b": 2}}',
    "a JSON key twice, spelled differently": rb'{"a": 1, "\u0061": 2}',
    "a number as key": b"\x81\x01\x01",
    "a nested number as key": _packed({1: 2}),
    "binary as key": _packed({b"k": 2}),
    "an array as key": b"\x81\x90\x01",
    "invalid UTF-8": b"\x81\xa1a\xa2\xff\xfe",
    "invalid UTF-8 as key": b"\x81\xa2\xff\xfe\x01",
    "invalid UTF-8 in JSON": b'{"a": "\xff\xfe"}',
    "half a surrogate pair": rb'{"a": "\ud800"}',
    "a half surrogate in msgpack": b"\x81\xa1a\xa3\xed\xa0\x80",
    "a JSON number beyond 64 bits": b'{"a": 18446744073709551616}',
    "a negative JSON number beyond 64 bits": b'{"a": [-9223372036854775809]}',
    "a JSON number of 100000 digits": b'{"a": ' + b"9" * 100_000 + b"}",
    "a cut document": b'{"a": ',
    "a cut map": b"\x82\xa1a\x01",
    "a reserved byte": b"\x81\xa1a\xc1",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_no_message_is_refused(name: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(BOMBS[name])
    assert caught.value.code == "BAD_MESSAGE"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("number", [0, 2**63, 2**64 - 1, -(2**63), 1.5, -0.0, 1e300])
@pytest.mark.parametrize("encoding", wire.Encoding)
def test_numbers_of_64_bits_pass(number: float, encoding: wire.Encoding) -> None:
    found = wire.decode(wire.encode({"a": number}, encoding=encoding))["a"]
    assert (found, type(found)) == (number, type(number))


def test_the_deepest_message_that_is_allowed_passes() -> None:
    value = json.loads("[" * (wire.MAX_DEPTH - 1) + "]" * (wire.MAX_DEPTH - 1))
    assert wire.decode(_packed(value)) == {"a": value}


@pytest.mark.parametrize("encoding", wire.Encoding)
def test_a_message_at_the_limit_passes_and_one_byte_more_is_refused(encoding: wire.Encoding) -> None:
    room = wire.MAX_BYTES - len(wire.encode({"a": "x" * 70_000}, encoding=encoding)) + 70_000
    data = wire.encode({"a": "x" * room}, encoding=encoding)
    assert len(data) == wire.MAX_BYTES
    assert wire.decode(data) == {"a": "x" * room}
    with pytest.raises(WireError, match="524289 bytes") as caught:
        wire.encode({"a": "x" * (room + 1)}, encoding=encoding)
    assert caught.value.code == "MESSAGE_TOO_LARGE"
    with pytest.raises(WireError) as caught:
        wire.decode(data + b" ")
    assert caught.value.code == "MESSAGE_TOO_LARGE"


class _Colour(IntEnum):
    RED = 1


_CYCLE: list[object] = []
_CYCLE.append(_CYCLE)


@pytest.mark.parametrize("encoding", wire.Encoding)
@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, b"x", b"", 2**64, -(2**63) - 1, "\ud800", datetime.now(UTC), object(), {1: 2}, {b"k": 1},
        {"k": {None: 1}}, [[b"x"]], (math.nan,), {1, 2}, _CYCLE,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cannot_be_said_in_both_encodings_is_refused_in_both(value: object, encoding: wire.Encoding) -> None:
    with pytest.raises(WireError) as caught:
        wire.encode({"a": value}, encoding=encoding)
    assert caught.value.code == "BAD_MESSAGE"


@pytest.mark.parametrize("encoding", wire.Encoding)
def test_tuples_and_enumerations_go_as_what_they_stand_for(encoding: wire.Encoding) -> None:
    assert wire.decode(wire.encode({"a": (1, (2,)), "b": _Colour.RED}, encoding=encoding)) == {"a": [1, [2]], "b": 1}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (1.5, 1.5), (3, 3), ("x", "x"), (None, None)],
)
def test_numbers_that_json_cannot_say_become_words(value: object, shown: object) -> None:
    assert wire.finite(value) == shown
